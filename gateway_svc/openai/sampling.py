"""From fields to `SamplingParams` and to the requests that one body asks for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from gateway_svc.limits import MAX_CHOICES
from gateway_svc.openai.check import logit_bias_ids
from gateway_svc.openai.fields import SamplingFields
from stages.columns import f32_bytes, i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import Generate, Prompt, SamplingParams

SEED_BITS = 63
MAX_SEED = (1 << SEED_BITS) - 1


def sampling_params(
    fields: SamplingFields,
    config: ServerConfig,
    *,
    max_tokens: int,
    logprobs: int,
    prompt_logprobs: int = -1,
    echo: bool = False,
) -> SamplingParams:
    """Complete the fields: request, else the model's own defaults, else OpenAI's. No seed yet."""
    defaults = config.facts.default_sampling

    def pick(value: float | None, name: str, default: float) -> float:
        return defaults.get(name, default) if value is None else value

    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        temperature=float(pick(fields.temperature, "temperature", 1.0)),
        top_p=float(pick(fields.top_p, "top_p", 1.0)),
        top_k=max(int(pick(fields.top_k, "top_k", 0)), 0),
        min_p=float(pick(fields.min_p, "min_p", 0.0)),
        repetition_penalty=float(pick(fields.repetition_penalty, "repetition_penalty", 1.0)),
        frequency_penalty=float(fields.frequency_penalty or 0.0),
        presence_penalty=float(fields.presence_penalty or 0.0),
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=stop,
        stop_token_ids=i32_bytes(fields.stop_token_ids or []),
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        logit_bias_ids=i32_bytes(logit_bias_ids(fields, config)),
        logit_bias_values=f32_bytes((fields.logit_bias or {}).values()),
        echo=echo,
        bad_words=fields.bad_words or [],
    )


def draft_requests(
    prompts: Sequence[Prompt], fields: SamplingFields, params: SamplingParams, capacity: int
) -> list[Generate]:
    """Make n requests a prompt, in the order of their choices; ids and epoch are not yet set.

    `capacity`: how many requests the server can have open at all.
    """
    n = fields.n or 1
    count = n * len(prompts)
    most = min(MAX_CHOICES, capacity)
    if count > most:
        raise RequestError(
            f"n times the number of prompts is {count}, but at most {most} choices are made for "
            "one request; send several requests",
            param="n",
        )
    arrival_ns = time.time_ns()
    return [
        Generate(
            request_id=0,
            epoch=0,
            prompt=prompt,
            params=msgspec.structs.replace(
                params, seed=_seed(fields.seed, index), is_seed_drawn=fields.seed is None
            ),
            priority=fields.priority or 0,
            cache_salt=fields.cache_salt or "",
            arrival_ns=arrival_ns,
        )
        for prompt in prompts
        for index in range(n)
    ]


def _seed(seed: int | None, index: int) -> int:
    """Give choice `index` its own seed of 63 bits, or draw one where the client brings none."""
    if seed is None:
        return secrets.randbits(SEED_BITS)
    return (seed + index) & MAX_SEED
