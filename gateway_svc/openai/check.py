"""What one field cannot tell alone: fields against each other and against the model."""

from __future__ import annotations

from gateway_svc.openai.fields import ChatFields, CompletionFields, SamplingFields, TokenizeFields
from stages.config import ServerConfig
from stages.errors import RequestError

UNSUPPORTED = (
    "tools",
    "functions",
    "chat_template",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "allowed_token_ids",
    "use_beam_search",
    "suffix",
    "prompt_embeds",
)
DIGITS_OF_INT32 = 10


def check_model(model: str | None, config: ServerConfig) -> None:
    """Refuse a model that is not the served one with 404."""
    if model is not None and model != config.served_model_name:
        raise RequestError(
            f"the model {model!r} does not exist; this server has {config.served_model_name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_unsupported(fields: SamplingFields | TokenizeFields) -> None:
    """Refuse what would change the answer and is not built yet; empty values ask for nothing."""
    for name in UNSUPPORTED:
        if getattr(fields, name, None):
            raise RequestError(
                f"{name} is not supported yet; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def check_sampling(fields: SamplingFields, max_tokens: int, config: ServerConfig) -> None:
    """Check what both completions share; `max_tokens`: the most that can be generated."""
    check_model(fields.model, config)
    check_unsupported(fields)
    if (fields.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens is {fields.min_tokens}, but at most {max_tokens} tokens are generated; "
            "lower min_tokens or raise max_tokens",
            param="min_tokens",
        )
    if fields.response_format is not None and fields.response_format.type != "text":
        raise RequestError(
            f"response_format of type {fields.response_format.type!r} is not supported yet; "
            'use {"type": "text"}',
            param="response_format",
            code="unsupported_value",
        )
    if fields.stream_options is not None and not fields.stream:
        raise RequestError(
            "stream_options needs stream to be true; set it or leave stream_options out",
            param="stream_options",
        )
    check_token_ids(fields.stop_token_ids or [], "stop_token_ids", config)
    check_bad_words(fields.bad_words or [])


def check_max_tokens(max_tokens: int | None, param: str, config: ServerConfig) -> None:
    """Refuse to promise more tokens than the context holds."""
    if max_tokens is not None and max_tokens > config.max_model_len:
        raise RequestError(
            f"{param} is {max_tokens}, but this model's context holds {config.max_model_len} "
            f"tokens, prompt and completion together; lower {param}",
            param=param,
        )


def check_chat(fields: ChatFields) -> None:
    """Check what only chat completions have."""
    if fields.top_logprobs and not fields.logprobs:
        raise RequestError(
            "top_logprobs needs logprobs to be true; set it or leave top_logprobs out",
            param="top_logprobs",
        )


def check_completion(fields: CompletionFields) -> None:
    """Check what only text completions have."""
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise RequestError(
            "best_of other than n is not supported; leave it out",
            param="best_of",
            code="unsupported_value",
        )


def check_token_ids(token_ids: list[int], param: str, config: ServerConfig) -> None:
    """Refuse ids that the model does not have."""
    vocab_size = config.facts.vocab_size
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise RequestError(
                f"{param} has token id {token_id}; the model's ids are 0 to {vocab_size - 1}",
                param=param,
            )


def check_bad_words(words: list[str]) -> None:
    """Refuse words of which nothing is left: white space before a word is not part of it."""
    for word in words:
        if not word.strip():
            raise RequestError(
                f"bad_words has {word!r}, which is white space alone; leave it out, or give its "
                "token ids a bias of -100 in logit_bias",
                param="bad_words",
            )


def logit_bias_ids(fields: SamplingFields, config: ServerConfig) -> list[int]:
    """Read the keys of `logit_bias`, which JSON only has as strings; raises RequestError."""
    token_ids = []
    for key in fields.logit_bias or {}:
        if not (key.isascii() and key.isdigit() and len(key) <= DIGITS_OF_INT32):
            raise RequestError(
                f"logit_bias has the key {key[:32]!r}, which is not a token id", param="logit_bias"
            )
        token_ids.append(int(key))
    check_token_ids(token_ids, "logit_bias", config)
    return token_ids
