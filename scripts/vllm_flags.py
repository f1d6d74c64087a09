"""Write down the names of all options of `vllm serve`, as the installed vLLM has them, for `kevlarflow.cli.vllm_flags`.

    .venv/bin/python scripts/vllm_flags.py

To be run after an upgrade of vLLM; a test says when the list is not that of the installed vLLM.
"""

from __future__ import annotations

from pathlib import Path

LIST = Path(__file__).resolve().parent.parent / "src/kevlarflow/cli/vllm_flags.txt"


def names() -> list[str]:
    """Every option string of vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return sorted({option for action in parser._actions for option in action.option_strings})


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}\n" for name in names()))
