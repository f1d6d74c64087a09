"""What an order of the controller means to the core of a pipeline."""

from __future__ import annotations

from kevlarflow.recovery.pipeline_events import FormationOrdered, SuspensionOrdered
from kevlarflow.types import Cause
from kevlarflow.wire.messages import Form, Suspend


def formation_ordered(order: Form, shares_before: int) -> FormationOrdered:
    """The core's event. `shares_before` is what the order before said of shares.

    Room that is given back can wait for the steps in flight, as any planned change can; room that is needed cannot.
    """
    grows = order.cause is Cause.SHARE and order.shares < shares_before
    return FormationOrdered(
        epoch=order.epoch,
        nodes=order.nodes,
        released=order.released,
        planned=order.cause.is_planned or grows,
        shares=order.shares,
        orphans=order.orphans,
        anew=order.cause is Cause.LINK,
        lost=order.cause in (Cause.CRASH, Cause.HANG) and bool(order.lost_stages),
        losses=order.losses,
    )


def suspension_ordered(order: Suspend) -> SuspensionOrdered:
    """The core's event."""
    return SuspensionOrdered(order.epoch, order.reason, order.waits, order.lost_stages, order.losses)
