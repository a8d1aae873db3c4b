"""Log-probabilities in OpenAI's two shapes: chat's and the older one of text completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stages.messages import TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class ChatTop(msgspec.Struct, frozen=True):
    """One alternative."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True):
    """One token of a chat completion."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a chat completion."""

    content: list[ChatToken]


class TextLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a text completion: parallel lists, one entry a token.

    The first token of a prompt has no logprob and no alternatives.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def finite(logprob: float) -> float:
    """Clamp to what JSON can say; NaN becomes the minimum."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Word the tokens of a chat completion."""
    return ChatLogprobs(
        [
            ChatToken(
                token.token,
                finite(token.logprob),
                list(token.token_bytes),
                [ChatTop(t.token, finite(t.logprob), list(t.token_bytes)) for t in token.top],
            )
            for token in tokens
        ]
    )


def text_logprobs(
    prompt: Sequence[TokenLogprob], output: Sequence[TokenLogprob], offset: int
) -> TextLogprobs:
    """Word the tokens of a text completion whose first token begins at character `offset`."""
    result = TextLogprobs([], [], [], [])
    for position, token in enumerate((*prompt, *output)):
        is_first = bool(prompt) and position == 0
        result.tokens.append(token.token)
        result.token_logprobs.append(None if is_first else finite(token.logprob))
        result.top_logprobs.append(None if is_first else _alternatives(token))
        result.text_offset.append(offset)
        offset += len(token.token)
    return result


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    """Map text → logprob, the chosen token among them.

    Parts of characters may have the same text; the likeliest of them stays.
    """
    alternatives = {top.token: finite(top.logprob) for top in reversed(token.top)}
    alternatives.setdefault(token.token, finite(token.logprob))
    return alternatives
