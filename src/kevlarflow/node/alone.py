"""A node that was started by hand: it imports torch and vLLM itself, which the zygote does for all others.

``kevlarflow node --join`` runs it, with the environment of the cluster; what signals mean to it, and what is said in
the terminal, is that command's business.
"""

from __future__ import annotations

import os

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
    lose_what_cannot_be_written()
    use_scratch_folder(config)
    redirect_output(os.path.join(config.log_folder, f"{member.node}-{member.incarnation}.log"))
    setproctitle(f"{TITLE}{member.node}-{member.incarnation}")
    load(REGISTER_KERNELS)()
    load(RUN_NODE)(config, member, Stage(int(stage)), configure=load(STAGE_CONFIG))
    return 0
