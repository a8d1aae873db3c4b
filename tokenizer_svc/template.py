"""Renders conversations with the model's chat template, in transformers' immutable jinja sandbox.

Owns the mapping from template errors to refused requests; must not encode.
"""

from __future__ import annotations

import inspect

import jinja2
from transformers import PreTrainedTokenizerFast

from stages.errors import RequestError
from stages.messages import ChatMessage, ChatPrompt

# What the data of one request can make a template raise: its own raise_exception, the sandbox, or
# an operation on a value of a type that the template's author did not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

# A template may quote what it refuses, which can be the whole conversation.
MAX_REASON_CHARS = 500


class ChatTemplate:
    """The chat template of one tokenizer, or the fact that it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._source = _default_template(tokenizer.chat_template)
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset(parameters) | {"messages"}

    def render(self, prompt: ChatPrompt) -> str:
        """Give the prompt's text; raises RequestError for what the template cannot render."""
        self._check(prompt)
        try:
            text: str = self._tokenizer.apply_chat_template(
                [_as_dict(message) for message in prompt.messages],
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                **prompt.template_kwargs,
            )
        except TEMPLATE_ERRORS as error:
            reason = str(error)[:MAX_REASON_CHARS]
            raise RequestError(
                f"The chat template cannot render these messages: {reason}", param="messages"
            ) from error
        return text

    def _check(self, prompt: ChatPrompt) -> None:
        if self._source is None:
            raise RequestError(
                "This model has no chat template. Use /v1/completions, or add a "
                "chat_template.jinja file to the model folder.",
                param="messages",
                code="no_chat_template",
            )
        if not prompt.messages:
            raise RequestError("messages must hold at least one message.", param="messages")
        if reserved := sorted(self._reserved & prompt.template_kwargs.keys()):
            raise RequestError(
                f"chat_template_kwargs must not set {', '.join(reserved)}.",
                param="chat_template_kwargs",
            )


def _default_template(templates: str | dict[str, str] | None) -> str | None:
    """Choose among named templates the one for plain conversations."""
    return templates.get("default") if isinstance(templates, dict) else templates


def _as_dict(message: ChatMessage) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    return turn
