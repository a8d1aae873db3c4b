"""One request: what is known about it whether it has a row or not."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from scheduler_svc.lag import LagReason
from stages.columns import Int32Array, i32
from stages.errors import RequestError
from stages.finish import finish_reasons
from stages.messages import FinishReason, SamplingParams, TokenizedRequest

NO_ROW = -1
_PRIORITY_LIMIT = 2**31 - 1


@dataclass(slots=True, eq=False)
class Request:
    """A request that has not ended.

    token_ids: the prompt and behind it the outputs so far, int32 [n]; as long as the request has
    a row, the row's tokens are the true ones. arrival: a running number. is_protected: it has
    been preempted as often as allowed, so it is admitted only with its whole length reserved.
    lag_reason: whether its steps wait for its last token, and why.
    num_cached_tokens: of the first admission, -1 before. block_keys: see `prefix_cache`; the
    first `num_published_blocks` of the blocks in its row are findable.
    """

    request_id: int
    params: SamplingParams
    token_ids: Int32Array
    num_prompt_tokens: int
    stop_token_ids: Int32Array
    priority: int
    arrival: int
    cache_salt: str
    row: int = NO_ROW
    num_preemptions: int = 0
    is_protected: bool = False
    lag_reason: LagReason = LagReason.NONE
    num_cached_tokens: int = -1
    block_keys: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Outputs in `token_ids`."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that can ever need KV: all but the last, which is never an input."""
        return self.num_prompt_tokens + self.params.max_tokens - 1

    def finish_reason(self) -> FinishReason:
        """Why the outputs so far end the request already (0: they do not)."""
        if not self.num_output_tokens:
            return FinishReason.NOT_FINISHED
        reasons = finish_reasons(
            self.token_ids[-1:],
            np.array([self.num_output_tokens], dtype=np.int32),
            np.array([self.params.max_tokens], dtype=np.int32),
            self.stop_token_ids[None, :],
        )
        return FinishReason(int(reasons[0]))


def read_request(
    message: TokenizedRequest, arrival: int, max_model_len: int, num_slots: int
) -> Request:
    """Make a request of its message, `max_tokens` cut to what the context holds.

    `num_slots`: tokens that fit in the whole KV cache. Raises `RequestError` for a request that
    can never run.
    """
    num_prompt = len(message.prompt_token_ids) // 4
    params = _limit_max_tokens(message.params, num_prompt, max_model_len)
    request = Request(
        request_id=message.request_id,
        params=params,
        token_ids=i32(message.prompt_token_ids + message.output_token_ids),
        num_prompt_tokens=num_prompt,
        stop_token_ids=i32(params.stop_token_ids),
        priority=max(-_PRIORITY_LIMIT, min(message.priority, _PRIORITY_LIMIT)),
        arrival=arrival,
        cache_salt=message.cache_salt,
    )
    if request.max_kv_tokens > num_slots:
        raise RequestError(
            f"the prompt ({num_prompt} tokens) and max_tokens ({params.max_tokens}) need "
            f"{request.max_kv_tokens} tokens of KV cache, but it holds {num_slots}; shorten the "
            "prompt, lower max_tokens or start the server with a larger --kv-cache-memory",
            code="context_length_exceeded",
        )
    return request


def _limit_max_tokens(
    params: SamplingParams, num_prompt: int, max_model_len: int
) -> SamplingParams:
    """Cut `max_tokens` to the room behind the prompt; executor and sampler get the cut value."""
    room = max_model_len - num_prompt
    if num_prompt == 0:
        raise RequestError("the prompt has no tokens; send at least one", code="empty_prompt")
    if room < 1:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and leaves no room for an output in a context of "
            f"{max_model_len}; shorten the prompt or start the server with a larger "
            "--max-model-len",
            code="context_length_exceeded",
        )
    if 0 < params.max_tokens <= room:
        return params
    return msgspec.structs.replace(params, max_tokens=room)
