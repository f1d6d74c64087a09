"""The hook in vLLM's own scheduler, with requests in it: who waits for room, for how long, and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kevlarflow.engine.orders import SchedulerOrders
from kevlarflow.recovery.pipeline_events import Aside, SetAside, UseBlocks
from standins import make_config

pytestmark = pytest.mark.timeout(120)

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "max_position_embeddings": 512,
}  # fmt: skip
BLOCK_SIZE = 16
BLOCKS = 9
"""One of which is never given out."""
HALF = frozenset({1, 2, 3, 4})
OTHER_HALF = frozenset({3, 4, 5, 6})
ROOM = 4 * BLOCK_SIZE
WAIT = 45.0


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.naps = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.naps += 1


class Engine:
    """What vLLM's loop asks of the scheduler, over nodes that sample the same token for ever."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.scheduler: Any = None
        self.orders = SchedulerOrders()
        self.in_flight: list[Any] = []
        self.finished: dict[str, str] = {}
        """Request to why it has finished; if with an error, what is said of it."""

    def begin_scheduling(self) -> SchedulerOrders:
        orders, self.orders = self.orders, SchedulerOrders()
        return orders

    def use(self, blocks: frozenset[int] | None) -> None:
        self.orders.add(UseBlocks(blocks))

    def ask(self, name: str, tokens: int, max_tokens: int = 100) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.scheduler.add_request(Request(name, list(range(tokens)), SamplingParams(max_tokens=max_tokens), None))

    def schedule(self) -> None:
        assert self.scheduler.has_requests(), "vLLM's loop would sleep until the next request comes"
        self.in_flight.append(self.scheduler.schedule())

    def answer(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        step = self.in_flight.pop(0)
        rows = {name: row for row, name in enumerate(step.num_scheduled_tokens)}
        output = ModelRunnerOutput(list(rows), rows, [[7] for _ in rows])
        for outputs in self.scheduler.update_from_output(step, output).values():
            for each in outputs.outputs:
                if each.finish_reason is not None:
                    why = str(each.finish_reason)
                    self.finished[each.request_id] = str(each.stop_reason) if why == "error" else why

    def step(self) -> None:
        self.schedule()
        self.answer()


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a model that has no weights; the scheduler does not look for any."""
    from kevlarflow.engine.arguments import namespace, vllm_config_of

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    words = ("--skip-tokenizer-init", "--enforce-eager", "--no-enable-prefix-caching")
    config = msgspec.structs.replace(
        make_config(folder / "run", 8000),
        model=str(folder),
        vllm_args=(*words, "--block-size", str(BLOCK_SIZE)),
        kv_cache_memory_bytes=2**26,
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        made = vllm_config_of(namespace(config))
    made.cache_config.num_gpu_blocks = BLOCKS
    return made


@pytest.fixture
def make_engine(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Engine]:
    """Makes an engine whose requests wait for room for so many seconds."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from kevlarflow.engine import scheduler as hook
    from kevlarflow.engine.executor import KevlarExecutor

    def make(seconds: float) -> Engine:
        engine = Engine(Clock())
        executor = SimpleNamespace(
            session=SimpleNamespace(spare_newcomers=lambda: None, note_lost=lambda _: None),
            begin_scheduling=engine.begin_scheduling,
            scheduler_ready=lambda _: None,
            replacement_wait_seconds=seconds,
        )
        monkeypatch.setattr(KevlarExecutor, "current", executor)
        monkeypatch.setattr(hook, "time", engine.clock)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=16, dtype=torch.float32)
        engine.scheduler = hook.KevlarScheduler(
            vllm_config,
            KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
        )
        return engine

    return make


@pytest.fixture
def engine(make_engine: Callable[[float], Engine]) -> Engine:
    return make_engine(WAIT)


def test_a_request_that_waits_for_room_in_vain_ends_and_its_client_is_told_why(engine: Engine) -> None:
    engine.use(HALF)
    engine.ask("long", ROOM)
    engine.step()
    engine.clock.now += WAIT - 0.1
    engine.step()
    assert engine.finished == {}
    assert engine.clock.naps == 2, "nobody else is there, and the loop must not burn a CPU for it"
    engine.clock.now += 0.1
    engine.step()
    assert engine.finished == {
        "long": "this request needs 65 tokens of KV memory, and only 64 are left while a node serves 2 pipelines; no "
        "more came within 45 s (--replacement-wait): start a node with kevlarflow node --join, or raise "
        "--kv-cache-memory-bytes"
    }
    assert not engine.scheduler.has_requests()


def test_it_ends_while_others_run_as_well(engine: Engine) -> None:
    engine.use(HALF)
    engine.ask("long", ROOM)
    engine.ask("short", 3)
    engine.step()
    engine.clock.now += WAIT
    engine.step()
    assert list(engine.finished) == ["long"]
    assert [request.request_id for request in engine.scheduler.running] == ["short"]
    assert engine.clock.naps == 0


def test_it_ends_at_once_where_nobody_is_to_wait_for_a_replacement(make_engine: Callable[[float], Engine]) -> None:
    engine = make_engine(0.0)
    engine.use(HALF)
    engine.ask("long", ROOM)
    engine.step()
    assert "no more came within 0 s" in engine.finished["long"]


def test_orders_that_bring_no_more_room_do_not_begin_the_wait_anew(engine: Engine) -> None:
    engine.use(HALF)
    engine.ask("long", ROOM)
    engine.step()
    engine.clock.now += WAIT - 1
    engine.use(None)
    engine.use(OTHER_HALF)
    engine.step()
    assert engine.finished == {}
    engine.clock.now += 1
    engine.step()
    assert list(engine.finished) == ["long"]


def test_a_request_that_has_room_for_a_while_waits_anew_when_it_has_none_again(engine: Engine) -> None:
    engine.use(HALF)
    engine.ask("long", ROOM, max_tokens=2)
    engine.step()
    engine.clock.now += WAIT - 1
    engine.use(None)
    engine.step()
    engine.orders.add(SetAside((Aside("long", "", True),), frozenset()))
    engine.use(HALF)
    engine.step()
    engine.clock.now += WAIT - 1
    engine.step()
    engine.use(None)
    engine.step()
    assert engine.finished == {"long": "length"}


def test_a_request_that_outgrows_its_share_in_mid_stream_waits_from_then_on(engine: Engine) -> None:
    engine.use(HALF)
    engine.ask("grows", ROOM - 2)
    engine.step()
    engine.clock.now += 2 * WAIT
    for _ in range(4):
        engine.step()
    assert engine.scheduler.get_request_counts() == (0, 1), "it has no room any more"
    engine.clock.now += WAIT - 1
    engine.step()
    assert engine.finished == {}
    engine.clock.now += 1
    engine.step()
    assert list(engine.finished) == ["grows"]


def test_what_is_in_flight_of_a_request_without_room_is_still_delivered(make_engine: Callable[[float], Engine]) -> None:
    engine = make_engine(0.0)
    engine.ask("last", ROOM, max_tokens=1)
    engine.ask("more", ROOM, max_tokens=2)
    engine.schedule()
    engine.orders.add(SetAside((Aside("last", "", True), Aside("more", "", True)), frozenset()))
    engine.use(HALF)
    engine.schedule()
    engine.answer()
    assert engine.finished == {"last": "length"}
    engine.answer()
    engine.step()
    assert "needs 66 tokens" in engine.finished["more"]


def test_requests_that_are_set_aside_keep_their_order(engine: Engine) -> None:
    names = ["b", "c", "a"]
    for name in names:
        engine.ask(name, 3)
    engine.step()
    # In the order of their ids, as the core names them.
    engine.orders.add(SetAside(tuple(Aside(name, "", True) for name in sorted(names)), frozenset()))
    engine.schedule()
    assert [request.request_id for request in engine.scheduler.running] == names
