"""The command `kevlarflow`: finds the sub-command and turns our errors into one line and an exit status.

A sub-command is a module with ``run(arguments) -> int``, imported only when it is asked for, so that
``kevlarflow --help`` costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from kevlarflow.errors import INTERRUPTED, KevlarFlowError

COMMANDS = {
    "serve": ("kevlarflow.cli.serve", "serve a model on nodes that may die"),
    "status": ("kevlarflow.cli.status", "show what a running cluster is doing"),
    "drain": ("kevlarflow.cli.drain", "have a node give its work away and leave, for maintenance"),
    "node": ("kevlarflow.cli.node", "start a node by hand in an empty place"),
    "demo": ("kevlarflow.cli.demo", "kill a node in mid-stream and watch the streams go on"),
    "chaos": ("kevlarflow.cli.chaos", "hurt a cluster as a scenario says, and check what has to hold"),
    "soak": ("kevlarflow.cli.soak", "hurt one cluster over and over, and look for leaks"),
    "bench": ("kevlarflow.cli.bench", "measure against stock vLLM, side by side"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from kevlarflow import __version__

        print(f"kevlarflow {__version__}")
        return 0
    if words[0] not in available():
        return complain(f"there is no command {words[0]!r}: use one of {', '.join(available())}", 2)
    try:
        command = importlib.import_module(COMMANDS[words[0]][0])
        status: int = command.run(words[1:])
    except KevlarFlowError as error:
        return complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left, as in `kevlarflow status | head`.
        sys.stderr.close()
        return 1
    return status


def available() -> list[str]:
    """Return the sub-commands whose module is there."""
    return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(module)]


def usage() -> str:
    """Return the text of ``kevlarflow --help``."""
    lines = ["usage: kevlarflow COMMAND ...", "", "vLLM serving that survives the death of a node.", ""]
    lines += [f"  {name:<8} {COMMANDS[name][1]}" for name in available()]
    lines += ["", "kevlarflow COMMAND --help explains a command; kevlarflow --version says which one this is."]
    return "\n".join(lines)


def complain(message: str, status: int) -> int:
    """Print one line to standard error; return the exit status."""
    print(f"kevlarflow: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
