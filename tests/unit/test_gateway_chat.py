"""POST /v1/chat/completions: what goes to the pipeline and what comes back to the client."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from gateway_svc.openai.logprobs import MIN_LOGPROB
from stages.columns import f32, i32
from stages.config import ModelFacts
from stages.messages import (
    AbortRequest,
    ChatMessage,
    ChatPrompt,
    FinishReason,
    Generate,
    Message,
    OutputLogprobs,
    RequestRejected,
    TokenLogprob,
)
from tests.unit.gateway_fakes import (
    MODEL,
    NUM_CACHED_TOKENS,
    NUM_PROMPT_TOKENS,
    VOCAB_SIZE,
    Output,
    Served,
    events,
    serving,
    started,
    text_outputs,
)

USAGE = {
    "prompt_tokens": NUM_PROMPT_TOKENS,
    "completion_tokens": 2,
    "total_tokens": NUM_PROMPT_TOKENS + 2,
    "prompt_tokens_details": {"cached_tokens": NUM_CACHED_TOKENS},
}


async def only_request(served: Served, **fields: Any) -> Generate:
    """Send a chat completion and give the one request that it made."""
    response = await served.chat(**fields)
    assert response.status == 200, await response.text()
    (generate,) = served.pipeline.of_kind(Generate)
    assert isinstance(generate, Generate)
    return generate


async def test_whole_answer() -> None:
    async with serving() as served:
        body = await (await served.chat(max_tokens=2)).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "w0 w1 ", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
        "system_fingerprint": None,
    }


async def test_stream() -> None:
    async with serving() as served:
        response = await served.chat(max_tokens=2, stream=True)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        *chunks, done = await events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"].get("role") for choice in choices[1:]] == [None] * (len(choices) - 1)
    assert "".join(choice["delta"]["content"] for choice in choices) == "w0 w1 "
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    assert choices[-1]["stop_reason"] is None


async def test_stream_with_usage_at_the_end() -> None:
    async with serving() as served:
        response = await served.chat(
            max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last, done = await events(response)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], USAGE)


async def test_stream_with_usage_in_every_chunk() -> None:
    async with serving() as served:
        options = {"include_usage": True, "continuous_usage_stats": True}
        response = await served.chat(max_tokens=4, stream=True, stream_options=options)
        *chunks, _, _ = await events(response)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4


async def test_a_step_without_text_gives_no_event() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        request_id, epoch = generate.request_id, generate.epoch
        return [
            started(generate),
            text_outputs(epoch, (request_id, [1], "", 0)),
            text_outputs(epoch, (request_id, [2], "\N{GRINNING FACE}", 0)),
            text_outputs(epoch, (request_id, [3], "", FinishReason.STOP), stop=[3]),
        ]

    async with serving(script) as served:
        *chunks, _ = await events(await served.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert [delta for delta in deltas if delta] == ["\N{GRINNING FACE}"]
    assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["stop_reason"]) == (
        "stop",
        3,
    )


async def test_n_choices_have_consecutive_seeds_and_count_the_prompt_once() -> None:
    async with serving() as served:
        body = await (await served.chat(n=3, seed=2**63 - 1, max_tokens=2)).json()
        seeds = [generate.params.seed for generate in served.pipeline.of_kind(Generate)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert seeds == [2**63 - 1, 0, 1]
    assert body["usage"]["prompt_tokens"] == NUM_PROMPT_TOKENS
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED_TOKENS}


async def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    async with serving() as served:
        await served.chat(n=3)
        seeds = {generate.params.seed for generate in served.pipeline.of_kind(Generate)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_stream_of_n_choices_gives_each_its_role_text_and_end() -> None:
    async with serving() as served:
        *chunks, _ = await events(await served.chat(n=2, max_tokens=3, stream=True))
    for index in (0, 1):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"]["content"] for choice in choices) == "w0 w1 w2 "
        assert [c["finish_reason"] for c in choices].count("length") == 1


async def test_logprobs() -> None:
    async with serving() as served:
        body = await (await served.chat(max_tokens=1, logprobs=True, top_logprobs=2)).json()
        (generate,) = served.pipeline.of_kind(Generate)
    assert generate.params.logprobs == 2
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "w0 ",
                "logprob": -0.5,
                "bytes": [119, 48, 32],
                "top_logprobs": [
                    {"token": "w0 ", "logprob": -0.5, "bytes": [119, 48, 32]},
                    {"token": "w0 1", "logprob": -1.5, "bytes": [119, 48, 32]},
                ],
            }
        ]
    }


async def test_streamed_logprobs_are_complete() -> None:
    async with serving() as served:
        *chunks, _ = await events(await served.chat(max_tokens=5, logprobs=True, stream=True))
    tokens = [
        token["token"]
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == [f"w{index} " for index in range(5)]


async def test_logprobs_that_json_cannot_say_are_clamped() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        request_id, epoch = generate.request_id, generate.epoch
        tokens = [
            TokenLogprob("a", b"a", 1, float("-inf"), 9, []),
            TokenLogprob("b", b"b", 2, float("nan"), 9, []),
        ]
        return [
            OutputLogprobs(request_id, epoch, tokens),
            text_outputs(epoch, (request_id, [1, 2], "ab", FinishReason.STOP)),
        ]

    async with serving(script) as served:
        body = await (await served.chat(logprobs=True)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == [MIN_LOGPROB, MIN_LOGPROB]


async def test_every_sampling_field_reaches_the_pipeline() -> None:
    fields: dict[str, Any] = {
        "max_completion_tokens": 7,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 11,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 2,
        "seed": 42,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "stop_token_ids": [3, 4],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logit_bias": {"5": -100, "6": 1.5},
        "bad_words": ["wheel", " mill"],
        "priority": -3,
        "cache_salt": "salt",
        "user": "somebody",
    }
    async with serving() as served:
        generate = await only_request(served, **fields)
    params = generate.params
    for name in ("min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"):
        assert getattr(params, name) == fields[name]
    assert params.max_tokens == 7
    assert (params.repetition_penalty, params.frequency_penalty) == (1.5, -0.5)
    assert params.presence_penalty == 2.0
    assert params.ignore_eos
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens
    assert i32(params.stop_token_ids).tolist() == [3, 4]
    assert i32(params.logit_bias_ids).tolist() == [5, 6]
    assert params.bad_words == ["wheel", " mill"]
    assert f32(params.logit_bias_values).tolist() == [-100.0, 1.5]
    assert (generate.priority, generate.cache_salt) == (-3, "salt")
    assert generate.arrival_ns > 0
    assert (params.logprobs, params.prompt_logprobs, params.echo) == (-1, -1, False)


async def test_null_means_not_given() -> None:
    names = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias")
    async with serving() as served:
        generate = await only_request(served, **dict.fromkeys(names))
    assert generate.params.max_tokens == 0
    assert (generate.params.temperature, generate.params.top_p) == (1.0, 1.0)


async def test_the_models_own_defaults_stand_behind_the_request_only() -> None:
    own = {"temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "repetition_penalty": 1.1}
    facts = ModelFacts("LlamaForCausalLM", VOCAB_SIZE, 4096, [2], own)
    async with serving(facts=facts) as served:
        generate = await only_request(served, temperature=0, top_k=-1)
    params = generate.params
    assert (params.temperature, params.top_k) == (0.0, 0)
    assert (params.top_p, params.repetition_penalty) == (0.95, 1.1)


async def test_conversation() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "name": "eve",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        },
    ]
    async with serving() as served:
        generate = await only_request(
            served, messages=messages, chat_template_kwargs={"enable_thinking": False, "x": 1.5}
        )
    assert generate.prompt == ChatPrompt(
        [ChatMessage("system", "be brief"), ChatMessage("user", "one\ntwo", "eve")],
        True,
        False,
        {"enable_thinking": False, "x": 1.5},
    )


async def test_continue_final_message_adds_no_generation_prompt() -> None:
    async with serving() as served:
        generate = await only_request(served, continue_final_message=True)
    assert isinstance(generate.prompt, ChatPrompt)
    assert generate.prompt.continue_final_message
    assert not generate.prompt.add_generation_prompt


async def test_fields_that_ask_for_nothing_or_are_unknown_are_ignored() -> None:
    async with serving() as served:
        await only_request(
            served,
            tools=[],
            tool_choice="none",
            functions=None,
            response_format={"type": "text"},
            parallel_tool_calls=True,
            store=False,
            metadata={"deep": [{"er": 1}]},
        )


async def test_a_rejected_choice_ends_the_whole_answer_and_aborts_the_others() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        if generate.request_id % 2:
            return [started(generate)]
        rejected = RequestRejected(
            generate.request_id, generate.epoch, 400, "no_chat_template", "no template", "messages"
        )
        return [rejected]

    async with serving(script) as served:
        response = await served.chat(n=2)
        assert response.status == 400
        error = (await response.json())["error"]
        aborts = served.pipeline.of_kind(AbortRequest)
    assert error == {
        "message": "no template",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "no_chat_template",
    }
    assert len(aborts) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(is_stream: bool) -> None:
    def script(generate: Generate) -> Sequence[Message]:
        failed: Output = (generate.request_id, [], "", FinishReason.ERROR)
        return [started(generate), text_outputs(generate.epoch, failed)]

    async with serving(script) as served:
        response = await served.chat(stream=is_stream)
        assert response.status == 500
        assert (await response.json())["error"]["code"] == "generation_failed"


async def test_an_error_within_a_stream_is_an_event() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        request_id, epoch = generate.request_id, generate.epoch
        return [
            text_outputs(epoch, (request_id, [1], "a", 0)),
            *[text_outputs(epoch, (request_id, [1], "a", 0)) for _ in range(9)],
            RequestRejected(request_id, epoch, 500, "recovery_limit", "too often"),
        ]

    async with serving(script) as served:
        response = await served.chat(stream=True)
        assert response.status == 200
        bodies = await events(response)
    assert bodies[-1]["error"] == {
        "message": "too often",
        "type": "server_error",
        "param": None,
        "code": "recovery_limit",
    }
    assert "[DONE]" not in bodies


async def test_an_answer_that_the_server_aborts_says_so() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        aborted = (generate.request_id, [1], "a", FinishReason.ABORT)
        return [text_outputs(generate.epoch, aborted)]

    async with serving(script) as served:
        body = await (await served.chat()).json()
    assert body["choices"][0]["finish_reason"] == "abort"
