"""POST /v1/completions: four shapes of prompt, echo, the older logprobs, no tokens at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from stages.columns import i32_bytes
from stages.messages import (
    FinishReason,
    Generate,
    Message,
    Prompt,
    PromptLogprobs,
    RequestStarted,
    TextPrompt,
    TokenPrompt,
)
from tests.unit.gateway_fakes import (
    NUM_PROMPT_TOKENS,
    PROMPT_TEXT,
    events,
    first_token,
    serving,
    text_outputs,
)


async def test_whole_answer_with_the_default_of_16_tokens() -> None:
    async with serving() as served:
        body = await (await served.complete()).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice["text"] == "".join(f"w{index} " for index in range(16))
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("length", None, 0)
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [TextPrompt("hi")]),
        (["hi", "ho"], [TextPrompt("hi"), TextPrompt("ho")]),
        ([1, 2], [TokenPrompt(i32_bytes([1, 2]))]),
        ([[1, 2], [3]], [TokenPrompt(i32_bytes([1, 2])), TokenPrompt(i32_bytes([3]))]),
    ],
)
async def test_shapes_of_prompt(prompt: Any, expected: list[Prompt]) -> None:
    async with serving() as served:
        response = await served.complete(prompt=prompt, max_tokens=1)
        assert response.status == 200
        prompts = [generate.prompt for generate in served.pipeline.of_kind(Generate)]
    assert prompts == expected


async def test_white_space_does_not_hide_the_shape() -> None:
    body = b'{"model":"tiny","max_tokens":1,"prompt": \n [' + b" " * 200 + b'"hi"]}'
    async with serving() as served:
        response = await served.client.post(
            "/v1/completions", data=body, headers={"Content-Type": "application/json"}
        )
        assert response.status == 200
        assert served.pipeline.of_kind(Generate)[0].prompt == TextPrompt("hi")


async def test_bos_can_be_left_out() -> None:
    async with serving() as served:
        await served.complete(add_special_tokens=False, max_tokens=1)
        assert served.pipeline.of_kind(Generate)[0].prompt == TextPrompt("hi", False)


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    async with serving() as served:
        body = await (await served.complete(prompt=[[1], [2]], n=2, seed=5, max_tokens=1)).json()
        requests = served.pipeline.of_kind(Generate)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    first, second = TokenPrompt(i32_bytes([1])), TokenPrompt(i32_bytes([2]))
    assert [(request.prompt, request.params.seed) for request in requests] == [
        (first, 5),
        (first, 6),
        (second, 5),
        (second, 6),
    ]
    assert body["usage"]["prompt_tokens"] == 2 * NUM_PROMPT_TOKENS
    assert body["usage"]["completion_tokens"] == 4


async def test_logprobs() -> None:
    async with serving() as served:
        body = await (await served.complete(max_tokens=2, logprobs=1)).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["w0 ", "w1 "],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"w0 ": -0.5}, {"w1 ": -0.5}],
        "text_offset": [0, 3],
    }


async def test_logprobs_0_names_the_chosen_token() -> None:
    async with serving() as served:
        body = await (await served.complete(max_tokens=1, logprobs=0)).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"w0 ": -0.5}]


async def test_echo_with_logprobs_and_no_tokens_is_how_prompts_are_scored() -> None:
    async with serving() as served:
        body = await (await served.complete(max_tokens=0, echo=True, logprobs=1)).json()
        (generate,) = served.pipeline.of_kind(Generate)
    assert (generate.params.max_tokens, generate.params.prompt_logprobs) == (1, 1)
    assert generate.params.echo
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT_TEXT, "length")
    assert choice["logprobs"] == {
        "tokens": list(PROMPT_TEXT),
        "token_logprobs": [None, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [None, *[{char: -0.5} for char in PROMPT_TEXT[1:]]],
        "text_offset": [0, 1, 2, 3, 4],
    }
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == NUM_PROMPT_TOKENS


async def test_echo_without_logprobs() -> None:
    async with serving() as served:
        body = await (await served.complete(max_tokens=1, echo=True)).json()
        (generate,) = served.pipeline.of_kind(Generate)
    assert generate.params.prompt_logprobs == -1
    assert body["choices"][0]["text"] == PROMPT_TEXT + "w0 "
    assert body["choices"][0]["logprobs"] is None


async def test_no_tokens_and_no_echo_is_an_empty_text() -> None:
    async with serving() as served:
        body = await (await served.complete(max_tokens=0)).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


async def test_stream_with_echo_and_logprobs_adds_up_to_the_whole_answer() -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "echo": True, "logprobs": 2, "n": 2}
    async with serving() as served:
        whole = await (await served.complete(**fields)).json()
        options = {"include_usage": True}
        stream = await served.complete(**fields, stream=True, stream_options=options)
        *chunks, last, done = await events(stream)
    assert done == "[DONE]"
    assert last["usage"] == whole["usage"]
    for index in (0, 1):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        expected = whole["choices"][index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        for column, values in expected["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][column]] == values


async def test_stream_without_tokens() -> None:
    async with serving() as served:
        response = await served.complete(max_tokens=0, echo=True, stream=True)
        *chunks, _ = await events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT_TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_prompt_of_one_token_has_no_logprob() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        request_id, epoch = generate.request_id, generate.epoch
        return [
            RequestStarted(request_id, epoch, 1, 0, "x"),
            PromptLogprobs(request_id, epoch, [first_token("x")]),
            text_outputs(epoch, (request_id, [1], "y", FinishReason.LENGTH)),
        ]

    async with serving(script) as served:
        body = await (await served.complete(max_tokens=0, echo=True, logprobs=1)).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["x"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
