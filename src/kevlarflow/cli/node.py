"""``kevlarflow node --join NODE``: starts a node by hand in a place that is empty, without the zygote.

This very process becomes the node: it asks the controller who it is, takes on the environment of the cluster, by
which the guardian will know it, and starts again as `kevlarflow.cli.by_hand`. Whoever can open the cluster's private
run folder may do so, and nobody else.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from kevlarflow import config as configuration
from kevlarflow.cli.status import ANSWER_SECONDS
from kevlarflow.command_line import Parser, add_port
from kevlarflow.errors import ClusterUnreachable, RequestRefused
from kevlarflow.types import NodeId


def run(arguments: list[str]) -> int:
    """Become the node; returns only by an error."""
    parser = Parser(
        prog="kevlarflow node",
        description="Start a node by hand in the place of one that was drained or has died. It stays in the foreground "
        "until the cluster ends or it is drained: by `kevlarflow drain`, or by Ctrl-C or SIGTERM, which do the same. A "
        "second Ctrl-C ends it at once.",
    )
    parser.add_argument("--join", metavar="NODE", required=True, help="the place, such as node-0-1")
    add_port(parser)
    options = parser.parse_args(arguments)

    from kevlarflow.cli.serve import child_environment
    from kevlarflow.control.run_folder import RUN_ID_FILE
    from kevlarflow.control.status import ask
    from kevlarflow.wire.messages import Answered, JoinNode

    folder = configuration.run_folder_of(options.port)
    answer = ask(folder, JoinNode(NodeId(options.join), os.getpid()), Answered, ANSWER_SECONDS)
    if answer.refusal:
        raise RequestRefused(answer.refusal)
    assert answer.member is not None, "who is to join is said when it is granted"
    try:
        config = configuration.load(str(folder))
        run_id = (Path(folder) / RUN_ID_FILE).read_text()
    except OSError as error:
        raise ClusterUnreachable(f"the cluster on port {options.port} has just ended") from error
    member = answer.member
    log = f"{config.log_folder}/{member.node}-{member.incarnation}.log"
    print(
        f"{member.node} joins as member {member.incarnation} (pid {os.getpid()}) and loads its stage, which may take a "
        f"minute; its log: {log}",
        flush=True,
    )
    with contextlib.suppress(OSError):
        # Where it cannot be reached only what is named relative to it is not found, which will be said.
        os.chdir(config.directory)
    environment = child_environment(config) | {
        configuration.RUN_FOLDER_VARIABLE: config.run_folder,
        configuration.RUN_ID_VARIABLE: run_id,
    }
    program = [sys.executable, "-m", "kevlarflow.cli.by_hand"]
    os.execve(sys.executable, [*program, member.node, str(member.incarnation), str(answer.stage)], environment)
