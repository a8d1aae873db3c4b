"""The limits of prompts and parameters, and how parameters are completed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.columns import i32, i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import SamplingParams
from tests.unit.tokenizer_folders import server_config
from tokenizer_svc.limits import check_text, check_token_ids, complete_params

MAX_LEN = 64
VOCAB = 512
EOS = [2, 0]


def config() -> ServerConfig:
    return server_config(Path("unused"), max_model_len=MAX_LEN)


@settings(deadline=None)
@given(num_prompt_tokens=st.integers(0, 2 * MAX_LEN), asked=st.integers(0, 2 * MAX_LEN))
def test_a_request_is_taken_exactly_if_it_fits(num_prompt_tokens: int, asked: int) -> None:
    params = SamplingParams(max_tokens=asked)
    fits = num_prompt_tokens + max(asked, 1) <= MAX_LEN
    if fits:
        completed = complete_params(params, num_prompt_tokens, config(), "prompt")
        assert completed.max_tokens == (asked or MAX_LEN - num_prompt_tokens)
    else:
        with pytest.raises(RequestError) as caught:
            complete_params(params, num_prompt_tokens, config(), "prompt")
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.status == 400
        is_prompt_to_blame = num_prompt_tokens >= MAX_LEN
        assert caught.value.param == ("prompt" if is_prompt_to_blame else "max_tokens")


def test_the_refusal_has_the_numbers() -> None:
    with pytest.raises(RequestError) as caught:
        complete_params(SamplingParams(max_tokens=30), 50, config(), "messages")
    assert caught.value.message == (
        "This model's maximum context length is 64 tokens. However, you requested 80 tokens "
        "(50 in the messages, 30 in the completion). Please reduce the length of the messages or "
        "completion."
    )


@pytest.mark.parametrize(
    ("user", "ignore_eos", "expected"),
    [
        ([], False, [2, 0]),
        ([7, 5, 7], False, [7, 5, 2, 0]),
        ([0, 9], False, [0, 9, 2]),
        ([7, 2], True, [7, 2]),
        ([], True, []),
    ],
)
def test_stop_ids_are_the_users_and_then_the_models(
    user: list[int], ignore_eos: bool, expected: list[int]
) -> None:
    params = SamplingParams(stop_token_ids=i32_bytes(user), ignore_eos=ignore_eos)
    completed = complete_params(params, 1, config(), "prompt")
    assert i32(completed.stop_token_ids).tolist() == expected


def test_everything_else_stays_as_it_was() -> None:
    params = SamplingParams(temperature=0.3, top_k=5, seed=11, stop=["x"], logprobs=2, min_tokens=3)
    completed = complete_params(params, 4, config(), "prompt")
    changed = {"max_tokens", "stop_token_ids"}
    for name in set(SamplingParams.__struct_fields__) - changed:
        assert getattr(completed, name) == getattr(params, name)


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**31 - 1])
@pytest.mark.parametrize(
    ("field", "param"), [("stop_token_ids", "stop_token_ids"), ("logit_bias_ids", "logit_bias")]
)
def test_ids_beyond_the_vocabulary_are_refused(field: str, param: str, token_id: int) -> None:
    params = msgspec.structs.replace(SamplingParams(), **{field: i32_bytes([3, token_id])})
    with pytest.raises(RequestError, match=f"token id {token_id}, .* 0 to {VOCAB - 1}") as caught:
        complete_params(params, 1, config(), "prompt")
    assert caught.value.param == param


@pytest.mark.parametrize(("max_tokens", "min_tokens", "limit"), [(5, 6, 5), (0, 60, 54)])
def test_min_tokens_must_be_reachable(max_tokens: int, min_tokens: int, limit: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    with pytest.raises(RequestError, match=f"is {min_tokens}, but at most {limit}") as caught:
        complete_params(params, 10, config(), "prompt")
    assert caught.value.param == "min_tokens"


@settings(deadline=None)
@given(st.lists(st.integers(-3, VOCAB + 3), max_size=20))
def test_check_token_ids_names_the_first_bad_one(token_ids: list[int]) -> None:
    bad = [token_id for token_id in token_ids if not 0 <= token_id < VOCAB]
    column = np.array(token_ids, dtype=np.int32)
    if not bad:
        check_token_ids(column, VOCAB, "prompt")
        return
    with pytest.raises(RequestError, match=f"prompt has token id {bad[0]},"):
        check_token_ids(column, VOCAB, "prompt")


def test_a_text_may_have_sixteen_bytes_a_token() -> None:
    check_text("é" * (8 * MAX_LEN), MAX_LEN, "prompt")
    with pytest.raises(RequestError, match="1025 bytes of text, more than the 1024") as caught:
        check_text("é" * (8 * MAX_LEN) + "x", MAX_LEN, "prompt")
    assert caught.value.code == "context_length_exceeded"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError, match="not valid UTF-8: a lone surrogate at character 2"):
        check_text("ab\ud800", MAX_LEN, "prompt")
