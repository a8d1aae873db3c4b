"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from gateway_svc.body import read_body
from gateway_svc.gateway import Gateway
from gateway_svc.openai.check import check_completion, check_max_tokens, check_sampling
from gateway_svc.openai.decode import BodyDecoder
from gateway_svc.openai.fields import CompletionFields, StreamOptions
from gateway_svc.openai.generation import Job, make_job, respond
from gateway_svc.openai.logprobs import TextLogprobs, text_logprobs
from gateway_svc.openai.outputs import Output, Usage
from gateway_svc.openai.prompts import PromptDecoder
from gateway_svc.openai.sampling import draft_requests, sampling_params
from gateway_svc.sse import HOLE
from stages.messages import TokenLogprob

DEFAULT_MAX_TOKENS = 16


class Choice(msgspec.Struct, frozen=True):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class Completion(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """The whole answer, or one event of a stream: this endpoint words both alike."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: None = None


class CompletionWording:
    """Words one text completion; without `has_output` it leaves out the token that was made."""

    def __init__(self, fields: CompletionFields, *, has_output: bool) -> None:
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = fields.model
        self._has_logprobs = fields.logprobs is not None
        self._has_echo = bool(fields.echo)
        self._has_output = has_output
        options = fields.stream_options or StreamOptions()
        self._no_usage: UnsetType | None = None if options.include_usage else UNSET
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Output], usage: Usage) -> Completion:
        """As `Wording.whole`."""
        return self._answer(list(map(self._choice, choices)), usage)

    def chunks(self, output: Output, usage: Usage | None) -> list[msgspec.Struct]:
        """As `Wording.chunks`."""
        if not output.has_news:
            return []
        return [self._answer([self._choice(output)], usage or self._no_usage)]

    def text_chunk(self, index: int) -> Completion | None:
        """As `Wording.text_chunk`."""
        is_plain = self._has_output and not self._has_logprobs and not self._has_echo
        if not is_plain:
            return None
        return self._answer([Choice(index, HOLE, None, None, None)], self._no_usage)

    def last_chunk(self, usage: Usage) -> Completion:
        """As `Wording.last_chunk`."""
        return self._answer([], usage)

    def _answer(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, self._created, self._model, choices, usage)

    def _choice(self, output: Output) -> Choice:
        text, logprobs = output.take()
        if not self._has_output:
            text, logprobs = "", []
        prompt_text, prompt_logprobs = self._echo(output)
        finish_word, stop_reason = output.finish_word, output.stop_reason
        if finish_word and not self._has_output:
            finish_word, stop_reason = "length", None
        return Choice(
            output.index,
            prompt_text + text,
            self._logprobs(output.index, prompt_logprobs, logprobs),
            finish_word,
            stop_reason,
        )

    def _echo(self, output: Output) -> tuple[str, list[TokenLogprob]]:
        """Give the prompt the first time that a choice is worded."""
        if not self._has_echo or output.index in self._echoed:
            return "", []
        self._echoed.add(output.index)
        if not self._has_logprobs:
            return output.prompt_text, []
        return output.prompt_text, output.prompt_logprobs

    def _logprobs(
        self, index: int, prompt: Sequence[TokenLogprob], output: Sequence[TokenLogprob]
    ) -> TextLogprobs | None:
        if not self._has_logprobs:
            return None
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(t.token) for t in (*prompt, *output))
        return text_logprobs(prompt, output, offset)


class CompletionEndpoint:
    """Parses, checks, runs and answers text completions."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._decoder = BodyDecoder(CompletionFields)
        self._prompts = PromptDecoder(gateway.config)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request."""
        fields = self._decoder.decode(await read_body(request))
        return await respond(request, self._gateway, self._job(fields))

    def _job(self, fields: CompletionFields) -> Job:
        config = self._gateway.config
        check_max_tokens(fields.max_tokens, "max_tokens", config)
        max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        check_sampling(fields, max_tokens, config)
        check_completion(fields)
        logprobs = -1 if fields.logprobs is None else fields.logprobs
        params = sampling_params(
            fields,
            config,
            max_tokens=max(max_tokens, 1),  # the pipeline makes at least one; with 0 it is dropped
            logprobs=logprobs,
            prompt_logprobs=logprobs if fields.echo else -1,
            echo=bool(fields.echo),
        )
        prompts = self._prompts.decode(
            bytes(fields.prompt), add_special_tokens=fields.add_special_tokens is not False
        )
        requests = draft_requests(prompts, fields, params, self._gateway.core.capacity)
        has_output = max_tokens > 0
        wording = CompletionWording(fields, has_output=has_output)
        return make_job(requests, fields, wording, counts_output=has_output)
