"""The official `openai` client against a real group: sync and async, all that it offers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from stages.model_folder import embedded_model
from tests.process.group import Group, serving

MODEL = "headrace-embedded"
QUESTION = [{"role": "user", "content": "What is 12 plus 34?"}]
STORY = "Once upon a time there was"


@pytest.fixture(scope="module", params=["device", "process"])
def group(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Group]:
    run_dir = tmp_path_factory.mktemp("g") / "run"
    with serving(run_dir, "--sampling-placement", request.param) as group:
        yield group


@pytest.fixture
def client(group: Group) -> OpenAI:
    return group.client()


def test_chat_streamed_equals_chat_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_async_requests_at_once_equal_those_alone(group: Group) -> None:
    async with AsyncOpenAI(base_url=f"{group.url}/v1", api_key="none", timeout=60) as client:

        async def ask(seed: int) -> str:
            answer = await client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=24, temperature=1.0, seed=seed
            )
            return answer.choices[0].text

        together = await asyncio.gather(*(ask(seed) for seed in range(16)))
        alone = [await ask(seed) for seed in range(16)]
    assert together == alone
    assert len(set(together)) > 8


def test_three_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=1.5, seed=5, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=1.5, seed=5, max_tokens=12
    )
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [choice.message.content for choice in again.choices]


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert answer.usage is not None and len(logprobs.content) == answer.usage.completion_tokens
    for token in logprobs.content:
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 5 and tops == sorted(tops, reverse=True)
        assert token.logprob == pytest.approx(tops[0], abs=1e-6)  # greedy takes the likeliest
        assert sum(math.exp(top) for top in tops) <= 1 + 1e-6
    shown = b"".join(bytes(token.bytes or []) for token in logprobs.content[:-1]).decode()
    assert shown == answer.choices[0].message.content


def test_echo_gives_the_prompts_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text == STORY and choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == STORY
    values = choice.logprobs.token_logprobs or []
    assert values[0] is None and all(value <= 0 for value in values[1:] if value is not None)
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_stop_strings(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=STORY, max_tokens=60, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:5]
    stopped = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=60, temperature=0, stop=[stop, "not in it"]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == stop  # type: ignore[attr-defined]


def test_token_prompts_equal_text_prompts(group: Group, client: OpenAI) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    ids = tokenizer.encode(STORY).ids
    settings = {"model": MODEL, "max_tokens": 20, "temperature": 0}
    by_text = client.completions.create(prompt=STORY, **settings)
    by_ids = client.completions.create(prompt=ids, **settings)
    both = client.completions.create(prompt=[ids, ids], **settings)
    expected = by_text.choices[0].text
    assert [by_ids.choices[0].text, *(c.text for c in both.choices)] == [expected] * 3


def test_cached_tokens_are_counted(client: OpenAI) -> None:
    prompt = "The wheel never stands still. " * 8 + str(id(client))
    settings = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    client.completions.create(**settings)
    usage = client.completions.create(**settings).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert 0 < cached < usage.prompt_tokens and cached % 16 == 0


def test_refusals_are_openai_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.param == "model"
    with pytest.raises(BadRequestError) as hot:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 4000, max_tokens=1)
    assert long.value.code == "context_length_exceeded" and "2048" in str(long.value)
