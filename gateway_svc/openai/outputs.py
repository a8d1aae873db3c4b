"""One choice as it grows: what has come for it, and what of that has not been told yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from gateway_svc.deliveries import Delivery, Delta
from gateway_svc.inbox import Inbox
from stages.errors import RequestError
from stages.messages import (
    FinishReason,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    TokenLogprob,
)


@dataclass(slots=True)
class Output:
    """One choice. `take` empties `_texts` and `_logprobs`, which is what streaming does.

    `prompt_logprobs`: of the prompt's tokens; the first has rank 0.
    """

    index: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_text: str = ""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    stop_reason: str | int | None = None
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def finish_word(self) -> str | None:
        """OpenAI's word for why it ended; None while it has not."""
        return self.finish_reason.name.lower() if self.finish_reason else None

    @property
    def has_news(self) -> bool:
        """There is something to tell the client: text, logprobs, or the end."""
        return bool(self.finish_reason or self._logprobs or any(self._texts))

    def add(self, delivery: Delivery) -> None:
        """Take a delivery; raises `RequestError` if the request ends in an error."""
        if isinstance(delivery, Delta):
            self._extend(delivery)
        elif isinstance(delivery, RequestStarted):
            self.num_prompt_tokens = delivery.num_prompt_tokens
            self.num_cached_tokens = delivery.num_cached_tokens
            self.prompt_text = delivery.prompt_text
        elif isinstance(delivery, PromptLogprobs):
            self.prompt_logprobs = delivery.tokens
        elif isinstance(delivery, RequestRejected):
            raise RequestError(
                delivery.message,
                param=delivery.param,
                code=delivery.code,
                status=delivery.status,
            )

    def take(self) -> tuple[str, list[TokenLogprob]]:
        """Give text and logprobs that have come since the last call."""
        piece = "".join(self._texts), self._logprobs
        self._texts, self._logprobs = [], []
        return piece

    def _extend(self, delta: Delta) -> None:
        if delta.finish_reason == FinishReason.ERROR:
            raise RequestError(
                "the server failed on this request; send it again",
                code="generation_failed",
                status=500,
            )
        self.num_tokens += delta.num_tokens
        self._texts.append(delta.text)
        self._logprobs += delta.logprobs
        self.finish_reason = FinishReason(delta.finish_reason)
        self.stop_reason = delta.stop_reason


class Outputs:
    """All choices of one HTTP request."""

    def __init__(self, inbox: Inbox) -> None:
        self.choices = [Output(index) for index in range(len(inbox.request_ids))]
        self._inbox = inbox
        self._num_unfinished = len(self.choices)

    @property
    def are_finished(self) -> bool:
        """Every choice has ended."""
        return self._num_unfinished == 0

    def of(self, delivery: Delivery) -> Output:
        """Give the choice that a delivery is about."""
        return self.choices[self._inbox.index(delivery)]

    async def advance(self) -> list[Output]:
        """Wait for deliveries; give the choices that got some, in the order of arrival.

        What has piled up for a choice becomes one piece. Raises `RequestError`, `SlowClient`.
        """
        touched: dict[int, Output] = {}
        for delivery in await self._inbox.take():
            output = self.of(delivery)
            output.add(delivery)
            self._num_unfinished -= bool(output.finish_reason)
            touched[output.index] = output
        return list(touched.values())


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many prompt tokens the prefix cache had."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """`usage`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(choices: Sequence[Output], n: int, *, counts_output: bool = True) -> Usage:
    """Count tokens: each prompt once, however many choices it has (n a prompt), and all outputs."""
    firsts = choices[::n]
    return _usage(
        sum(choice.num_prompt_tokens for choice in firsts),
        sum(choice.num_cached_tokens for choice in firsts),
        _count_tokens(choices) if counts_output else 0,
    )


def _count_tokens(choices: Iterable[Output]) -> int:
    return sum(choice.num_tokens for choice in choices)


def _usage(num_prompt: int, num_cached: int, num_output: int) -> Usage:
    return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached))
