"""`headrace serve`: one process group on one host, from flags to exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from stages.config import ServerConfig
from stages.cpu_binding import UNBOUND, bind_cpus
from stages.errors import ConfigError, HeadraceError
from stages.host import Host
from stages.run_dir import create_run_dir, remove_run_dir
from stages.settings import build_config, non_default
from stages.status import serve_status
from stages.supervisor import Supervisor
from stages.topology import stage_names

BACKLOG = 1024
logger = logging.getLogger(__name__)


def serve(arguments: Mapping[str, Any]) -> int:
    """Run a group until it is stopped; returns 0 after a clean drain."""
    config = build_config(arguments, os.environ)
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format=f"(supervisor pid={os.getpid()}) %(levelname)s %(message)s",
    )
    logger.info("non-default args: %s", non_default(config))
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        listeners = _listen(config, stack)
        port: int = listeners[0].getsockname()[1]
        config = msgspec.structs.replace(config, port=port)
        create_run_dir(run_dir)
        try:
            return asyncio.run(_run(config, listeners))
        finally:
            remove_run_dir(run_dir)


def _listen(config: ServerConfig, stack: ExitStack) -> list[socket.socket]:
    """Bind before anything is loaded: a port in use is told at once.

    Each gateway has a socket of its own on the one port, and the kernel deals the clients among
    them; with one socket for all, whoever wakes first would take a whole burst.
    """
    host, port = config.host, config.port
    listeners: list[socket.socket] = []
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        for _ in range(config.gateways):
            listener = socket.create_server(
                (host, port), family=family, backlog=BACKLOG, reuse_port=config.gateways > 1
            )
            listeners.append(stack.enter_context(listener))
            port = listener.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): pass another --host or --port"
        ) from None
    return listeners


async def _run(config: ServerConfig, listeners: Sequence[socket.socket]) -> int:
    cpus = _cpus_of_stages(config)
    supervisor = Supervisor(config, listeners, lambda seconds: _say_ready(config, seconds), cpus)
    status = await serve_status(config.run_dir, supervisor.state)
    try:
        await supervisor.run()
    except HeadraceError as error:
        logger.error("%s", error)
        return error.exit_code
    finally:
        status.close()
    return 130 if supervisor.was_aborted else 0


def _cpus_of_stages(config: ServerConfig) -> Mapping[str, list[int]]:
    """Where `--cpu-binding` puts each stage; said in the log if the device has a card."""
    if config.cpu_binding == "off" or config.device not in ("npu", "cuda"):
        return UNBOUND
    stages = stage_names(config.gateways)
    binding = bind_cpus(config.device, stages, os.sched_getaffinity(0), Host())
    logger.info("CPU binding: %s", binding.text)
    return binding.cpus


def _say_ready(config: ServerConfig, seconds: float) -> None:
    url = f"http://{config.host}:{config.port}"
    key = " -H 'Authorization: Bearer YOUR-KEY'" if config.api_key else ""
    body = (
        f'{{"model": "{config.served_model_name}", '
        '"messages": [{"role": "user", "content": "What is 12 plus 34?"}]}'
    )
    print(
        f"\nHeadrace serves {config.served_model_name} on {url} (ready in {seconds:.1f} s). Try:\n"
        f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d '{body}'\n",
        flush=True,
    )
