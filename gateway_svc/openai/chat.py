"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from gateway_svc.body import read_body
from gateway_svc.gateway import Gateway
from gateway_svc.openai.check import check_chat, check_max_tokens, check_sampling
from gateway_svc.openai.decode import BodyDecoder
from gateway_svc.openai.fields import ChatFields, StreamOptions
from gateway_svc.openai.generation import Job, make_job, respond
from gateway_svc.openai.logprobs import ChatLogprobs, chat_logprobs
from gateway_svc.openai.outputs import Output, Usage
from gateway_svc.openai.prompts import chat_prompt
from gateway_svc.openai.sampling import draft_requests, sampling_params
from gateway_svc.sse import HOLE


class ReplyMessage(msgspec.Struct, frozen=True):
    """The answer's text."""

    content: str
    role: str = "assistant"
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """One answer. `stop_reason`: the stop string or token id that ended it (vLLM's field)."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The whole answer."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: None = None


class ReplyDelta(msgspec.Struct, frozen=True):
    """What is new: the role once, then text."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """What is new of one answer."""

    index: int
    delta: ReplyDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One event of a stream. `usage` is null in all but the last if the client asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: None = None


class ChatWording:
    """Words one chat completion."""

    def __init__(self, fields: ChatFields) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = fields.model
        self._has_logprobs = bool(fields.logprobs)
        options = fields.stream_options or StreamOptions()
        self._no_usage: UnsetType | None = None if options.include_usage else UNSET
        self._with_role: set[int] = set()

    def whole(self, choices: Sequence[Output], usage: Usage) -> ChatCompletion:
        """As `Wording.whole`."""
        return ChatCompletion(
            self._id, self._created, self._model, list(map(self._choice, choices)), usage
        )

    def chunks(self, output: Output, usage: Usage | None) -> list[msgspec.Struct]:
        """As `Wording.chunks`; the role goes ahead of a choice's first token."""
        if not output.has_news:
            return []
        text, logprobs = output.take()
        chunks: list[msgspec.Struct] = []
        if output.index not in self._with_role:
            self._with_role.add(output.index)
            chunks.append(
                self._chunk(ChunkChoice(output.index, ReplyDelta("assistant", "")), usage)
            )
        choice = ChunkChoice(
            output.index,
            ReplyDelta(content=text),
            chat_logprobs(logprobs) if self._has_logprobs else None,
            output.finish_word,
            output.stop_reason if output.finish_reason else UNSET,
        )
        chunks.append(self._chunk(choice, usage))
        return chunks

    def text_chunk(self, index: int) -> ChatChunk | None:
        """As `Wording.text_chunk`."""
        if self._has_logprobs or index not in self._with_role:
            return None
        return self._chunk(ChunkChoice(index, ReplyDelta(content=HOLE)), None)

    def last_chunk(self, usage: Usage) -> ChatChunk:
        """As `Wording.last_chunk`."""
        return ChatChunk(self._id, self._created, self._model, [], usage)

    def _chunk(self, choice: ChunkChoice, usage: Usage | None) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._model, [choice], usage or self._no_usage)

    def _choice(self, output: Output) -> Choice:
        text, logprobs = output.take()
        return Choice(
            output.index,
            ReplyMessage(text),
            chat_logprobs(logprobs) if self._has_logprobs else None,
            output.finish_word,
            output.stop_reason,
        )


class ChatEndpoint:
    """Parses, checks, runs and answers chat completions."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._decoder = BodyDecoder(ChatFields)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request."""
        fields = self._decoder.decode(await read_body(request))
        return await respond(request, self._gateway, self._job(fields))

    def _job(self, fields: ChatFields) -> Job:
        config = self._gateway.config
        check_max_tokens(fields.max_completion_tokens, "max_completion_tokens", config)
        check_max_tokens(fields.max_tokens, "max_tokens", config)
        # 0: all that the context holds.
        max_tokens = fields.max_completion_tokens or fields.max_tokens or 0
        check_sampling(fields, max_tokens or config.max_model_len, config)
        check_chat(fields)
        params = sampling_params(
            fields,
            config,
            max_tokens=max_tokens,
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else -1,
        )
        prompt = chat_prompt(fields, config.max_model_len)
        requests = draft_requests([prompt], fields, params, self._gateway.core.capacity)
        return make_job(requests, fields, ChatWording(fields), counts_output=True)
