"""What a request may say: each field with its type, its range and the words for a refusal.

This table is the one validator of all endpoints; `check.py` adds what a single field cannot tell.
`None` always means "not given". Fields that are not here are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from gateway_svc import limits

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def _between(low: float, high: float, kind: str = "a number") -> Meta:
    return Meta(ge=low, le=high, description=f"{kind} from {low} to {high}")


def _above_0_to(high: float) -> Meta:
    return Meta(gt=0, le=high, description=f"a number above 0 and at most {high}")


def _at_least(low: int, text: str) -> Meta:
    return Meta(ge=low, le=INT32_MAX, description=text)


def _at_most(count: int, text: str) -> Meta:
    return Meta(max_length=count, description=text.format(count))


def _chars(low: int, high: int) -> Meta:
    return Meta(min_length=low, max_length=high, description=f"a string of {low} to {high} chars")


Text: TypeAlias = Annotated[str, Meta(description="a string")]
Flag: TypeAlias = Annotated[bool, Meta(description="true or false")]
ModelName: TypeAlias = Annotated[str, Meta(description="the name of the served model")]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=INT32_MAX)]
LogprobCount: TypeAlias = Annotated[int, _between(0, limits.MAX_LOGPROBS, "an integer")]
Penalty: TypeAlias = Annotated[float, _between(-2, 2)]

StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=limits.MAX_STOP_STRING_CHARS)]
StopStrings: TypeAlias = Annotated[list[StopString], Meta(max_length=limits.MAX_STOP_STRINGS)]
STOP_TEXT = (
    f"a string or at most {limits.MAX_STOP_STRINGS} strings, each of 1 to "
    f"{limits.MAX_STOP_STRING_CHARS} characters"
)
Stop: TypeAlias = Annotated[StopString | StopStrings, Meta(description=STOP_TEXT)]
StopTokenIds: TypeAlias = Annotated[
    list[TokenId], _at_most(limits.MAX_STOP_TOKEN_IDS, "a list of at most {} token ids")
]
Bias: TypeAlias = Annotated[float, Meta(ge=-limits.MAX_BIAS, le=limits.MAX_BIAS)]
LogitBias: TypeAlias = Annotated[
    dict[str, Bias],
    _at_most(
        limits.MAX_LOGIT_BIAS,
        f"an object of at most {{}} token ids, each with a number up to ±{limits.MAX_BIAS}",
    ),
]
BadWord: TypeAlias = Annotated[str, Meta(min_length=1, max_length=limits.MAX_BAD_WORD_CHARS)]
BadWords: TypeAlias = Annotated[
    list[BadWord],
    _at_most(
        limits.MAX_BAD_WORDS,
        f"a list of at most {{}} strings, each of 1 to {limits.MAX_BAD_WORD_CHARS} characters",
    ),
]
TemplateInt: TypeAlias = Annotated[int, Meta(ge=-INT64_MAX, le=INT64_MAX)]
TemplateText: TypeAlias = Annotated[str, Meta(max_length=limits.MAX_TEMPLATE_VALUE_CHARS)]
TemplateKwargs: TypeAlias = Annotated[
    dict[str, bool | TemplateInt | float | TemplateText],
    _at_most(
        limits.MAX_TEMPLATE_KWARGS, "an object of at most {} numbers, booleans and short strings"
    ),
]


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`response_format`, as far as it is read."""

    type: str


class ContentPart(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None


class ChatTurn(msgspec.Struct):
    """One entry of `messages`."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


Turns: TypeAlias = Annotated[
    list[ChatTurn], Meta(min_length=1, description="a list of messages, each with role and content")
]


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: ModelName
    n: Annotated[int, _between(1, limits.MAX_N, "an integer")] | None = None
    temperature: Annotated[float, _between(0, 2)] | None = None
    top_p: Annotated[float, _above_0_to(1)] | None = None
    top_k: Annotated[int, _at_least(-1, "an integer; 0 or -1 keeps all tokens")] | None = None
    min_p: Annotated[float, _between(0, 1)] | None = None
    seed: (
        Annotated[int, Meta(ge=-INT64_MAX, le=INT64_MAX, description="a 64-bit integer")] | None
    ) = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    min_tokens: Annotated[int, _at_least(0, "an integer, 0 or more")] | None = None
    ignore_eos: Flag | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, _above_0_to(100)] | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    skip_special_tokens: Flag | None = None
    priority: Annotated[int, _between(-INT32_MAX, INT32_MAX, "an integer")] | None = None
    cache_salt: Annotated[str, _chars(1, limits.MAX_CACHE_SALT_CHARS)] | None = None
    user: Text | None = None
    stream: Flag | None = None
    stream_options: Annotated[StreamOptions, Meta(description="an object")] | None = None
    response_format: Annotated[ResponseFormat, Meta(description='{"type": "text"}')] | None = None

    # Known, not supported: ignoring these would give another answer than the one asked for.
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    allowed_token_ids: Any = None
    use_beam_search: Any = None


class ChatFields(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Turns
    max_tokens: Annotated[int, _at_least(1, "an integer, 1 or more")] | None = None
    max_completion_tokens: Annotated[int, _at_least(1, "an integer, 1 or more")] | None = None
    logprobs: Flag | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    tools: Any = None
    functions: Any = None
    chat_template: Any = None


class CompletionFields(SamplingFields, kw_only=True):
    """The body of POST /v1/completions; `prompt` has four shapes, which `prompts.py` reads."""

    prompt: msgspec.Raw
    max_tokens: Annotated[int, _at_least(0, "an integer, 0 or more")] | None = None
    logprobs: LogprobCount | None = None
    echo: Flag | None = None
    add_special_tokens: Flag | None = None
    best_of: Annotated[int, _between(1, limits.MAX_N, "an integer")] | None = None

    suffix: Any = None
    prompt_embeds: Any = None


class TokenizeFields(msgspec.Struct, kw_only=True):
    """The body of POST /tokenize: `prompt` or `messages`."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Turns | None = None
    add_special_tokens: Flag | None = None
    return_token_strs: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    tools: Any = None
    chat_template: Any = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Meta(description="a list of token ids")]
