"""Top-k and top-p sets by CANN's operator, which masks logits where the vocabulary is."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_svc.ops.fallback import Fallbacks

MAX_TOP_K = 1024


class TopKTopP:
    """A `LikeliestKeeper`. Tokens as likely as the k-th are all kept.

    Other devices draw from the likeliest token down, which takes a sort of the vocabulary: a seed
    that a client gave promises their tokens, one that the gateway drew promises nothing.
    """

    def __init__(self, fallbacks: Fallbacks) -> None:
        """`fallbacks` counts, each time that the rows of a step change, what is not taken."""
        self._fallbacks = fallbacks

    def takes(self, top_k: NDArray[np.int64], is_seeded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """See `LikeliestKeeper`."""
        is_wide = top_k > MAX_TOP_K
        for refused, reason in (
            (is_seeded, "a client's seed"),
            (is_wide & ~is_seeded, f"top-k above {MAX_TOP_K}"),
        ):
            if refused.any():
                self._fallbacks.note("top_k_top_p", reason)
        return ~is_seeded & ~is_wide

    def keep(self, weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        """See `LikeliestKeeper`."""
        kept: Tensor = torch.ops.npu.npu_top_k_top_p(
            weights.float().log(),
            None if top_p is None else top_p.squeeze(1).float(),
            None if top_k is None else top_k.squeeze(1).int(),
        )
        return weights.masked_fill(kept.isinf(), 0)
