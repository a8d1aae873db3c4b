"""What a prompt and its parameters must keep to, and the parameters completed by the model's facts.

Pure functions over numbers: no tokenizer, no text but error messages. A refusal is a RequestError
that names the field and the numbers.
"""

from __future__ import annotations

import msgspec
import numpy as np

from stages.columns import Int32Array, i32, i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import SamplingParams

# No token of a usable vocabulary spans more bytes on average over a whole prompt, so a longer text
# cannot fit and is refused before it costs a tokenization.
MAX_BYTES_PER_TOKEN = 16

# Of all bad words of a request together; each is compared with the outputs at every step.
MAX_BAD_WORD_TOKENS = 1024

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


def check_text(text: str, max_model_len: int, param: str) -> None:
    """Refuse a text that is not valid UTF-8, or surely too long for the model."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text is not valid UTF-8: a lone surrogate at character {error.start}.",
            param=param,
        ) from error
    max_bytes = MAX_BYTES_PER_TOKEN * max_model_len
    if num_bytes > max_bytes:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your "
            f"{param} has {num_bytes} bytes of text, more than the {max_bytes} bytes "
            f"({MAX_BYTES_PER_TOKEN} a token) that can fit. Please reduce its length.",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def check_token_ids(token_ids: Int32Array, vocab_size: int, param: str) -> None:
    """Refuse ids that the model has no embedding for."""
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if outside.any():
        token_id = int(token_ids[np.argmax(outside)])
        raise RequestError(
            f"{param} has token id {token_id}, but this model's ids are 0 to {vocab_size - 1}.",
            param=param,
        )


def complete_params(
    params: SamplingParams, num_prompt_tokens: int, config: ServerConfig, param: str
) -> SamplingParams:
    """Put in the true `max_tokens` and all stop ids; refuse what cannot be run.

    `param` names the prompt's field: 'messages' or 'prompt'.
    """
    vocab_size = config.facts.vocab_size
    check_token_ids(i32(params.stop_token_ids), vocab_size, "stop_token_ids")
    check_token_ids(i32(params.logit_bias_ids), vocab_size, "logit_bias")
    check_token_ids(i32(params.bad_word_ids), vocab_size, "bad_words")
    _check_num_bad_word_tokens(len(i32(params.bad_word_ids)))
    max_tokens = _max_tokens(params.max_tokens, num_prompt_tokens, config.max_model_len, param)
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but at most {max_tokens} tokens can be made.",
            param="min_tokens",
        )
    return msgspec.structs.replace(
        params, max_tokens=max_tokens, stop_token_ids=_stop_token_ids(params, config)
    )


def _check_num_bad_word_tokens(num_tokens: int) -> None:
    if num_tokens > MAX_BAD_WORD_TOKENS:
        raise RequestError(
            f"bad_words have {num_tokens} tokens in all, with and without a space before each, but "
            f"at most {MAX_BAD_WORD_TOKENS} are looked for; send fewer or shorter words.",
            param="bad_words",
        )


def _max_tokens(asked: int, num_prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Give the number of tokens to make: what was asked, or all that the context still holds."""
    available = max_model_len - num_prompt_tokens
    # A request that does not say how much it wants needs room for one token.
    needed = max(asked, 1)
    if needed > available:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {num_prompt_tokens + needed} tokens ({num_prompt_tokens} in the {param}, "
            f"{needed} in the completion). Please reduce the length of the {param} or completion.",
            param=param if available < 1 else "max_tokens",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    return asked or available


def _stop_token_ids(params: SamplingParams, config: ServerConfig) -> bytes:
    """Give the user's stop ids and behind them, unless `ignore_eos`, the model's, each once."""
    eos_token_ids = [] if params.ignore_eos else config.facts.eos_token_ids
    return i32_bytes(dict.fromkeys([*i32(params.stop_token_ids).tolist(), *eos_token_ids]))
