"""The session around a pipeline's core, without nodes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import Cause, Epoch, Member, NodeInfo, PipelineId, Stage
from kevlarflow.wire import steps
from kevlarflow.wire.messages import Form

if TYPE_CHECKING:
    from kevlarflow.engine.session import Session

PIPELINE = PipelineId(0)
BLOCK_SIZE = 4


@pytest.fixture
def session() -> Iterator[Session]:
    """Its pipeline of two stages is formed, in epoch 1, of nodes that never answer by themselves."""
    from kevlarflow.engine.session import Session

    session = Session(PIPELINE, Limits(max_batched_tokens=256, max_requests=8, block_size=BLOCK_SIZE, stages=2))
    session._handle(core.FormationOrdered(Epoch(1), (node("a", 0), node("a", 1))))
    for stage in (Stage(0), Stage(1)):
        session._receive(steps.Joined(PIPELINE, Epoch(1), stage), [])
        session._receive(steps.Restored(PIPELINE, Epoch(1), stage), [])
    yield session
    session.close()


def node(name: str, stage: int) -> NodeInfo:
    """One that no process stands behind."""
    member = Member(f"{name}-{stage}", 1)
    return NodeInfo(member, Stage(stage), "here", 1, (1,), f"ipc://{name}{stage}.s", f"ipc://{name}{stage}.a", 2, 50)


def issue(
    session: Session,
    sequence: int,
    *,
    hit: dict[str, int] | None = None,
    goes_on: dict[str, tuple[int, int]] | None = None,
    **requests: tuple[int, ...],
) -> Any:
    """A step that admits these requests, each with its blocks full of prompt, of which it finds `hit` tokens cached.

    Those of `goes_on` compute one more block, named first, behind so many tokens.
    """
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    from kevlarflow.engine.translate import step_of

    hit, goes_on = hit or {}, goes_on or {}
    scheduled = SchedulerOutput.make_empty()
    scheduled.scheduled_new_reqs = [
        NewRequestData(
            name, list(range(len(blocks) * BLOCK_SIZE)), [], None, None, (list(blocks),), hit.get(name, 0), None
        )
        for name, blocks in requests.items()
    ]
    scheduled.scheduled_cached_reqs = CachedRequestData(
        req_ids=list(goes_on),
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[([block],) for block, _ in goes_on.values()],
        num_computed_tokens=[computed for _, computed in goes_on.values()],
        num_output_tokens=[0] * len(goes_on),
    )
    scheduled.num_scheduled_tokens = {
        **{name: len(blocks) * BLOCK_SIZE - hit.get(name, 0) for name, blocks in requests.items()},
        **dict.fromkeys(goes_on, BLOCK_SIZE),
    }
    scheduled.total_num_scheduled_tokens = sum(scheduled.num_scheduled_tokens.values())
    return session.issue(step_of(scheduled, sequence, session._core.formations), scheduled, None)


def sampled(**tokens: int) -> bytes:
    """What the last stage says of a step: a token of each of these requests."""
    from vllm.v1.outputs import ModelRunnerOutput

    output = ModelRunnerOutput(
        req_ids=list(tokens),
        req_id_to_index={name: index for index, name in enumerate(tokens)},
        sampled_token_ids=[[token] for token in tokens.values()],
    )
    return pickle.dumps((output, dict.fromkeys(tokens, b"state")))


def tokens_of(future: Any) -> dict[str, list[int]]:
    """What vLLM is given of a step that is over."""
    output = future.result(timeout=0)
    return dict(zip(output.req_ids, output.sampled_token_ids, strict=True))


def test_vllm_is_given_what_the_last_stage_has_sampled(session: Session) -> None:
    future = issue(session, 1, a=(1, 2))
    session._receive(steps.Executed(PIPELINE, Epoch(1), 1), [sampled(a=7)])
    assert tokens_of(future) == {"a": [7]}


def test_what_a_step_had_sampled_before_all_its_requests_gave_way_is_not_given_to_vllm(session: Session) -> None:
    """The scheduler would count a token that the ledger, and so the random generator, does not know of."""
    future = issue(session, 1, long=tuple(range(1, 31)))
    session._handle(core.FormationOrdered(Epoch(2), (node("b", 0), node("a", 1)), lost=True, shares=2))
    assert not future.done()
    session._receive(steps.Joined(PIPELINE, Epoch(2), Stage(1), ((1, 1),)), [sampled(long=7)])
    assert tokens_of(future) == {"long": []}


def test_what_it_had_sampled_counts_if_nobody_gave_way(session: Session) -> None:
    future = issue(session, 1, a=(1, 2))
    session._handle(core.FormationOrdered(Epoch(2), (node("b", 0), node("a", 1)), lost=True))
    session._receive(steps.Joined(PIPELINE, Epoch(2), Stage(1), ((1, 1),)), [sampled(a=7)])
    assert tokens_of(future) == {"a": [7]}


def test_a_request_that_is_taken_out_of_a_step_under_way_has_sampled_nothing(session: Session) -> None:
    """Another step of its predecessor raises: what it hit is void, and so is what it samples from that."""
    chunk = issue(session, 1, long=(1,))
    session._receive(steps.Executed(PIPELINE, Epoch(1), 1), [sampled()])
    assert chunk.done()
    under_way = issue(
        session, 2, hit={"hits": 2 * BLOCK_SIZE}, goes_on={"long": (2, BLOCK_SIZE)}, hits=(1, 2, 3), other=(4,)
    )
    issue(session, 3, goes_on={"long": (5, 2 * BLOCK_SIZE)})
    session._receive(steps.StepFailed(PIPELINE, Epoch(1), 3, Stage(0), "boom"), [])
    session._receive(steps.Executed(PIPELINE, Epoch(1), 2), [sampled(hits=7, other=8)])
    assert tokens_of(under_way) == {"hits": [], "other": [8], "long": []}


def order(epoch: int, names: str, *, lends: bool) -> Form:
    nodes = tuple(node(name, stage) for stage, name in enumerate(names))
    return Form(PIPELINE, Epoch(epoch), nodes, (), Cause.CRASH, (Stage(1),), shares=1 + lends)


def answer(session: Session, epoch: int) -> None:
    for stage in (Stage(0), Stage(1)):
        session._receive(steps.Joined(PIPELINE, Epoch(epoch), stage), [])
        session._receive(steps.Restored(PIPELINE, Epoch(epoch), stage), [])


def test_an_introduction_is_of_one_moment(session: Session) -> None:
    def told() -> tuple[int, list[str], int, bool]:
        said = session.introduction
        return said.epoch, [member.node for member in said.members], said.shares, said.forming

    assert told() == (1, ["a-0", "a-1"], 1, False)
    session.post(order(2, "ab", lends=True))
    assert told() == (1, ["a-0", "a-1"], 1, False)
    session.attend(0.0)
    assert told() == (2, ["a-0", "b-1"], 2, True)
    answer(session, 2)
    assert told() == (2, ["a-0", "b-1"], 2, False)


def test_an_idle_engine_does_not_grow_with_each_recovery(session: Session) -> None:
    kept = []
    for epoch in range(2, 102):
        session.post(order(epoch, "ab" if epoch % 2 else "aa", lends=epoch % 2 == 1))
        session.attend(0.0)
        answer(session, epoch)
        core = session._core
        kept.append(len(session._orders.usable) + len(core._giving_way._choices) + len(core._lost_stages._lost_at))
    assert kept[-1] == kept[49]
    # What any of them left out is left out first, whatever may be used in the end.
    first, last = session._orders.usable
    assert first is not None
    assert last is not None
    assert first == last


def test_what_vllm_goes_on_appending_to_changes_no_step() -> None:
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    from kevlarflow.engine.translate import step_of

    new, more = [1, 2], [7]
    scheduled = SchedulerOutput.make_empty()
    scheduled.scheduled_new_reqs = [NewRequestData("new", [3, 4, 5], [], None, None, (new,), 0, None)]
    scheduled.scheduled_cached_reqs = CachedRequestData(["old"], set(), [], {}, [(more,)], [8], [1])
    step = step_of(scheduled, sequence=1, formation=0)
    new.append(3)
    more.append(8)
    assert list(step.admissions[0].blocks) == [1, 2]
    assert list(step.continuations[0].new_blocks) == [7]
