"""A scripted pipeline behind a real gateway and a real HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from gateway_svc.app import make_app
from gateway_svc.gateway import Gateway
from gateway_svc.pacing import WritePacer
from gateway_svc.sessions import GatewayStage
from stages.columns import i8_bytes, i32, i32_bytes, u64_bytes
from stages.config import ModelFacts, ServerConfig
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    Detokenize,
    Detokenized,
    ExecutorFacts,
    FinishReason,
    Generate,
    GroupState,
    Message,
    OutputLogprobs,
    PromptLogprobs,
    RequestStarted,
    StageState,
    TextOutputs,
    Tokenize,
    Tokenized,
    TokenLogprob,
    TopLogprob,
)

MODEL = "tiny"
VOCAB_SIZE = 1000
STAGE_NAMES = ("gateway", "tokenizer", "scheduler", "executor", "sampler")
NUM_PROMPT_TOKENS = 5
NUM_CACHED_TOKENS = 2
PROMPT_TEXT = "abcde"

M = TypeVar("M", bound=Message)
Output = tuple[int, list[int], str, int]
Script = Callable[[Generate], Sequence[Message]]


def make_config(**changes: Any) -> ServerConfig:
    """A small server; `changes` are fields of `ServerConfig`."""
    facts = ModelFacts("LlamaForCausalLM", VOCAB_SIZE, 4096, [2])
    config = ServerConfig(
        model="/models/tiny",
        served_model_name=MODEL,
        facts=facts,
        run_dir="/run",
        max_model_len=2048,
        max_num_seqs=8,
        max_queued_requests=256,
    )
    return msgspec.structs.replace(config, **changes)


def text_outputs(
    epoch: int, *outputs: Output, stop: Sequence[str | int | None] = ()
) -> TextOutputs:
    """One step: each output is (request_id, token_ids, text, finish_reason)."""
    num_finished = sum(output[3] != 0 for output in outputs)
    return TextOutputs(
        epoch,
        u64_bytes(output[0] for output in outputs),
        i32_bytes(len(output[1]) for output in outputs),
        i32_bytes(token for output in outputs for token in output[1]),
        [output[2] for output in outputs],
        i8_bytes(output[3] for output in outputs),
        list(stop) or [None] * num_finished,
    )


def token_logprob(text: str, token_id: int, num_top: int) -> TokenLogprob:
    """A token with `num_top` alternatives, itself the likeliest."""
    top = [
        TopLogprob(text if rank == 0 else f"{text}{rank}", text.encode(), token_id, -0.5 - rank)
        for rank in range(num_top)
    ]
    return TokenLogprob(text, text.encode(), token_id, -0.5, 1, top)


def first_token(text: str) -> TokenLogprob:
    """The entry of a prompt's first token."""
    return TokenLogprob(text, text.encode(), 0, 0.0, 0, [])


def started(generate: Generate) -> RequestStarted:
    """The request has its row."""
    prompt_text = PROMPT_TEXT if generate.params.echo else ""
    return RequestStarted(
        generate.request_id, generate.epoch, NUM_PROMPT_TOKENS, NUM_CACHED_TOKENS, prompt_text
    )


def answer(generate: Generate) -> list[Message]:
    """The default script: as many words "w0 ", "w1 ", ... as asked for, 3 if it does not say."""
    request_id, epoch, params = generate.request_id, generate.epoch, generate.params
    steps: list[Message] = [started(generate)]
    if params.prompt_logprobs >= 0:
        prompt = [first_token(PROMPT_TEXT[0])]
        for char in PROMPT_TEXT[1:]:
            prompt.append(token_logprob(char, ord(char), params.prompt_logprobs))
        steps.append(PromptLogprobs(request_id, epoch, prompt))
    num_tokens = params.max_tokens or 3
    first = len(generate.output_token_ids) // 4
    for index in range(first, num_tokens):
        if params.logprobs >= 0:
            token = token_logprob(f"w{index} ", index, params.logprobs)
            steps.append(OutputLogprobs(request_id, epoch, [token]))
        is_last = index == num_tokens - 1
        reason = FinishReason.LENGTH if is_last else FinishReason.NOT_FINISHED
        steps.append(text_outputs(epoch, (request_id, [index], f"w{index} ", reason)))
    return steps


def silence(generate: Generate) -> list[Message]:
    """A script for a pipeline that takes a request and says nothing."""
    return []


@dataclass
class FakePipeline:
    """Tokenizer, scheduler, executor and sampler: answers by a script, a message a loop turn."""

    script: Script = answer
    sent: list[Message] = field(default_factory=list)
    gateway: Gateway | None = None
    _has_sent: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, message: Message) -> None:
        """Take a message of the gateway."""
        self.sent.append(message)
        self._has_sent.set()
        self._play(self._answer(message))

    async def receive(self, kind: type[M], count: int = 1) -> M:
        """Wait until `count` messages of one kind have been sent; give the last of them."""
        async with asyncio.timeout(5):
            while len(self.of_kind(kind)) < count:
                self._has_sent.clear()
                await self._has_sent.wait()
        return self.of_kind(kind)[count - 1]

    def of_kind(self, kind: type[M]) -> list[M]:
        """Everything of one kind that was sent."""
        return [message for message in self.sent if isinstance(message, kind)]

    def _answer(self, message: Message) -> Sequence[Message]:
        if isinstance(message, Generate):
            return self.script(message)
        if isinstance(message, AbortRequest):
            return [text_outputs(message.epoch, (message.request_id, [], "", FinishReason.ABORT))]
        if isinstance(message, Tokenize):
            return [Tokenized(message.request_id, i32_bytes([7, 8, 9]), ["a", "b", "c"])]
        if isinstance(message, Detokenize):
            text = " ".join(map(str, i32(message.token_ids).tolist()))
            return [Detokenized(message.request_id, text)]
        return []

    def _play(self, messages: Sequence[Message]) -> None:
        if messages:
            asyncio.get_running_loop().call_soon(self._step, messages)

    def _step(self, messages: Sequence[Message]) -> None:
        assert self.gateway is not None
        self.gateway.on_messages(messages[:1])
        self._play(messages[1:])


class Unpaced(WritePacer):
    """Lets every step be written at once."""

    def delay(self, now: float) -> float:
        """Never."""
        return 0.0


def group_state(now_ns: int, *, is_ready: bool = True, **scheduler: Any) -> GroupState:
    """All five stages heard of at `now_ns`; `scheduler`: fields of its state that differ."""
    stages = [StageState(name, 100, 1, is_ready, now_ns, 1, 0) for name in STAGE_NAMES]
    stages[2] = msgspec.structs.replace(stages[2], **scheduler)
    return GroupState(1, stages)


@dataclass
class Served:
    """A running server and what is behind it."""

    client: TestClient[Any, Any]
    gateway: Gateway
    pipeline: FakePipeline

    async def chat(self, **fields: Any) -> ClientResponse:
        """POST a chat completion."""
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": MODEL, "messages": messages} | fields
        return await self.client.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> ClientResponse:
        """POST a text completion."""
        return await self.client.post(
            "/v1/completions", json={"model": MODEL, "prompt": "hi"} | fields
        )

    @property
    def base_url(self) -> str:
        """For OpenAI's client."""
        return f"http://127.0.0.1:{self.client.port}/v1"


@asynccontextmanager
async def serving(
    script: Script = answer,
    *,
    has_begun: bool = True,
    pacer: WritePacer | None = None,
    **changes: Any,
) -> AsyncIterator[Served]:
    """Serve over a real socket, in epoch 1 and writing each step at once unless told otherwise."""
    config = make_config(**changes)
    pipeline = FakePipeline(script)

    def call_later(delay_s: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(delay_s, call)

    gateway = Gateway(
        config,
        GatewayStage(config, incarnation=1),
        pipeline.send,
        call_later,
        pacer=pacer or Unpaced(),
    )
    pipeline.gateway = gateway
    if has_begun:
        gateway.begin_epoch(BeginEpoch(1, ExecutorFacts()))
    # `TestServer` turns `handler_cancellation` on, as the shell does.
    async with TestClient(TestServer(make_app(config, gateway))) as client:
        yield Served(client, gateway, pipeline)


async def events(response: ClientResponse) -> list[Any]:
    """Read a stream to its end: decoded events, the last one "[DONE]" where it is there."""
    assert response.content_type == "text/event-stream", await response.text()
    texts = (await response.text()).split("\n\n")
    assert texts.pop() == ""
    bodies = [text.removeprefix("data: ") for text in texts]
    return [body if body == "[DONE]" else msgspec.json.decode(body) for body in bodies]
