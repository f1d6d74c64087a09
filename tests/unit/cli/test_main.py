from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from kevlarflow.cli import main as command
from kevlarflow.errors import ClusterUnreachable, UsageError


def test_help_is_fast_and_light() -> None:
    script = (
        "import sys; from kevlarflow.cli.main import main; assert main(['--help']) == 0; "
        "assert not {'vllm', 'torch', 'zmq', 'rich', 'msgspec'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, which a busy machine does not stretch; it takes 0.05 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_serve_stays_light() -> None:
    script = (
        "import sys, kevlarflow.cli.serve, kevlarflow.control.supervisor; "
        "assert not {'vllm', 'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "kevlarflow COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sevre"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("kevlarflow: there is no command 'sevre': use one of serve, status")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("error", "status"), [(UsageError("too\nbad"), 2), (ClusterUnreachable("too\nbad"), 1)])
def test_our_errors_are_one_line_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kevlarflow.cli.status

    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(kevlarflow.cli.status, "run", fail)
    assert command.main(["status"]) == status
    assert capsys.readouterr().err == "kevlarflow: too bad\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import kevlarflow.cli.status

    def fail(_: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(kevlarflow.cli.status, "run", fail)
    with pytest.raises(ZeroDivisionError):
        command.main(["status"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("status --port nope", "status: argument --port: nope is no port: use 1 to 65535"),
        ("status --port 65536", "status: argument --port: 65536 is no port: use 1 to 65535"),
        ("drain node-0-1 --port 0", "drain: argument --port: 0 is no port: use 1 to 65535"),
        ("chaos crash --port -1", "chaos: argument --port: -1 is no port: use 1 to 65535"),
        ("drain", "drain: the following arguments are required: node"),
        ("node", "node: the following arguments are required: --join"),
        ("demo --fast", "demo: unrecognized arguments: --fast"),
        ("soak --faults x", "soak: argument --faults: x is no number of 1 or more"),
        ("bench --rounds 0", "bench: argument --rounds: 0 is no number of 1 or more"),
        ("bench --minutes -1", "bench: argument --minutes: -1 is no number above 0"),
        ("bench --patience nan", "bench: argument --patience: nan is no number above 0"),
        ("bench --resume-rounds 0", "bench: argument --resume-rounds: 0 is no number of 1 or more"),
        ("bench run --rate fast", "bench run: argument --rate: invalid float value: 'fast'"),
        ("bench report a b", "bench report: unrecognized arguments: b"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        command.main(words.split())
    assert leaving.value.code == 2
    prog = f"kevlarflow {line.partition(':')[0]}"
    assert capsys.readouterr().err == f"kevlarflow {line}; see {prog} --help\n"


def test_status_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["status", "--port", "1", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kevlarflow: nothing answers on port 1")
