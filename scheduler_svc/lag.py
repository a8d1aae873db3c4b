"""Which requests lag: their next step is planned only once their last token is on the host.

All others are planned one step ahead, the token of the step before being on the device alone.
"""

from __future__ import annotations

from enum import IntEnum

from stages.columns import i32
from stages.config import ServerConfig
from stages.messages import SamplingParams


class LagReason(IntEnum):
    """What of a request needs the token's value on the host; each is counted by its name."""

    NONE = 0
    BAD_WORDS = 1


def samples_ahead(config: ServerConfig) -> bool:
    """Whether a step is launched while the host does not know the tokens that it starts from.

    The CPU has sampled one step before it begins the next, and in placement `process` a step
    waits for the sampler's tokens: there the host always knows them, and nobody has to lag.
    """
    return config.overlap and config.sampling_placement == "device" and config.device != "cpu"


def lag_reason(params: SamplingParams) -> LagReason:
    """Why a request has to lag where steps are sampled ahead.

    What a word of several tokens forbids depends on the tokens before. One of a single token is
    forbidden always, which needs no token's value.
    """
    if (i32(params.bad_word_lens) > 1).any():
        return LagReason.BAD_WORDS
    return LagReason.NONE
