"""The stage: what goes in and what comes out, message by message."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.columns import i32, i32_bytes
from stages.config import ModelFacts
from stages.messages import (
    AbortRequest,
    ChatMessage,
    ChatPrompt,
    Detokenize,
    Detokenized,
    Generate,
    Message,
    Prompt,
    RequestRejected,
    SamplingParams,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizedRequest,
    TokenPrompt,
)
from tests.unit.tokenizer_folders import (
    byte_level_bpe,
    byte_level_bpe_with_bos,
    edit_tokenizer_config,
    server_config,
    unigram,
)
from tokenizer_svc.encode import TextCodec, load_tokenizer
from tokenizer_svc.stage import TokenizerStage

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stage(folder: Path) -> TokenizerStage:
    return TokenizerStage(server_config(folder))


def answer(stage: TokenizerStage, message: Message) -> Message:
    (said,) = stage.handle([message], now_ns=0)
    return said


def rejected(
    stage: TokenizerStage, prompt: Prompt, params: SamplingParams = GREEDY
) -> RequestRejected:
    said = answer(stage, Generate(7, 3, prompt, params))
    assert isinstance(said, RequestRejected)
    assert (said.request_id, said.epoch) == (7, 3)
    return said


def accepted(stage: TokenizerStage, prompt: Prompt, params: SamplingParams = GREEDY) -> list[int]:
    said = answer(stage, Generate(7, 3, prompt, params))
    assert isinstance(said, TokenizedRequest), said
    return list(i32(said.prompt_token_ids))


def test_a_request_goes_on_whole(stage: TokenizerStage, folder: Path) -> None:
    message = Generate(
        request_id=2**63 + 1,
        epoch=4,
        prompt=TextPrompt("The wheel stands"),
        params=SamplingParams(max_tokens=9, seed=5),
        priority=-2,
        cache_salt="salt",
        arrival_ns=123,
        output_token_ids=i32_bytes([4, 5]),
    )
    codec = TextCodec(load_tokenizer(folder))
    assert answer(stage, message) == TokenizedRequest(
        request_id=2**63 + 1,
        epoch=4,
        prompt_token_ids=i32_bytes(codec.encode("The wheel stands", add_special_tokens=True)),
        params=SamplingParams(max_tokens=9, seed=5, stop_token_ids=i32_bytes([2, 0])),
        priority=-2,
        cache_salt="salt",
        arrival_ns=123,
        output_token_ids=i32_bytes([4, 5]),
    )


def test_a_conversation_has_the_bos_of_its_template_only(tmp_path: Path) -> None:
    folder = byte_level_bpe_with_bos(tmp_path)
    stage = TokenizerStage(server_config(folder))
    bos = load_tokenizer(folder).bos_token_id
    chat = accepted(stage, ChatPrompt([ChatMessage("user", "hi")]))
    assert chat.count(bos) == 1 and chat[0] == bos
    assert accepted(stage, TextPrompt("hi"))[0] == bos
    assert bos not in accepted(stage, TextPrompt("hi", add_special_tokens=False))


def test_special_tokens_in_a_prompt_are_tokens_as_in_transformers(stage: TokenizerStage) -> None:
    assert 2 in accepted(stage, TextPrompt("a<|im_end|>b"))


def test_token_ids_pass_unchanged(stage: TokenizerStage) -> None:
    assert accepted(stage, TokenPrompt(i32_bytes([5, 500, 5]))) == [5, 500, 5]


def test_an_abort_passes(stage: TokenizerStage) -> None:
    assert answer(stage, AbortRequest(7, 3)) == AbortRequest(7, 3)


def test_answers_are_in_order(stage: TokenizerStage) -> None:
    messages: list[Message] = [
        Generate(1, 0, TextPrompt("a"), GREEDY),
        Generate(2, 0, TextPrompt(""), GREEDY),
        AbortRequest(1, 0),
        Detokenize(3, i32_bytes([5])),
    ]
    kinds = [type(said) for said in stage.handle(messages, now_ns=0)]
    assert kinds == [TokenizedRequest, RequestRejected, AbortRequest, Detokenized]


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt(b"")])
def test_an_empty_prompt_is_refused(stage: TokenizerStage, prompt: Prompt) -> None:
    said = rejected(stage, prompt)
    assert (said.status, said.param) == (400, "prompt")


def test_an_empty_text_with_bos_is_a_prompt(tmp_path: Path) -> None:
    stage = TokenizerStage(server_config(byte_level_bpe_with_bos(tmp_path)))
    assert len(accepted(stage, TextPrompt(""))) == 1


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (TokenPrompt(i32_bytes([5] * 64)), "prompt"),
        (TextPrompt("水" * 64), "prompt"),
        (ChatPrompt([ChatMessage("user", "水" * 64)]), "messages"),
    ],
)
def test_a_prompt_longer_than_the_model_is_refused_with_the_numbers(
    stage: TokenizerStage, prompt: Prompt, param: str
) -> None:
    said = rejected(stage, prompt)
    assert (said.status, said.code, said.param) == (400, "context_length_exceeded", param)
    assert "maximum context length is 64 tokens" in said.message
    assert f"in the {param}, 1 in the completion" in said.message


@pytest.mark.parametrize("make", [TextPrompt, lambda text: ChatPrompt([ChatMessage("user", text)])])
def test_a_text_that_cannot_fit_is_refused_by_its_bytes(
    stage: TokenizerStage, make: object
) -> None:
    assert callable(make)
    said = rejected(stage, make("x" * (16 * 64 + 1)))
    assert said.code == "context_length_exceeded"
    assert "1025 bytes of text" in said.message


def test_a_template_that_writes_too_much_is_refused(tmp_path: Path) -> None:
    folder = byte_level_bpe(tmp_path)
    edit_tokenizer_config(folder, chat_template="{{ 'x' * 2000 }}")
    stage = TokenizerStage(server_config(folder))
    said = rejected(stage, ChatPrompt([ChatMessage("user", "hi")]))
    assert said.code == "context_length_exceeded"
    assert "2000 bytes of text" in said.message


@pytest.mark.parametrize("token_id", [-1, 512])
def test_token_ids_that_the_model_lacks_are_refused(stage: TokenizerStage, token_id: int) -> None:
    said = rejected(stage, TokenPrompt(i32_bytes([5, token_id])))
    assert said.param == "prompt"
    assert f"token id {token_id}" in said.message


def test_a_tokenizer_that_knows_more_than_the_model_cannot_crash_it(folder: Path) -> None:
    facts = ModelFacts("Qwen3ForCausalLM", 260, 4096, [2])
    stage = TokenizerStage(server_config(folder, facts=facts))
    said = rejected(stage, TextPrompt("The water that drives"))
    assert "ids are 0 to 259" in said.message


def test_an_unforeseen_error_ends_only_its_request(
    stage: TokenizerStage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("secret text")

    with monkeypatch.context() as patch:
        patch.setattr(TextCodec, "encode", fail)
        said = rejected(stage, TextPrompt("hello"))
    assert (said.status, said.code) == (500, "tokenizer_error")
    assert "secret" not in said.message
    assert "request 7 failed" in caplog.text
    accepted(stage, TextPrompt("hello"))


def test_tokenize_gives_ids_and_their_strings(stage: TokenizerStage) -> None:
    said = answer(stage, Tokenize(9, TextPrompt("the wheel")))
    assert isinstance(said, Tokenized)
    assert said.request_id == 9
    assert "".join(said.token_strs) == "theĠwheel"
    assert i32(said.token_ids).tolist() == accepted(stage, TextPrompt("the wheel"))


def test_tokenize_may_be_longer_than_the_model(stage: TokenizerStage) -> None:
    said = answer(stage, Tokenize(9, TextPrompt("水" * 100)))
    assert isinstance(said, Tokenized)
    assert len(said.token_ids) > 4 * 64


def test_detokenize_refuses_unknown_ids(stage: TokenizerStage) -> None:
    said = answer(stage, Detokenize(9, i32_bytes([1000])))
    assert isinstance(said, RequestRejected)
    assert (said.request_id, said.param) == (9, "tokens")


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_detokenize_undoes_tokenize(stage: TokenizerStage, text: str) -> None:
    # The normalizer is NFC: text in that form comes back as it went.
    text = unicodedata.normalize("NFC", text)
    tokenized = answer(stage, Tokenize(1, TextPrompt(text)))
    assert isinstance(tokenized, Tokenized)
    assert answer(stage, Detokenize(1, tokenized.token_ids)) == Detokenized(1, text)


def test_a_model_without_template_still_completes(tmp_path: Path) -> None:
    stage = TokenizerStage(server_config(unigram(tmp_path)))
    said = rejected(stage, ChatPrompt([ChatMessage("user", "hi")]))
    assert (said.status, said.code) == (400, "no_chat_template")
    accepted(stage, TextPrompt("hi"))


def test_progress_and_counters(folder: Path) -> None:
    stage = TokenizerStage(server_config(folder))
    num_tokens = len(accepted(stage, TextPrompt("the wheel")))
    rejected(stage, TextPrompt(""))
    assert stage.progress() == 2
    assert stage.queue_len() == 0
    assert stage.stats() == {
        "tokenizer_messages_total": 2,
        "tokenizer_rejected_total": 1,
        "tokenizer_prompt_tokens_total": num_tokens,
    }
