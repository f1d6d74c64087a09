"""The API server: vLLM's own OpenAI server, on engines whose executor is KevlarFlow's.

This is what `vllm.entrypoints.launchers.api_server.entry` does, with one difference: the engines are forked. vLLM's
CPU platform asks for `spawn`, which would import everything once more for each engine; here the imports are the
zygote's, and this process has no thread yet when the engines are forked.

It runs until it is told to stop, or until vLLM gives up an engine. Then it leaves together with all its engines,
and the supervisor starts the whole again, which attaches to the living nodes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NoReturn

import uvloop
import vllm.distributed.utils as distributed
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.logger import configure_logging_from_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import decorate_logs
from vllm.v1.engine.async_llm import AsyncLLM

from kevlarflow.config import ServeConfig
from kevlarflow.engine import availability
from kevlarflow.engine.arguments import namespace, vllm_config_of
from kevlarflow.kinship import forks_die_with_us

LAST_BYTES_SECONDS = 0.5
"""How long streams may go on when their engines have been stopped: nothing can be said that is not said already.

By itself vLLM waits until the last client has closed its stream."""


def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT. Runs in a process that the zygote forked."""
    args = namespace(config)
    configure_logging_from_args(args)
    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, _interrupt)
    availability.configure(config)
    availability.explain_failed_requests()
    # Nobody can reach an engine without its API server.
    forks_die_with_us()
    listen_address, sock = setup_server(args, reuse_port=False)
    # An engine that outlives this process must not keep the port from the next one.
    os.register_at_fork(after_in_child=sock.close)
    try:
        uvloop.run(_serve(args, listen_address, sock))
    finally:
        sock.close()


def _interrupt(*_: Any) -> NoReturn:
    # Until uvicorn runs, which has handlers of its own.
    raise KeyboardInterrupt("terminated")


async def _serve(args: Namespace, listen_address: str, sock: socket.socket) -> None:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    vllm_config = vllm_config_of(args)
    # Creating the configuration has set it to "spawn".
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    with _no_coordination_store():
        engines = AsyncLLM.from_vllm_config(
            vllm_config=vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )
    availability.learn_reasons(engines.output_processor)
    try:
        await engines.reset_mm_cache()
        stopped = await build_and_serve(
            engines, listen_address, sock, args, timeout_graceful_shutdown=LAST_BYTES_SECONDS
        )
    finally:
        engines.shutdown(timeout=vllm_config.shutdown_timeout)
    await stopped


@contextlib.contextmanager
def _no_coordination_store() -> Iterator[None]:
    """Keep vLLM from opening a TCP store on all interfaces, which with -dp only mixture-of-experts models use.

    Those are refused (see `kevlarflow.engine.unsupported`), and forked engines would inherit the open port.
    """
    create = distributed.create_tcp_store
    distributed.create_tcp_store = lambda *_, **__: Namespace(port=0)
    try:
        yield
    finally:
        distributed.create_tcp_store = create
