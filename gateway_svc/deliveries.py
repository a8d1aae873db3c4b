"""What the core hands to HTTP handlers: messages like all others, so that replay can compare them.

The core sends `Delta` instead of `TextOutputs` and `OutputLogprobs`: one piece of one request.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stages.messages import (
    Detokenized,
    Message,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    Tokenized,
    TokenLogprob,
)


class Delta(Message, frozen=True):
    """What one or more steps gave one request; terminal if `finish_reason` is not 0.

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


def is_terminal(delivery: Delivery) -> bool:
    """Say whether nothing follows for this request."""
    if isinstance(delivery, Delta):
        return delivery.finish_reason != 0
    return isinstance(delivery, RequestRejected | Tokenized | Detokenized)
