"""The sampling head on torch: on accelerators, and on a CPU without the compiled sampling head."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.draw import draw_from_all, draw_from_top_k, draw_from_top_p, token_weights
from sampler_svc.logprobs import LogprobColumns, token_logprobs
from sampler_svc.sampling_rows import ChoiceColumns
from sampler_svc.uploads import Upload

# (weights int64 [n, vocab], uniforms float64 [n], top_k int64 [n, 1] or None, top_p float64 [n, 1]
# or None) -> token ids int64 [n]: what draw.py does for rows with top-k or top-p.
DrawFromLikeliest = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class DrawGroup:
    """Random rows that are drawn in the same way.

    index: int64 [g], their places among the random rows, None for all of them. top_k: int64 [g, 1]
    or None; top_p: float64 [g, 1] or None; max_top_k: the largest of `top_k`. is_kept: their sets
    are the device's `LikeliestKeeper`'s.
    """

    index: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    max_top_k: int
    is_kept: bool


class LikeliestKeeper(Protocol):
    """A device's own kernel for top-k and top-p sets, from which is drawn in another order than
    `draw.py`'s: in that of the vocabulary.
    """

    def takes(self, top_k: Int64Array, is_seeded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which rows it is for, each by itself, so that none depends on its company: bool [n].

        top_k: int64 [n], 0 for none; is_seeded: bool [n], the client gave the seed, to which the
        tokens of `draw.py` are promised.
        """
        ...

    def keep(self, weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        """The weights int64 [g, vocab] with 0 for all that is not in the sets; see `DrawGroup`."""
        ...


@dataclass(frozen=True)
class RandomRows:
    """The rows of a step that are not greedy.

    places: int64 [r], theirs in the batch, on the host; index: the same on the device, None for
    all of the batch. temperatures: float32 [r, 1]; min_p: float32 [r, 1] or None.
    """

    places: Int64Array
    index: Tensor | None
    temperatures: Tensor
    min_p: Tensor | None
    groups: list[DrawGroup]


class TorchHead:
    """A `SamplingHead` that never reads a device tensor back, except that on the CPU it may."""

    def __init__(
        self,
        upload: Upload,
        draw_from_likeliest: DrawFromLikeliest | None = None,
        keeper: LikeliestKeeper | None = None,
    ) -> None:
        """`draw_from_likeliest`: a device's own kernel for it; `keeper`: or for some rows."""
        self._upload = upload
        self._draw_from_likeliest = draw_from_likeliest
        self._keeper = keeper
        # Two sets of rows may take turns.
        self._known: deque[tuple[ChoiceColumns, RandomRows | None]] = deque(maxlen=2)

    def choose(
        self, logits: Tensor, columns: ChoiceColumns, uniforms: NDArray[np.float64]
    ) -> Tensor:
        """See `SamplingHead.choose`."""
        random = self._random_rows_of(columns)
        if random is None:
            return _argmax(logits)
        noise = self._upload(uniforms[random.places])
        if random.index is None:
            return self._draw(logits, random, noise)
        token_ids = _argmax(logits)
        token_ids[random.index] = self._draw(logits[random.index], random, noise)
        return token_ids

    def token_logprobs(
        self, logits: Tensor, token_ids: Tensor, places: NDArray[np.int64], num_top: int
    ) -> LogprobColumns:
        """See `SamplingHead.token_logprobs`."""
        if len(places) < len(logits):
            index = self._upload(places)
            logits, token_ids = logits[index], token_ids[index]
        return token_logprobs(logits, token_ids, num_top)

    def _draw(self, logits: Tensor, random: RandomRows, uniforms: Tensor) -> Tensor:
        weights = token_weights(logits, random.temperatures, random.min_p)
        if random.groups[0].index is None:
            return self._draw_group(weights, uniforms, random.groups[0])
        token_ids = torch.empty(len(weights), dtype=torch.int64, device=weights.device)
        for group in random.groups:
            own = self._draw_group(weights[group.index], uniforms[group.index], group)
            token_ids[group.index] = own
        return token_ids

    def _draw_group(self, weights: Tensor, uniforms: Tensor, group: DrawGroup) -> Tensor:
        top_k, top_p = group.top_k, group.top_p
        if top_k is None and top_p is None:
            return draw_from_all(weights, uniforms)
        if group.is_kept and self._keeper is not None:
            return draw_from_all(self._keeper.keep(weights, top_k, top_p), uniforms)
        if self._draw_from_likeliest is not None:
            return self._draw_from_likeliest(weights, uniforms, top_k, top_p)
        if top_k is not None:
            return draw_from_top_k(weights, uniforms, top_k, top_p, group.max_top_k)
        assert top_p is not None
        return draw_from_top_p(weights, uniforms, top_p)

    def _random_rows_of(self, columns: ChoiceColumns) -> RandomRows | None:
        for known, random in self._known:
            if known is columns:
                return random
        random = self._random_rows(columns)
        self._known.append((columns, random))
        return random

    def _random_rows(self, columns: ChoiceColumns) -> RandomRows | None:
        places = np.flatnonzero(columns.temperatures)
        if not len(places):
            return None
        min_p = columns.min_p[places]
        return RandomRows(
            places=places,
            index=None if len(places) == len(columns.temperatures) else self._upload(places),
            temperatures=self._column(columns.temperatures[places]),
            min_p=self._column(min_p) if min_p.any() else None,
            groups=self._draw_groups(
                columns.top_k[places], columns.top_p[places], columns.is_seeded[places]
            ),
        )

    def _draw_groups(
        self, top_k: Int64Array, top_p: NDArray[np.float64], is_seeded: NDArray[np.bool_]
    ) -> list[DrawGroup]:
        has_top_k, has_top_p = top_k > 0, top_p < 1.0
        is_kept = has_top_k | has_top_p
        if self._keeper is None:
            is_kept = np.zeros_like(is_kept)
        else:
            is_kept[is_kept] = self._keeper.takes(top_k[is_kept], is_seeded[is_kept])
        limited = has_top_k, ~has_top_k & has_top_p
        groups = []
        for members in (
            *(rows & ~is_kept for rows in limited),
            *(rows & is_kept for rows in limited),
            ~has_top_k & ~has_top_p,
        ):
            index = np.flatnonzero(members)
            if not len(index):
                continue
            own_top_k, own_top_p = top_k[index], top_p[index]
            groups.append(
                DrawGroup(
                    index=None if len(index) == len(top_k) else self._upload(index),
                    top_k=self._column(own_top_k) if own_top_k.any() else None,
                    top_p=self._column(own_top_p) if (own_top_p < 1.0).any() else None,
                    max_top_k=int(own_top_k.max()),
                    is_kept=bool(is_kept[index[0]]),
                )
            )
        return groups

    def _column(self, values: NDArray[np.generic]) -> Tensor:
        return self._upload(values)[:, None]


def _argmax(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first among equals: int64 [m]."""
    if logits.device.type == "cpu":
        # NumPy's argmax is vectorized, torch's is not: 2 against 27 us for 32k tokens.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)
