"""Draws tokens from logits: temperature, min_p, top-k, top-p, then the inverse of the CDF.

Probabilities become integer weights before anything is summed. Integer sums are exact and so do
not depend on the order of summation: the same row gives the same token alone and in any batch.
Rows without top-k and top-p are drawn in the order of the vocabulary, all others from the most
likely token down, ties in the order of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sampler_svc.nucleus import draw_from_nuclei

_WEIGHT_SCALE = 2.0**40
_NUM_IDS = 2**22  # a weight and a token id share one int64 sort key


def token_weights(logits: Tensor, temperatures: Tensor, min_p: Tensor | None) -> Tensor:
    """Turn logits float32 [n, vocab] into weights int64 [n, vocab], 2**40 being certainty.

    temperatures: float32 [n, 1], > 0. min_p: float32 [n, 1], drops tokens that are less likely
    than this fraction of the likeliest.
    """
    probs = torch.softmax(logits / temperatures, dim=-1)
    if min_p is not None:
        probs.masked_fill_(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs.mul_(_WEIGHT_SCALE).to(torch.int64)


def draw_from_all(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from weights int64 [n, m] with uniforms float64 [n]; returns indices int64 [n]."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = (uniforms[:, None] * total).to(torch.int64)
    # Rounding up to the total itself would pick a token of no weight behind the last.
    target = torch.minimum(target, total - 1)
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return index.clamp_(max=weights.shape[-1] - 1)  # a row of NaN must not leave the vocabulary


def draw_from_top_k(
    weights: Tensor, uniforms: Tensor, top_k: Tensor, top_p: Tensor | None, max_top_k: int
) -> Tensor:
    """Draw among the `top_k` int64 [n, 1] likeliest, of these the nucleus `top_p`, if given.

    Sorts `max_top_k`, the largest of `top_k`, tokens a row. Returns token ids int64 [n].
    """
    top, ids = _likeliest(weights, max_top_k)
    ranks = torch.arange(top.shape[-1], device=top.device)
    top = top.masked_fill(ranks >= top_k, 0)
    if top_p is not None:
        top = _nucleus(top, _nucleus_size(top, top_p))
    return ids.gather(-1, draw_from_all(top, uniforms)[:, None]).squeeze(-1)


def draw_from_top_p(weights: Tensor, uniforms: Tensor, top_p: Tensor) -> Tensor:
    """Draw from the nucleus: the fewest likeliest tokens that together have `top_p`.

    top_p: float64 [n, 1]; the token that crosses it is in. Returns token ids int64 [n].
    """
    size = _nucleus_size(weights, top_p)
    if weights.device.type == "cpu":
        sizes = size.squeeze(-1).numpy()
        return torch.from_numpy(draw_from_nuclei(weights.numpy(), uniforms.numpy(), sizes))
    # Whether less than a full sort would do is known to the device only.
    top, ids = _likeliest(weights, weights.shape[-1])
    index = draw_from_all(_nucleus(top, size), uniforms)
    return ids.gather(-1, index[:, None]).squeeze(-1)


def _likeliest(weights: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Give the largest weights of each row, descending, and their ids: int64 [n, k] both.

    The id is part of the sort key, so no two keys are equal and every sort gives one order.
    """
    vocab_size = weights.shape[-1]
    reversed_ids = torch.arange(vocab_size - 1, -1, -1, device=weights.device)
    keys = (weights * _NUM_IDS).add_(reversed_ids)
    if num_candidates < vocab_size:
        keys = keys.topk(num_candidates, dim=-1).values
    else:
        keys = keys.sort(dim=-1, descending=True).values
    return keys // _NUM_IDS, vocab_size - 1 - keys % _NUM_IDS


def _nucleus_size(weights: Tensor, top_p: Tensor) -> Tensor:
    """The weight that a nucleus has to reach: int64 [n, 1]."""
    return (weights.sum(dim=-1, keepdim=True) * top_p).ceil().to(torch.int64)


def _nucleus(top: Tensor, size: Tensor) -> Tensor:
    """Keep of descending weights those that begin before `size` is reached."""
    before = top.cumsum(dim=-1) - top
    return top.masked_fill(before >= size, 0)
