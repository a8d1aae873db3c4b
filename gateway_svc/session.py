"""One open request, as the gateway's core remembers it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway_svc.deliveries import Delta
from stages.messages import Generate, TokenLogprob


@dataclass(slots=True)
class Session:
    """The `Generate` as last sent and all that came back for it.

    `is_answered`: something was heard since it was last sent. `is_aborting`: its client has left;
    it stays until the pipeline confirms. `is_started`, `is_told`, `has_prompt_logprobs`: its client
    has heard of its start, of its first token, of these. `logprobs`: of tokens whose `TextOutputs`
    is to come; replaced, never changed, because deliveries share it. The last `num_held` tokens of
    `output_token_ids`, with the texts `held`, have come and have not been delivered.
    """

    generate: Generate
    output_token_ids: bytearray = field(default_factory=bytearray)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_recoveries: int = 0
    is_answered: bool = False
    is_aborting: bool = False
    is_started: bool = False
    is_told: bool = False
    has_prompt_logprobs: bool = False
    num_held: int = 0
    held: list[str] = field(default_factory=list)

    def release(self, finish_reason: int = 0, stop_reason: str | int | None = None) -> Delta:
        """Give what is held as one piece, with the log-probabilities that came for it."""
        token_ids = bytes(self.output_token_ids[-4 * self.num_held :]) if self.num_held else b""
        delta = Delta(
            self.generate.request_id,
            token_ids,
            "".join(self.held),
            finish_reason,
            stop_reason,
            self.logprobs,
        )
        self.is_told = True
        self.num_held = 0
        self.held.clear()
        if self.logprobs:
            self.logprobs = []
        return delta
