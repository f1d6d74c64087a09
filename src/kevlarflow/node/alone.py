"""A node that was started by hand: it imports torch and vLLM itself, which the zygote does for all others.

Run it with ``python -m kevlarflow.node.alone NODE INCARNATION STAGE``, with the environment of the cluster; that is
what ``kevlarflow node --join`` does.
"""

from __future__ import annotations

import os
import signal
import sys

from setproctitle import setproctitle

from kevlarflow import config as configuration
from kevlarflow.kinship import TITLE
from kevlarflow.log_output import lose_what_cannot_be_written
from kevlarflow.node.zygote import (
    REGISTER_KERNELS,
    RUN_NODE,
    STAGE_CONFIG,
    load,
    redirect_output,
    use_scratch_folder,
)
from kevlarflow.types import Member, NodeId, Stage


def main(arguments: list[str]) -> int:
    """Be the node until it is told to leave. Does not return, but for an error while loading."""
    node, incarnation, stage = arguments
    config = configuration.load()
    member = Member(NodeId(node), int(incarnation))
    # As for all others: a node that ends has died, whatever ended it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    lose_what_cannot_be_written()
    use_scratch_folder(config)
    redirect_output(os.path.join(config.log_folder, f"{member.node}-{member.incarnation}.log"))
    setproctitle(f"{TITLE}{member.node}-{member.incarnation}")
    load(REGISTER_KERNELS)()
    load(RUN_NODE)(config, member, Stage(int(stage)), configure=load(STAGE_CONFIG))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
