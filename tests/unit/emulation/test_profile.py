import pytest

from kevlarflow.emulation import profile
from kevlarflow.emulation.profile import GIGABIT, Profile, StepCounts
from kevlarflow.errors import UsageError


def test_the_model_is_llama_3_1_8b():
    model = Profile().model
    assert model.kv_bytes_per_token == 131_072
    embeddings = 2 * model.vocabulary * model.hidden_size
    assert model.layers * model.layer_parameters + embeddings == pytest.approx(8.03e9, rel=1e-3)


def test_decoding_is_bound_by_memory():
    # A quarter of the layers, 3.49 GB, at 480 GB/s, and 1 ms.
    assert Profile().stage_seconds(1, 0, 0) == pytest.approx(3.4897e9 / 480e9 + 1e-3, rel=1e-4)


def test_the_context_is_read():
    with_context = Profile().stage_seconds(1, 100_000, 0) - Profile().stage_seconds(1, 0, 0)
    assert with_context == pytest.approx(100_000 * 32_768 / 480e9)


def test_a_long_prompt_is_bound_by_compute():
    assert Profile().stage_seconds(2048, 2048, 0) == pytest.approx(2 * 1.7448e9 * 2048 / 62.5e12 + 1e-3, rel=1e-3)


def test_activations_take_the_link():
    assert Profile(link_bits_per_second=GIGABIT).transfer_seconds(100) == pytest.approx(100 * 16_384 * 8e-9 + 5e-5)
    assert Profile(link_bits_per_second=100 * GIGABIT).transfer_seconds(100) < 2e-4


def test_everything_is_slowed_down_alike():
    one, eight = Profile(), Profile(slowdown=8.0)
    assert eight.stage_seconds(4, 400, 400) == pytest.approx(8 * one.stage_seconds(4, 400, 400))
    assert eight.transfer_seconds(4) == pytest.approx(8 * one.transfer_seconds(4))
    assert eight.sampling_seconds(4) == pytest.approx(8 * one.sampling_seconds(4))


def test_a_step_is_an_overrun_when_it_takes_a_tenth_more():
    counts = StepCounts(pid=1, stage=0)
    counts.add(emulated_seconds=1.0, host_seconds=0.2, took_seconds=1.05, now=10.0)
    assert (counts.steps, counts.overruns) == (1, 0)
    counts.add(emulated_seconds=1.0, host_seconds=0.2, took_seconds=1.15, now=11.5)
    assert (counts.steps, counts.overruns, counts.overruns_at) == (2, 1, [11.5])
    assert counts.late_seconds == pytest.approx(0.2)


def test_a_process_emulates_only_when_it_is_told_to(monkeypatch):
    monkeypatch.delenv(profile.VARIABLE, raising=False)
    assert profile.from_environment() is None
    monkeypatch.setenv(profile.VARIABLE, '{"stages": 2}')
    assert profile.from_environment() == Profile(stages=2)
    monkeypatch.setenv(profile.VARIABLE, "A10")
    with pytest.raises(UsageError, match="KEVLARFLOW_EMULATION is no emulation profile"):
        profile.from_environment()
