"""The one rule that says when tokens end a request; scheduler and sampler both call it.

Stop strings are not here: they are a property of the text, which only the sampler sees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.columns import Int32Array
from stages.messages import FinishReason

NO_TOKEN = -1


def finish_reasons(
    token_ids: Int32Array,
    num_output_tokens: Int32Array,
    max_tokens: Int32Array,
    stop_token_ids: Int32Array,
) -> NDArray[np.int8]:
    """Say for each row whether its newest token ends it.

    token_ids [n]: the newest token. num_output_tokens [n]: outputs including it. max_tokens [n].
    stop_token_ids [n, width]: the row's stop ids, padded with `NO_TOKEN`. Returns int8 [n] of
    `FinishReason`. A stop token wins over the length limit. `min_tokens` needs no case here: the
    sampler gives a stop token no probability before it.
    """
    reasons = np.zeros(len(token_ids), dtype=np.int8)
    reasons[num_output_tokens >= max_tokens] = FinishReason.LENGTH
    # Few columns: a comparison for each costs a third of NumPy's `any` along the short axis.
    is_stop = np.zeros(len(token_ids), dtype=np.bool_)
    for column in stop_token_ids.T:
        is_stop |= column == token_ids
    reasons[is_stop] = FinishReason.STOP
    return reasons
