"""Chat templates: where they come from, what they see, and how they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stages.errors import RequestError
from stages.messages import ChatMessage, ChatPrompt
from tests.unit.tokenizer_folders import (
    byte_level_bpe,
    byte_level_bpe_with_bos,
    edit_tokenizer_config,
)
from tokenizer_svc.encode import load_tokenizer
from tokenizer_svc.template import ChatTemplate

TURNS = [ChatMessage("system", "Be brief."), ChatMessage("user", "What drives a mill? {{ 1 }}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return byte_level_bpe(tmp_path)


def template_of(folder: Path, source: object = ...) -> ChatTemplate:
    """Load the template of a folder, after giving it another one."""
    if source is not ...:
        edit_tokenizer_config(folder, chat_template=source)
    return ChatTemplate(load_tokenizer(folder))


def test_text_equals_the_reference(tmp_path: Path) -> None:
    folder = byte_level_bpe_with_bos(tmp_path)
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in TURNS],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert template_of(folder).render(ChatPrompt(TURNS)) == expected
    assert expected.startswith("<bos><|im_start|>system\nBe brief.<|im_end|>\n")
    assert expected.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_jinja_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}!")
    assert template_of(folder).render(ChatPrompt([ChatMessage("user", "hi")])) == "hi!"


def test_named_templates_use_the_default(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert template_of(folder, named).render(ChatPrompt(TURNS)) == "yes"


@pytest.mark.parametrize("source", [None, [{"name": "tool_use", "template": "no"}]])
def test_no_default_template_is_refused_with_the_remedy(folder: Path, source: object) -> None:
    with pytest.raises(RequestError, match="/v1/completions, or add") as caught:
        template_of(folder, source).render(ChatPrompt(TURNS))
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "messages")


def test_names_are_there_only_when_given(folder: Path) -> None:
    template = template_of(folder, "{% for m in messages %}{{ m.name | default('-') }}{% endfor %}")
    turns = [ChatMessage("user", "a", "Ann"), ChatMessage("user", "b")]
    assert template.render(ChatPrompt(turns)) == "Ann-"


def test_template_kwargs_reach_the_template(folder: Path) -> None:
    template = template_of(folder, "{{ enable_thinking }} {{ effort }}")
    kwargs: dict[str, bool | int | float | str] = {"enable_thinking": False, "effort": "low"}
    assert template.render(ChatPrompt(TURNS, template_kwargs=kwargs)) == "False low"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "tokenize", "chat_template", "conversation", "return_tensors"]
)
def test_reserved_template_kwargs_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(RequestError, match=f"must not set {name}") as caught:
        template_of(folder).render(ChatPrompt(TURNS, template_kwargs={name: "x"}))
    assert caught.value.param == "chat_template_kwargs"


def test_the_final_message_can_be_continued(folder: Path) -> None:
    turns = [ChatMessage("user", "Count."), ChatMessage("assistant", "One, two")]
    prompt = ChatPrompt(turns, add_generation_prompt=False, continue_final_message=True)
    assert template_of(folder).render(prompt).endswith("<|im_start|>assistant\nOne, two")


def test_empty_conversations_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="at least one message"):
        template_of(folder).render(ChatPrompt([]))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "append.*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_errors_of_a_template_refuse_the_request(folder: Path, source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        template_of(folder, source).render(ChatPrompt(TURNS))
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_long_reason_is_cut(folder: Path) -> None:
    template = template_of(folder, "{{ raise_exception(messages[0].content) }}")
    with pytest.raises(RequestError) as caught:
        template.render(ChatPrompt([ChatMessage("user", "x" * 10_000)]))
    assert len(caught.value.message) < 600
