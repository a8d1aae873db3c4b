"""One request in the sampler: its text and its prompt's log-probabilities until they are told."""

from __future__ import annotations

from sampler_svc.detokenizer import Detokenizer
from sampler_svc.logprob_texts import first_token_logprob
from sampler_svc.stop_strings import StopStrings
from stages.columns import i32
from stages.messages import FinishReason, NewRow, SamplingParams, TokenLogprob


class RequestText:
    """The visible output of a request.

    Invariant: the text given out is a function of the prompt and of the tokens pushed, in one
    order, never of how they came; so replaying a prefix rebuilds the state behind it.
    """

    def __init__(
        self, detokenizer: Detokenizer, params: SamplingParams, prompt_token_ids: bytes
    ) -> None:
        self._stream = detokenizer.stream(i32(prompt_token_ids), params.skip_special_tokens)
        self._stop_strings = StopStrings(params.stop, params.include_stop_str_in_output)
        self._shows_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop_strings.matched

    def push(self, token_id: int, num_output_tokens: int, reason: int) -> str:
        """Add a token; return the text that it releases.

        `num_output_tokens` includes it; `reason` is the `FinishReason` that it brings by itself.
        The text of a stop token is no output unless stop strings are. As in vLLM, a stop string
        must end behind the first `min_tokens` tokens.
        """
        text = ""
        if reason != FinishReason.STOP or self._shows_stop:
            text = self._stream.push(token_id)
        text = self._stop_strings.push(text, num_output_tokens > self._min_tokens)
        return text + self.flush() if reason else text

    def flush(self) -> str:
        """The text ends: return what was held back; bytes of an open character are dropped."""
        return self._stop_strings.flush()


class Request:
    """A request that has not ended, with a row or (preempted) without.

    `prompt_logprobs`: those of the prompt's first tokens that are there so far, None if the
    request wants none or all have been told.
    """

    __slots__ = ("params", "prompt_logprobs", "prompt_token_ids", "request_id", "row", "text")

    def __init__(self, new: NewRow, detokenizer: Detokenizer) -> None:
        self.request_id = new.request_id
        self.params = new.params
        self.row = new.row
        self.prompt_token_ids = new.token_ids[: 4 * new.num_prompt_tokens]
        self.text = RequestText(detokenizer, new.params, self.prompt_token_ids)
        # A request that comes with outputs has been told its prompt's, in an earlier epoch.
        is_fresh = len(self.prompt_token_ids) == len(new.token_ids)
        self.prompt_logprobs: list[TokenLogprob] | None = (
            [first_token_logprob(i32(self.prompt_token_ids), detokenizer)]
            if is_fresh and new.params.prompt_logprobs >= 0
            else None
        )

    @property
    def has_all_prompt_logprobs(self) -> bool:
        """Whether they are wanted, not yet told, and complete."""
        logprobs = self.prompt_logprobs
        return logprobs is not None and 4 * len(logprobs) >= len(self.prompt_token_ids)

    def add_prompt_logprobs(self, start: int, tokens: list[TokenLogprob]) -> None:
        """Add those of positions `start`, ..; what a preemption made come twice is dropped."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += tokens[len(self.prompt_logprobs) - start :]
