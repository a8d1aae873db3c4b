"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway_svc.body import read_body
from gateway_svc.gateway import Gateway
from gateway_svc.openai.check import check_model, check_token_ids, check_unsupported
from gateway_svc.openai.decode import BodyDecoder
from gateway_svc.openai.fields import DetokenizeFields, TokenizeFields
from gateway_svc.openai.prompts import chat_prompt, check_length
from stages.columns import i32, i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import (
    Detokenize,
    Detokenized,
    Prompt,
    RequestRejected,
    TextPrompt,
    Tokenize,
    Tokenized,
)


class TokenizeReply(msgspec.Struct, frozen=True):
    """The token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(msgspec.Struct, frozen=True):
    """The text of token ids."""

    prompt: str


class TokenizeEndpoint:
    """Asks the tokenizer stage; needs no place in the batch."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._tokenize = BodyDecoder(TokenizeFields)
        self._detokenize = BodyDecoder(DetokenizeFields)

    async def tokenize(self, request: web.Request) -> web.Response:
        """Handle POST /tokenize."""
        config = self._gateway.config
        fields = self._tokenize.decode(await read_body(request))
        check_model(fields.model, config)
        check_unsupported(fields)
        answer = await self._ask(Tokenize(0, _prompt(fields, config)))
        assert isinstance(answer, Tokenized)
        token_ids = i32(answer.token_ids).tolist()
        token_strs = answer.token_strs if fields.return_token_strs else None
        return _json(TokenizeReply(len(token_ids), config.max_model_len, token_ids, token_strs))

    async def detokenize(self, request: web.Request) -> web.Response:
        """Handle POST /detokenize."""
        fields = self._detokenize.decode(await read_body(request))
        check_model(fields.model, self._gateway.config)
        check_token_ids(fields.tokens, "tokens", self._gateway.config)
        answer = await self._ask(Detokenize(0, i32_bytes(fields.tokens)))
        assert isinstance(answer, Detokenized)
        return _json(DetokenizeReply(answer.text))

    async def _ask(self, query: Tokenize | Detokenize) -> Tokenized | Detokenized:
        with self._gateway.ask(query) as inbox:
            (answer,) = await inbox.take()
        if isinstance(answer, RequestRejected):
            raise RequestError(
                answer.message, param=answer.param, code=answer.code, status=answer.status
            )
        assert isinstance(answer, Tokenized | Detokenized)
        return answer


def _prompt(fields: TokenizeFields, config: ServerConfig) -> Prompt:
    if fields.messages is not None:
        return chat_prompt(fields, config.max_model_len)
    if fields.prompt is None:
        raise RequestError(
            "give either prompt or messages", param="prompt", code="missing_required_parameter"
        )
    check_length([fields.prompt], config.max_model_len, "prompt")
    return TextPrompt(fields.prompt, fields.add_special_tokens is not False)


def _json(document: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")
