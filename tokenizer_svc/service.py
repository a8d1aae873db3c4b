"""The tokenizer service as its process shell sees it: messages in, messages out, health figures.

Owns the pool; must not know sockets, transformers or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stages.config import ServerConfig
from stages.messages import Message, TokenizerInbound
from tokenizer_svc.pool import WorkerPool


class TokenizerService:
    """`TokenizerStage` in a pool of processes; answers go to `send`, in each request's order.

    `incarnation` only marks recordings, which the workers write.
    """

    def __init__(
        self, config: ServerConfig, send: Callable[[Message], None], incarnation: int = 0
    ) -> None:
        self._send = send
        self._pool = WorkerPool(config, self._send_all, incarnation)

    async def start(self) -> None:
        """Return when all workers have loaded the tokenizer.

        Raises ConfigError for a model folder that cannot work, StageStartError for any other
        failure; `close` must still be called.
        """
        await self._pool.start()

    def submit(self, messages: Sequence[Message]) -> None:
        """Take what has arrived, in order."""
        for message in messages:
            assert isinstance(message, TokenizerInbound)
            self._pool.submit(message)

    async def wait_failed(self) -> None:
        """Wait for the failure that ends the stage: raises it; returns when the service closes."""
        await self._pool.wait_failed()

    async def close(self) -> None:
        """End the workers; open messages stay unanswered."""
        await self._pool.close()

    def queue_len(self) -> int:
        """Messages not yet answered."""
        return self._pool.queue_len()

    def progress(self) -> int:
        """Messages answered since the start."""
        return self._pool.progress()

    def stats(self) -> dict[str, float]:
        """Figures for `/metrics`."""
        return self._pool.stats()

    def _send_all(self, messages: list[Message]) -> None:
        for message in messages:
            self._send(message)
