from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kevlarflow import config as configuration
from kevlarflow import default_model
from kevlarflow.cli import serve
from kevlarflow.cli.flags import _TAKEN, value_given
from kevlarflow.cli.preflight import GIB, LARGEST_DEFAULT_KV_BYTES, MIB
from kevlarflow.config import ServeConfig, Timeouts
from kevlarflow.control import supervisor
from kevlarflow.control.run_folder import RunFolder
from kevlarflow.errors import INTERRUPTED, NotEnoughMemory, UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 30, "dtype": "bfloat16"}))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture
def supervise() -> Callable[[ServeConfig], int]:
    """The real one. It comes before `served`, which replaces it."""
    return serve._supervise


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Configurations that would have been served."""
    configs: list[ServeConfig] = []

    def take(config: ServeConfig) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(serve, "_supervise", take)
    monkeypatch.setattr(serve.preflight, "check_port", lambda *_: None)
    monkeypatch.setattr(serve.preflight, "available_memory", lambda: 32 * GIB)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return configs


def test_what_is_typed_becomes_the_configuration(model: Path, served: list[ServeConfig]) -> None:
    words = [str(model), "-pp", "2", "-dp", "3", "--port", "9", "--kv-cache-memory-bytes", "64M", "--dtype", "float32"]
    assert serve.run(words) == 0
    (config,) = served
    assert (config.model, config.served_model_name) == (str(model), str(model))
    assert (config.stages, config.pipelines, config.ranks) == (2, 3, 1)
    assert (config.host, config.port) == ("0.0.0.0", 9)
    assert config.kv_cache_memory_bytes == 64 * MIB
    assert config.vllm_args == ("--dtype", "float32")


def test_kv_memory_is_what_fits_and_at_most_a_gibibyte(
    model: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.run([str(model), "-pp", "2", "-dp", "2"])
    monkeypatch.setattr(serve.preflight, "available_memory", lambda: 8 * GIB)
    serve.run([str(model), "-pp", "2", "-dp", "2"])
    assert served[0].kv_cache_memory_bytes == GIB
    assert 64 * MIB < served[1].kv_cache_memory_bytes < 1024 * MIB


def test_vllms_variable_counts_when_the_flag_is_not_given(
    model: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    serve.run([str(model)])
    serve.run([str(model), "--kv-cache-memory-bytes", "1G"])
    assert [config.kv_cache_memory_bytes for config in served] == [2 * GIB, GIB]
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve.child_environment(served[0])


@pytest.mark.parametrize("value", ["0.5", "2G", "-1"])
def test_what_vllms_variable_cannot_mean_is_refused_and_not_passed_over(
    model: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", value)
    with pytest.raises(
        UsageError, match=rf"^VLLM_CPU_KVCACHE_SPACE={value} is no whole number of GiB: .* such as 512M$"
    ):
        serve.run([str(model)])
    serve.run([str(model), "--kv-cache-memory-bytes", "512M"])
    assert [config.kv_cache_memory_bytes for config in served] == [512 * MIB]


@pytest.mark.parametrize("value", ["", "0"])
def test_vllms_variable_may_say_nothing(
    model: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", value)
    serve.run([str(model)])
    assert served[0].kv_cache_memory_bytes == GIB


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["-tp", "2"], UsageError, "-tp 2 is not supported yet"),
        (["-pp", "0"], UsageError, "-pp 0 makes no pipeline"),
        (["-pp", "31"], UsageError, "-pp 31 asks for more stages than the model has layers (30)"),
        (["--kv-cache-memory-bytes", "0"], UsageError, "--kv-cache-memory-bytes 0 holds nothing"),
        (["-dp", "2", "--kv-cache-memory-bytes", "40G"], NotEnoughMemory, "lower -dp, --kv-cache-memory-bytes"),
        (
            ["--kv-cache-memory-bytes", "40G"],
            NotEnoughMemory,
            "1 node needs 41.9 GiB of memory and 32.0 GiB are free: lower --kv",
        ),
        (["-dp", "60"], NotEnoughMemory, "lower -dp"),
        (["--replacement-wait", "-1"], UsageError, "is no bound"),
        (["--max-model-lenght", "64"], UsageError, "no flag --max-model-lenght: did you mean --max-model-len?"),
        (["--replacement-wiat", "1"], UsageError, "did you mean --replacement-wait?"),
    ],
)
def test_what_cannot_work_is_named_before_anything_starts(
    model: Path, served: list[ServeConfig], flags: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        serve.run([str(model), *flags])
    assert words in str(caught.value)
    assert served == []


def test_a_working_folder_that_is_gone_is_named(
    model: Path, tmp_path: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="working folder has been removed"):
        serve.run([str(model)])
    assert not served


def test_a_run_folder_that_cannot_be_made_is_named(
    model: Path, supervise: Callable[[ServeConfig], int], served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    monkeypatch.setattr(serve, "_supervise", supervise)
    with pytest.raises(UsageError, match=r"^/proc/nowhere/\S+ cannot be made \(No such .*\): set XDG_RUNTIME_DIR"):
        serve.run([str(model)])


def test_who_lets_vllm_drain_gives_it_the_time(model: Path, served: list[ServeConfig]) -> None:
    for flags in ([], ["--shutdown-timeout", "30"], ["--shutdown-timeout=soon"]):
        serve.run([str(model), *flags])
    usual = Timeouts().stop_grace_s
    assert [config.timeouts.stop_grace_s for config in served] == [usual, usual + 30, usual]


def test_the_introduction_says_what_memory_may_be_taken(model: Path, served: list[ServeConfig]) -> None:
    serve.run([str(model), "-pp", "2", "-dp", "2", "--kv-cache-memory-bytes", "512M"])
    text = "\n".join(serve.introduction(served[0]))
    assert "4 nodes: 2 pipelines (-dp) x 2 stages (-pp)" in text
    assert "512 MiB a node" in text
    assert "note" not in text


def test_one_pipeline_is_told_that_there_is_nothing_to_borrow(model: Path, served: list[ServeConfig]) -> None:
    serve.run([str(model), "-pp", "2"])
    note = serve.introduction(served[0])[-1]
    assert "with -dp 1 there is nothing to borrow" in note
    assert "its requests for up to 45 s (--replacement-wait)" in note
    serve.run([str(model), "-pp", "2", "--replacement-wait", "0"])
    assert "requests end with an error when a node dies" in serve.introduction(served[1])[-1]


def test_the_users_environment_wins(model: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    serve.run([str(model)])
    serve.run([str(model), "--tokenizer", "owner/other"])
    environment = serve.child_environment(served[0])
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in serve.child_environment(served[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where KevlarFlow keeps things, which is not there yet."""
    monkeypatch.delenv(serve.COMPILED_CODE_VARIABLE, raising=False)
    monkeypatch.delenv("KEVLARFLOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kevlarflow"


def place_of_compiled_code(config: ServeConfig) -> str:
    return serve.child_environment(config)[serve.COMPILED_CODE_VARIABLE]


def test_compiled_code_is_kept_where_nobody_else_can_put_any(
    model: Path, served: list[ServeConfig], cache: Path
) -> None:
    serve.run([str(model)])
    assert place_of_compiled_code(served[0]) == str(cache / "inductor")
    assert (cache / "inductor").stat().st_mode & 0o077 == 0
    assert place_of_compiled_code(served[0]) == str(cache / "inductor"), "the next start finds it"


@pytest.mark.parametrize("obstacle", ["open to all", "a file", "no home"])
def test_without_a_folder_of_our_own_compiled_code_goes_with_the_cluster(
    model: Path, served: list[ServeConfig], cache: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    cache.mkdir(parents=True)
    if obstacle == "open to all":
        (cache / "inductor").mkdir()
        (cache / "inductor").chmod(0o777)
    elif obstacle == "a file":
        (cache / "inductor").touch()
    else:

        def unknown() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(configuration, "default_cache_dir", unknown)
    serve.run([str(model)])
    assert place_of_compiled_code(served[0]) == f"{served[0].scratch_folder}/inductor"


def test_compiled_code_is_kept_where_the_environment_says(
    model: Path, served: list[ServeConfig], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serve.COMPILED_CODE_VARIABLE, "/elsewhere")
    serve.run([str(model)])
    assert place_of_compiled_code(served[0]) == "/elsewhere"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("topic", "named", "not_named"),
    [
        ("standby", ["--standby-memory-bytes"], ["--slow-node-ratio"]),
        (
            "slow_node",
            ["--slow-node-ratio", "its lanes move away", "--slow-node-seconds"],
            ["--port"],
        ),
        ("all", ["--standby-memory-bytes", "--slow-node-ratio", "--port"], []),
    ],
)
def test_a_search_finds_flags_of_ours_before_vllm_shows_its_own(
    topic: str,
    named: list[str],
    not_named: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executed: list[str] = []
    monkeypatch.setattr(serve.os, "execv", lambda _, words: executed.extend(words))
    serve.run([f"--help={topic}"])
    shown = capsys.readouterr().out
    assert all(each in shown for each in named)
    assert not any(each in shown for each in not_named)
    assert executed[-1] == f"--help={topic}"


def test_help_names_every_flag_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run(["--help"]) == 0
    text = capsys.readouterr().out
    # --model is vLLM's other way to name MODEL.
    for flag in ("MODEL", *_TAKEN.keys() - {"--model"}):
        assert flag in text


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--replication-interval-tokens N", f"{configuration.DEFAULT_REPLICATION_INTERVAL_TOKENS}"),
        ("--replication-bandwidth N", f"{configuration.DEFAULT_BANDWIDTH // MIB}M"),
        ("--replacement-wait SECONDS", f"{configuration.DEFAULT_REPLACEMENT_WAIT_S:g}"),
        ("--slow-node-ratio X", f"{configuration.DEFAULT_SLOW_RATIO:g}"),
        ("--slow-node-seconds N", f"{Timeouts().slow_after_ms / 1_000:g}"),
        (
            "--kv-cache-memory-bytes N",
            f"`VLLM_CPU_KVCACHE_SPACE` GiB if set, else what fits, up to {LARGEST_DEFAULT_KV_BYTES // GIB} GiB",
        ),
    ],
)
def test_the_readme_tells_the_defaults(flag: str, default: str) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text().splitlines()
    (row,) = [line for line in readme if line.startswith(f"| `{flag}`")]
    assert row.rstrip(" |").rpartition("| ")[2] == default


def test_no_memory_for_replicas_turns_replication_off_and_says_so(model: Path, served: list[ServeConfig]) -> None:
    assert serve.run([str(model), "-dp", "2", "--kv-cache-memory-bytes", "64M", "--standby-memory-bytes", "0"]) == 0
    assert served[0].standby_memory_bytes == 0
    (line,) = [line for line in serve.introduction(served[0]) if line.startswith("replication")]
    assert line.startswith("replication: off (--standby-memory-bytes is 0, or ")


def test_replication_is_on_by_default_and_says_with_what(model: Path, served: list[ServeConfig]) -> None:
    words = [str(model), "-dp", "2", "--kv-cache-memory-bytes", "64M", "--replication-bandwidth", "3M"]
    assert serve.run(words) == 0
    (line,) = [line for line in serve.introduction(served[0]) if line.startswith("replication")]
    assert "64 MiB a node" in line
    assert "3 MiB a second" in line


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--standby-memory-bytes", "-5", r"-5 is negative: use 0 \(no replication\) or more"),
        ("--standby-memory-bytes", "900G", "900.0 GiB for replicas.*32.0 GiB are free"),
        ("--replication-interval-tokens", "-1", "negative"),
        ("--replication-bandwidth", "0", "copies nothing"),
        ("--replication-bandwidth", "-1M", "copies nothing: use a number of bytes, such as 128M"),
        ("--replication-bandwidth", "much", "is not a number of bytes, such as 512M or 2G"),
    ],
)
def test_what_cannot_be_replicated_is_refused(
    flag: str, value: str, words: str, model: Path, served: list[ServeConfig]
) -> None:
    with pytest.raises((UsageError, NotEnoughMemory), match=words):
        serve.run([str(model), "-dp", "2", "--kv-cache-memory-bytes", "64M", flag, value])
    assert not served


def test_slow_nodes_are_sought_unless_that_is_turned_off(model: Path, served: list[ServeConfig]) -> None:
    for flags in ([], ["--slow-node-ratio", "2.5", "--slow-node-seconds=20"], ["--slow-node-ratio=0"]):
        assert serve.run([str(model), *flags]) == 0
    found = [(config.slow_ratio, config.timeouts.slow_after_ms) for config in served]
    assert found == [(3.0, 10_000), (2.5, 20_000), (0.0, 10_000)]


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--slow-node-ratio", "1.5", "would blame nodes for their work"),
        ("--slow-node-ratio", "very", "is not a number"),
        ("--slow-node-seconds", "0", "is no time"),
        ("--slow-node-seconds", "nan", "is no time"),
        ("--slow-node-seconds", "inf", "is no time"),
        ("--slow-node-seconds", "5", "is no time to tell a slow node by: use more than 5"),
    ],
)
def test_what_makes_no_node_slow_is_refused(
    flag: str, value: str, words: str, model: Path, served: list[ServeConfig]
) -> None:
    with pytest.raises(UsageError, match=words):
        serve.run([str(model), flag, value])
    assert not served


def test_how_long_requests_wait_for_a_replacement_is_as_typed(model: Path, served: list[ServeConfig]) -> None:
    for flags in ([], ["--replacement-wait", "0"], ["--replacement_wait=2.5"]):
        serve.run([str(model), *flags])
    assert [config.replacement_wait_s for config in served] == [45.0, 0.0, 2.5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("-1", "no bound: use a number of seconds"),
        ("nan", "no bound"),
        ("inf", "no bound"),
        ("long", "is not a number"),
    ],
)
def test_a_wait_that_is_no_bound_is_refused(value: str, words: str, model: Path, served: list[ServeConfig]) -> None:
    with pytest.raises(UsageError, match=words):
        serve.run([str(model), "--replacement-wait", value])
    assert not served


def test_who_starts_a_killed_cluster_again_at_once_waits_for_its_port(
    served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    base = Path(tempfile.mkdtemp())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setattr(serve, "_with_model", lambda config, _: config)
    monkeypatch.setattr(serve, "_supervise", lambda config: served.append(config) or 0)
    api_server = socket.create_server(("127.0.0.1", 0))
    port = api_server.getsockname()[1]
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock_path = configuration.run_folder_of(port).with_suffix(".lock")
    lock_path.parent.mkdir(mode=0o700)
    # A guardian holds the lock until it has ended whatever the dead had.
    guardian = lock_path.open("w")
    fcntl.flock(guardian, fcntl.LOCK_EX)
    guardian.write(str(dead.pid))
    guardian.flush()

    def sweep() -> None:
        api_server.close()
        guardian.close()

    threading.Timer(0.3, sweep).start()
    try:
        assert serve.run(["--port", str(port)]) == 0
    finally:
        shutil.rmtree(base)
    assert [config.port for config in served] == [port]


def test_a_model_that_is_named_in_a_file_is_refused_before_another_one_is_made(
    tmp_path: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("model: owner/name")
    monkeypatch.setattr(default_model, "ensure_default_model", lambda: pytest.fail("the default model was made"))
    with pytest.raises(UsageError, match="--model is not read from"):
        serve.run(["--config", str(file)])
    assert not served


def test_a_tokenizer_that_is_named_in_a_file_may_be_fetched(
    model: Path, tmp_path: Path, served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    file = tmp_path / "flags.yaml"
    file.write_text("tokenizer: owner/other")
    serve.run([str(model), "--config", str(file)])
    assert "HF_HUB_OFFLINE" not in serve.child_environment(served[0])


class NoSupervisor:
    """It has nothing to do, and leaves everything as it is."""

    def __init__(self, *_: object) -> None:
        pass

    def take_signals(self) -> None:
        pass

    def run(self) -> int:
        return 0


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the run folder is made, for nobody who would do anything with it."""
    base = Path(tempfile.mkdtemp())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setattr(supervisor, "Supervisor", NoSupervisor)
    for name in ("lose_what_cannot_be_written", "_allow_many_files"):
        monkeypatch.setattr(serve, name, lambda: None)
    yield base / f"kevlarflow-{os.getuid()}"
    shutil.rmtree(base)


@pytest.fixture
def kept(
    model: Path, supervise: Callable[[ServeConfig], int], served: list[ServeConfig], base: Path
) -> Callable[..., ServeConfig]:
    """What `serve` keeps for those that start later."""

    def keep(*flags: str) -> ServeConfig:
        serve.run([str(model), *flags])
        assert supervise(served[-1]) == 0
        assert Path(served[-1].run_folder).parent == base
        return configuration.load(served[-1].run_folder)

    return keep


@pytest.mark.parametrize("fate", ["changed", "removed"])
def test_the_file_of_flags_is_read_at_the_start_only(
    kept: Callable[..., ServeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "flags.yaml"
    file.write_text("max-num-seqs: 8")
    config = kept("--seed", "1", "--config", "flags.yaml", "--dtype", "float32")
    if fate == "changed":
        file.write_text("max-num-seqs: 16")
    else:
        file.unlink()
    monkeypatch.chdir("/")
    words = list(config.vllm_args)
    assert value_given(words, "--max-num-seqs") == "8"
    assert (words[:3], words[4:]) == (["--seed", "1", "--config"], ["--dtype", "float32"])
    copy = Path(words[3])
    assert (copy.parent, copy.suffix, copy.stat().st_mode & 0o077) == (Path(config.run_folder), ".yaml", 0)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UsageError)],
)
@pytest.mark.parametrize("moment", ["locked", "named", "pruned", "saved", "introduced", "made"])
def test_a_start_that_ends_before_anything_is_started_leaves_nothing(
    kept: Callable[..., ServeConfig],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[BaseException],
    moment: str,
) -> None:
    def fail(*_: object) -> None:
        raise failure

    places: dict[str, tuple[object, str]] = {
        "locked": (os, "pwrite"),
        "named": (Path, "write_text"),
        "pruned": (RunFolder, "_prune_logs"),
        "saved": (configuration, "save"),
        "introduced": (serve, "introduction"),
        "made": (NoSupervisor, "take_signals"),
    }
    monkeypatch.setattr(*places[moment], fail)
    with pytest.raises(type(failure) if moment in {"introduced", "made"} else raised):
        kept()
    assert list(base.iterdir()) == []


EARLY_SIGNAL = """
import os, signal, sys
from kevlarflow.cli import serve
from kevlarflow.config import ServeConfig, run_folder_of
from kevlarflow.control.supervisor import Supervisor

run = Supervisor.run

def run_later(supervisor):
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    return run(supervisor)

Supervisor.run = run_later
config = ServeConfig(
    model="m", served_model_name="m", host="127.0.0.1", port=8000, stages=1, pipelines=1, kv_cache_memory_bytes=1,
    run_folder=str(run_folder_of(8000)),
)
sys.exit(serve._supervise(config))
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_that_comes_before_the_supervisor_runs_ends_it(base: Path, sent: str) -> None:
    ended = subprocess.run([sys.executable, "-c", EARLY_SIGNAL, sent], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (INTERRUPTED, "")
    assert ended.stdout.endswith("stopping\n")
    assert list(base.iterdir()) == []


@pytest.mark.parametrize(("flags", "told"), [([], True), (["--enforce-eager"], False)])
def test_who_cannot_compile_is_told_before_anything_starts(
    flags: list[str],
    told: bool,
    model: Path,
    served: list[ServeConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert serve.run([str(model), *flags]) == 0
    warning = "warning: torch compiles the model, and the C++ compiler /nowhere/g++ (CXX) cannot be found"
    assert (warning in capsys.readouterr().out) is told


SLOW_DOWNLOAD = """
import sys, time
from kevlarflow.cli import main, serve

def download(*_):
    try:
        print("downloading", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

serve.preflight.check_port = lambda *_: None
serve._model = download
sys.exit(main.main(["serve", "owner/name", "--enforce-eager"]))
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_whoever_ends_it_while_a_model_is_fetched_has_it_cleaned_up(sent: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW_DOWNLOAD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "downloading\n"
        process.send_signal(sent)
        assert process.stdout.readline() == "cleaned up\n"
    assert process.returncode == INTERRUPTED
