"""The gateway's process: HTTP on the group's listener, channels to tokenizer and supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvloop
from aiohttp import web

from gateway_svc.app import make_app
from gateway_svc.gateway import Gateway
from gateway_svc.sessions import GatewayStage
from stages.async_shell import AsyncShell
from stages.config import ServerConfig
from stages.launch import StageContext
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    Detokenize,
    Drain,
    Drained,
    GatewayInbound,
    Generate,
    GroupState,
    Message,
    ResendUnanswered,
    Tokenize,
    ToStage,
)
from stages.recorder import maybe_recorded
from stages.stage import Stage
from stages.topology import TOKENIZER, gateway_index

TO_STAGE: dict[type[Message], str] = dict.fromkeys(
    (Generate, AbortRequest, Tokenize, Detokenize), TOKENIZER
)
# Once drained there is nothing left to wait for but the last bytes of an answer.
SHUTDOWN_TIMEOUT_S = 2.0


def make_core(config: ServerConfig, incarnation: int) -> Stage:
    """Build the pure stage."""
    return GatewayStage(config, incarnation)


def main(context: StageContext) -> None:
    """Run until told to stop."""
    uvloop.run(_run(context))


async def _run(context: StageContext) -> None:
    config = context.config
    core = GatewayStage(config, context.incarnation, gateway_index(context.stage))
    recorded = maybe_recorded(
        core, config.record, context.stage, context.incarnation, context.config_bytes
    )
    shell: AsyncShell

    def send(message: Message) -> None:
        if isinstance(message, Drained):
            shell.tell_supervisor(message)
        else:
            shell.send(message)

    def call_later(delay_s: float, call: Callable[[], None]) -> None:
        shell.call_later(delay_s, call)

    def on_control(message: ToStage) -> None:
        _obey(gateway, shell, message)
        if isinstance(message, BeginEpoch):
            has_epoch.set()

    has_epoch = asyncio.Event()
    gateway = Gateway(config, core, send, call_later, recorded=recorded)
    shell = AsyncShell(context, GatewayInbound, TO_STAGE, gateway.on_messages, on_control)
    runner = web.AppRunner(
        make_app(config, gateway),
        handler_cancellation=True,  # off by default: a client that left would go unnoticed
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        access_log=None,
    )
    await runner.setup()
    listening = asyncio.create_task(_listen(context, runner, has_epoch))
    try:
        await shell.run(gateway)
    finally:
        listening.cancel()
        await runner.cleanup()


async def _listen(context: StageContext, runner: web.AppRunner, has_epoch: asyncio.Event) -> None:
    """Accept clients: the first gateway at once, so that probes are answered while models load.

    One that takes another's place leaves them in the kernel's queue until it can serve them.
    """
    if context.incarnation > 1:
        await has_epoch.wait()
    assert context.listener is not None
    await web.SockSite(runner, context.listener).start()


def _obey(gateway: Gateway, shell: AsyncShell, message: ToStage) -> None:
    match message:
        case BeginEpoch():
            gateway.begin_epoch(message)
        case ResendUnanswered():
            shell.forget(TOKENIZER)
            gateway.resend_unanswered()
        case GroupState():
            gateway.on_group_state(message)
        case Drain():
            gateway.drain(message)
        case _:
            raise AssertionError(f"the gateway takes no {type(message).__name__}")
