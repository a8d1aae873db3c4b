"""The tokenizer's process: a pool of workers between two channels."""

from __future__ import annotations

import asyncio

import uvloop

from stages.async_shell import AsyncShell
from stages.config import ServerConfig
from stages.launch import StageContext
from stages.messages import (
    AbortRequest,
    Detokenized,
    Message,
    RequestRejected,
    Tokenized,
    TokenizedRequest,
    TokenizerInbound,
    ToStage,
)
from stages.stage import Stage
from stages.topology import GATEWAY, SCHEDULER
from tokenizer_svc.service import TokenizerService

TO_STAGE: dict[type[Message], str] = {
    TokenizedRequest: SCHEDULER,
    AbortRequest: SCHEDULER,
    RequestRejected: GATEWAY,
    Tokenized: GATEWAY,
    Detokenized: GATEWAY,
}


def make_core(config: ServerConfig, incarnation: int) -> Stage:
    """Build the pure stage, which runs in the workers."""
    from tokenizer_svc.stage import TokenizerStage

    return TokenizerStage(config)


def main(context: StageContext) -> None:
    """Run until told to stop."""
    uvloop.run(_run(context))


async def _run(context: StageContext) -> None:
    shell: AsyncShell

    def on_messages(messages: list[Message]) -> None:
        service.submit(messages)

    def on_control(message: ToStage) -> None:
        """The tokenizer holds no state of an epoch: nothing of this concerns it."""

    service = TokenizerService(context.config, lambda m: shell.send(m), context.incarnation)
    try:
        await service.start()
        shell = AsyncShell(context, TokenizerInbound, TO_STAGE, on_messages, on_control)
        failure = asyncio.create_task(service.wait_failed())
        failure.add_done_callback(lambda task: _pass_on(task, shell))
        await shell.run(service)
    finally:
        await service.close()


def _pass_on(task: asyncio.Task[None], shell: AsyncShell) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        shell.fail(error)
