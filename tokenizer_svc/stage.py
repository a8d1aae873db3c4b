"""The tokenizer stage: renders, encodes and checks prompts, and completes their parameters.

Stateless between messages, so any worker may take any message. Bad input is answered here, before
a scheduler sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from stages.columns import Int32Array, i32, i32_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    ChatPrompt,
    Detokenize,
    Detokenized,
    Generate,
    Message,
    Prompt,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizedRequest,
)
from stages.model_folder import model_path
from tokenizer_svc.bad_words import with_bad_word_ids
from tokenizer_svc.encode import TextCodec, load_tokenizer
from tokenizer_svc.limits import check_text, check_token_ids, complete_params
from tokenizer_svc.rejection import TOKENIZER_ERROR, prompt_param, reject
from tokenizer_svc.template import ChatTemplate

logger = logging.getLogger(__name__)


class TokenizerStage:
    """Answers each message by itself: one inbound message gives exactly one outbound."""

    def __init__(self, config: ServerConfig) -> None:
        tokenizer = load_tokenizer(model_path(config))
        self._config = config
        self._codec = TextCodec(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._num_handled = 0
        self._num_rejected = 0
        self._num_prompt_tokens = 0

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Nothing to forget: the epoch of a request rides through with it."""

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Answer each message in order."""
        return [self._answer(message) for message in messages]

    def progress(self) -> int:
        """Messages answered."""
        return self._num_handled

    def queue_len(self) -> int:
        """Nothing waits in the core; what waits for a worker is in the pool."""
        return 0

    def stats(self) -> dict[str, float]:
        """Counters."""
        return {
            "tokenizer_messages_total": self._num_handled,
            "tokenizer_rejected_total": self._num_rejected,
            "tokenizer_prompt_tokens_total": self._num_prompt_tokens,
        }

    def _answer(self, message: Message) -> Message:
        self._num_handled += 1
        if isinstance(message, AbortRequest):
            return message
        assert isinstance(message, Generate | Tokenize | Detokenize)
        try:
            if isinstance(message, Generate):
                return self._generate(message)
            if isinstance(message, Tokenize):
                return self._tokenize(message)
            return self._detokenize(message)
        except RequestError as error:
            self._num_rejected += 1
            return reject(message, error)
        except Exception as error:
            # Tokenizer and template are the model folder's, the text is a client's: whatever comes
            # of the two together must end this request and no other.
            logger.exception("request %d failed in the tokenizer", message.request_id)
            text = f"The tokenizer failed on this request ({type(error).__name__})."
            self._num_rejected += 1
            return reject(message, RequestError(text, code=TOKENIZER_ERROR, status=500))

    def _generate(self, message: Generate) -> TokenizedRequest:
        token_ids = self._prompt_token_ids(message.prompt)
        param = prompt_param(message.prompt)
        if not len(token_ids):
            raise RequestError("The prompt must have at least one token.", param=param)
        # Not only of the client's ids: a tokenizer can know more tokens than the model embeds.
        check_token_ids(token_ids, self._config.facts.vocab_size, param)
        params = with_bad_word_ids(message.params, self._codec)
        params = complete_params(params, len(token_ids), self._config, param)
        self._num_prompt_tokens += len(token_ids)
        return TokenizedRequest(
            request_id=message.request_id,
            epoch=message.epoch,
            prompt_token_ids=i32_bytes(token_ids),
            params=params,
            priority=message.priority,
            cache_salt=message.cache_salt,
            arrival_ns=message.arrival_ns,
            output_token_ids=message.output_token_ids,
        )

    def _tokenize(self, message: Tokenize) -> Tokenized:
        token_ids = self._prompt_token_ids(message.prompt)
        check_token_ids(token_ids, self._config.facts.vocab_size, prompt_param(message.prompt))
        strs = self._codec.token_strs(token_ids)
        return Tokenized(message.request_id, i32_bytes(token_ids), strs)

    def _detokenize(self, message: Detokenize) -> Detokenized:
        token_ids = i32(message.token_ids)
        check_token_ids(token_ids, self._config.facts.vocab_size, "tokens")
        return Detokenized(message.request_id, self._codec.decode(token_ids))

    def _prompt_token_ids(self, prompt: Prompt) -> Int32Array:
        max_model_len = self._config.max_model_len
        if isinstance(prompt, TextPrompt):
            check_text(prompt.text, max_model_len, "prompt")
            return self._codec.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        if isinstance(prompt, ChatPrompt):
            for turn in prompt.messages:
                check_text(turn.content, max_model_len, "messages")
            text = self._template.render(prompt)
            check_text(text, max_model_len, "messages")
            # The template writes BOS itself where the model wants one.
            return self._codec.encode(text, add_special_tokens=False)
        return i32(prompt.token_ids)
