"""From the fields that hold a prompt to `Prompt` messages: text, conversation, or token ids."""

from __future__ import annotations

import re
from typing import Annotated, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from gateway_svc.limits import MAX_PROMPT_BYTES_PER_TOKEN, MAX_PROMPTS
from gateway_svc.openai.decode import reason_code
from gateway_svc.openai.fields import ChatFields, ChatTurn, TokenizeFields
from stages.columns import i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt

T = TypeVar("T")

_HEAD = re.compile(rb"\s*([\[\"])\s*([\[\"]?)")
TOO_LONG = "context_length_exceeded"
PROMPT_SHAPES = (
    f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} strings or lists of ids"
)
# Most templates know no "developer"; it is OpenAI's newer word for "system".
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class PromptDecoder:
    """Reads the `prompt` of a text completion, whose shape shows in its first characters."""

    def __init__(self, config: ServerConfig) -> None:
        self._max_model_len = config.max_model_len
        token_id = Annotated[int, Meta(ge=0, lt=config.facts.vocab_size)]
        some = Meta(min_length=1)
        up_to_limit = Meta(min_length=1, max_length=MAX_PROMPTS)
        self._text = msgspec.json.Decoder(str)
        self._texts = msgspec.json.Decoder(Annotated[list[str], up_to_limit])
        self._ids = msgspec.json.Decoder(Annotated[list[token_id], some])
        self._id_lists = msgspec.json.Decoder(
            Annotated[list[Annotated[list[token_id], some]], up_to_limit]
        )

    def decode(self, raw: bytes, *, add_special_tokens: bool) -> list[Prompt]:
        """Give one prompt for each text or list of ids; raises RequestError."""
        head = _HEAD.match(raw)
        shape = b"".join(head.groups()) if head else b""
        if shape.startswith(b'"'):
            return [self._text_prompt(_decode(self._text, raw), add_special_tokens)]
        if shape == b'["':
            texts = _decode(self._texts, raw)
            return [self._text_prompt(text, add_special_tokens) for text in texts]
        if shape == b"[[":
            return [self._token_prompt(ids) for ids in _decode(self._id_lists, raw)]
        return [self._token_prompt(_decode(self._ids, raw))]

    def _text_prompt(self, text: str, add_special_tokens: bool) -> TextPrompt:
        check_length([text], self._max_model_len, "prompt")
        return TextPrompt(text, add_special_tokens)

    def _token_prompt(self, token_ids: list[int]) -> TokenPrompt:
        if len(token_ids) >= self._max_model_len:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, but prompt and completion together may have "
                f"at most {self._max_model_len}; shorten the prompt",
                param="prompt",
                code=TOO_LONG,
            )
        return TokenPrompt(i32_bytes(token_ids))


def chat_prompt(fields: ChatFields | TokenizeFields, max_model_len: int) -> ChatPrompt:
    """Give the conversation of a request that has `messages`; raises RequestError."""
    assert fields.messages is not None
    messages = [_chat_message(turn, index) for index, turn in enumerate(fields.messages)]
    check_length([message.content for message in messages], max_model_len, "messages")
    is_continued = bool(fields.continue_final_message)
    if is_continued and fields.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    add_generation_prompt = fields.add_generation_prompt
    return ChatPrompt(
        messages,
        not is_continued if add_generation_prompt is None else add_generation_prompt,
        is_continued,
        fields.chat_template_kwargs or {},
    )


def check_length(texts: list[str], max_model_len: int, param: str) -> None:
    """Refuse a text that cannot fit, before anything is spent on tokenizing it."""
    num_bytes = sum(len(text.encode()) for text in texts)
    max_bytes = MAX_PROMPT_BYTES_PER_TOKEN * max_model_len
    if num_bytes > max_bytes:
        raise RequestError(
            f"{param} has {num_bytes} bytes of text, more than {max_model_len} tokens can hold "
            f"({max_bytes}); shorten it",
            param=param,
            code=TOO_LONG,
        )


def _decode(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        reason = str(error)
        raise RequestError(
            f"prompt must be {PROMPT_SHAPES}: {reason}", param="prompt", code=reason_code(reason)
        ) from None


def _chat_message(turn: ChatTurn, index: int) -> ChatMessage:
    role = ROLES.get(turn.role)
    if role is None:
        _refuse(index, f"role {turn.role!r} is not one of {', '.join(ROLES)}", "invalid_value")
    if turn.tool_calls:
        _refuse(index, "tool_calls are not supported yet", "unsupported_value")
    return ChatMessage(role, _content(turn, index), turn.name or "")


def _content(turn: ChatTurn, index: int) -> str:
    if isinstance(turn.content, str):
        return turn.content
    if turn.content is None:
        _refuse(index, "content is missing; give a string", "missing_required_parameter")
    texts = []
    for part in turn.content:
        if part.type != "text":
            _refuse(index, f"content of type {part.type!r} is not supported", "unsupported_value")
        if part.text is None:
            _refuse(index, "a text part has no text", "missing_required_parameter")
        texts.append(part.text)
    return "\n".join(texts)


def _refuse(index: int, reason: str, code: str) -> NoReturn:
    raise RequestError(f"messages[{index}]: {reason}", param="messages", code=code)
