"""Messages from the wire as events of the cluster, and commands of the cluster as messages."""

from __future__ import annotations

from kevlarflow.recovery import events
from kevlarflow.wire import messages

FromPeer = (
    messages.NodeStarting
    | messages.NodeReady
    | messages.NodeFailed
    | messages.EngineAttached
    | messages.EngineReady
    | messages.EngineReport
    | messages.Formed
    | messages.MemberFailed
)


def event_of(message: FromPeer) -> events.AnyEvent:
    """What a node's or an engine's message means to the cluster."""
    match message:
        case messages.NodeStarting(member=member, host=host, pids=pids):
            return events.NodeStarting(member, host, pids)
        case messages.NodeReady(info=info, epochs=epochs):
            return events.NodeReady(info, epochs)
        case messages.NodeFailed(member=member, reason=reason):
            return events.NodeFailed(member, reason)
        case messages.EngineAttached():
            return events.EngineAttached(
                pipeline=message.pipeline,
                pid=message.pid,
                epoch=message.epoch,
                members=message.members,
                shares=message.shares,
                suspended=message.suspended,
                forming=message.forming,
            )
        case messages.EngineReady(pipeline=pipeline, kv_blocks=kv_blocks):
            return events.EngineReady(pipeline, kv_blocks)
        case messages.EngineReport():
            return events.EngineReport(
                pipeline=message.pipeline,
                running=message.running,
                waiting=message.waiting,
                in_flight=message.in_flight,
                kv_blocks=message.kv_blocks,
                replication=message.replication,
                epoch=message.epoch,
                forming=message.forming,
                still_seconds=message.still_seconds,
                awaited=message.awaited,
            )
        case messages.Formed():
            return events.Formed(
                pipeline=message.pipeline,
                epoch=message.epoch,
                seconds=message.seconds,
                requests=message.requests,
                lost_requests=message.lost_requests,
                recomputed_tokens=message.recomputed_tokens,
            )
        case messages.MemberFailed(pipeline=pipeline, member=member, reason=reason, epoch=epoch, unlinked=unlinked):
            return events.MemberFailed(pipeline, epoch, member, reason, unlinked)


def order_of(
    command: events.Form | events.Suspend | events.AssignStandbys | events.Hasten,
) -> messages.Form | messages.Suspend | messages.Standbys | messages.Hasten:
    """The message that carries an order to an engine."""
    if isinstance(command, events.AssignStandbys):
        return messages.Standbys(command.pipeline, command.standbys)
    if isinstance(command, events.Hasten):
        return messages.Hasten(command.pipeline, command.epoch, command.stages)
    if isinstance(command, events.Suspend):
        return messages.Suspend(
            pipeline=command.pipeline,
            epoch=command.epoch,
            stage=command.stage,
            reason=command.reason,
            waits=command.waits,
            lost_stages=command.lost_stages,
            losses=command.losses,
        )
    return messages.Form(
        pipeline=command.pipeline,
        epoch=command.epoch,
        nodes=command.nodes,
        released=command.released,
        cause=command.cause,
        lost_stages=command.lost_stages,
        shares=command.shares,
        orphans=command.orphans,
        losses=command.losses,
    )
