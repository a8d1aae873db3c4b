"""What the core hands to HTTP handlers: messages like all others, so that replay can compare them.

The core sends `Delta` instead of `TextOutputs` and `OutputLogprobs`: one piece of one request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from stages.columns import i8, i32, u64
from stages.messages import (
    Detokenized,
    Message,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    TextOutputs,
    Tokenized,
    TokenLogprob,
)


class Delta(Message, frozen=True):
    """What one step gave one request; terminal when `finish_reason` (`FinishReason`) is not 0.

    `token_ids`: int32 bytes. `logprobs`: one entry a token if the request asked for them.
    `stop_reason`: the stop string or stop token id that ended the request, if one did.
    """

    request_id: int
    token_ids: bytes
    text: str
    finish_reason: int = 0
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """How many tokens came."""
        return len(self.token_ids) // 4


Delivery: TypeAlias = (
    RequestStarted | PromptLogprobs | Delta | RequestRejected | Tokenized | Detokenized
)
DELIVERY_TYPES = (RequestStarted, PromptLogprobs, Delta, RequestRejected, Tokenized, Detokenized)


def split(message: TextOutputs) -> Iterator[Delta]:
    """Give each request of a step its own delta, in the step's order; logprobs are not set."""
    request_ids = u64(message.request_ids).tolist()
    num_tokens = i32(message.num_tokens).tolist()
    finish_reasons = i8(message.finish_reasons).tolist()
    stop_reasons = iter(message.stop_reasons)
    # One list for all: a list a delta would set the garbage collector off in every few steps.
    no_logprobs: list[TokenLogprob] = []
    start = 0
    for request_id, count, text, finish_reason in zip(
        request_ids, num_tokens, message.deltas, finish_reasons, strict=True
    ):
        end = start + 4 * count
        token_ids = message.token_ids[start:end]
        stop_reason = next(stop_reasons) if finish_reason else None
        yield Delta(request_id, token_ids, text, finish_reason, stop_reason, no_logprobs)
        start = end


def is_terminal(delivery: Delivery) -> bool:
    """Say whether nothing follows for this request."""
    if isinstance(delivery, Delta):
        return delivery.finish_reason != 0
    return isinstance(delivery, RequestRejected | Tokenized | Detokenized)
