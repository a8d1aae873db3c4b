"""OpenAI's own client against the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import openai
import pytest

from stages.messages import FinishReason, Generate, Message
from tests.unit.gateway_fakes import MODEL, Output, Script, answer, serving, started, text_outputs


@asynccontextmanager
async def client_of(script: Script = answer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(script, api_key=["key"]) as served,
        openai.AsyncOpenAI(base_url=served.base_url, api_key="key", max_retries=0) as client,
    ):
        yield client


async def test_models() -> None:
    async with client_of() as client:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "headrace"


async def test_chat_with_three_choices_and_logprobs() -> None:
    async with client_of() as client:
        completion = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            n=3,
            max_completion_tokens=2,
            logprobs=True,
            top_logprobs=1,
        )
    assert [choice.message.content for choice in completion.choices] == ["w0 w1 "] * 3
    assert completion.choices[2].finish_reason == "length"
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["w0 ", "w1 "]
    assert logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_stream_with_usage() -> None:
    async with client_of() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == "w0 w1 w2 w3 "
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_chat_stream_ends_at_a_stop_string() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        assert generate.params.stop == ["END"]
        request_id = generate.request_id
        stopped = (request_id, [2], "b", FinishReason.STOP)
        return [
            started(generate),
            text_outputs(1, (request_id, [1], "a", 0)),
            text_outputs(1, stopped, stop=["END"]),
        ]

    async with client_of(script) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stop="END", stream=True
        )
        choices = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "ab"
    assert choices[-1].finish_reason == "stop"


async def test_completion_with_echo() -> None:
    async with client_of() as client:
        completion = await client.completions.create(
            model=MODEL, prompt=[[1, 2], [3]], echo=True, logprobs=1, max_tokens=0
        )
    assert [choice.text for choice in completion.choices] == ["abcde", "abcde"]
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("abcde")


async def test_completion_stream() -> None:
    async with client_of() as client:
        stream = await client.completions.create(
            model=MODEL, prompt="hi", max_tokens=3, stream=True
        )
        texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == "w0 w1 w2 "


async def test_errors_are_the_clients_own_exceptions() -> None:
    async with client_of() as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.completions.create(model="other", prompt="hi")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL, prompt="hi", temperature=9)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
    assert not_found.value.code == "model_not_found"
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")


async def test_an_error_event_in_a_stream_is_an_exception() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        failed: Output = (generate.request_id, [], "", FinishReason.ERROR)
        token = (generate.request_id, [1], "a", 0)
        return [*[text_outputs(1, token)] * 5, text_outputs(1, failed)]

    async with client_of(script) as client:
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="failed"):
            async for _ in stream:
                pass
