"""Sampling beside the logits of an NPU: which rows CANN's operator may choose for, and what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_npu  # noqa: F401  registers the device
from torch import Tensor

from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.npu_sampling import MAX_TOP_K, TopKTopP
from sampler_svc.sampling import RowSampler, TorchHead
from sampler_svc.uploads import upload_to
from stages.messages import SamplingParams
from tests.sampling_reference import new_row

VOCAB = 2000
LIMITS: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}]


def _logits(num_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_rows, VOCAB), generator=generator) * 3


def _sample(logits: Tensor, params: list[SamplingParams], fallbacks: Fallbacks) -> list[int]:
    """The first tokens of requests, row by row: on the NPU, of which torch counts `fallbacks`."""
    device = torch.device("npu", torch.npu.current_device())
    head = TorchHead(upload_to(device), keeper=TopKTopP(fallbacks))
    return _first_tokens(RowSampler(len(params), VOCAB, device, head=head), logits.npu(), params)


def _first_tokens(sampler: RowSampler, logits: Tensor, params: list[SamplingParams]) -> list[int]:
    for row, own in enumerate(params):
        sampler.admit(new_row(row, own, [1]))
    rows = np.arange(len(params), dtype=np.int32)
    token_ids: list[int] = sampler.sample(logits, rows).token_ids.tolist()
    return token_ids


def _on_cpu(logits: Tensor, params: list[SamplingParams]) -> list[int]:
    return _first_tokens(RowSampler(len(params), VOCAB, "cpu"), logits, params)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_clients_seed_gives_the_tokens_of_the_cpu(limits: dict[str, Any]) -> None:
    fallbacks, logits = Fallbacks(), _logits(40)
    params = [SamplingParams(temperature=0.8, seed=seed, **limits) for seed in range(40)]
    assert _sample(logits, params, fallbacks) == _on_cpu(logits, params)
    assert fallbacks.counts() == {("top_k_top_p", "a client's seed"): 1}


def test_more_than_the_operator_takes_is_drawn_as_elsewhere() -> None:
    fallbacks, logits = Fallbacks(), _logits(8)
    limits = {"top_k": MAX_TOP_K + 1, "is_seed_drawn": True}
    params = [SamplingParams(temperature=2.0, seed=seed, **limits) for seed in range(8)]
    assert _sample(logits, params, fallbacks) == _on_cpu(logits, params)
    assert fallbacks.counts() == {("top_k_top_p", "top-k above 1024"): 1}


@pytest.mark.parametrize("limits", LIMITS)
def test_a_drawn_seed_gives_tokens_of_the_same_distribution(limits: dict[str, Any]) -> None:
    """The same row of logits many times: each token comes as often as its share of the set says."""
    num_draws, fallbacks = 4000, Fallbacks()
    logits = _logits(1).expand(num_draws, -1).contiguous()
    params = [
        SamplingParams(temperature=0.9, seed=seed, is_seed_drawn=True, **limits)
        for seed in range(num_draws)
    ]
    counts = np.bincount(_sample(logits, params, fallbacks), minlength=VOCAB)
    expected = num_draws * _shares(logits[0] / 0.9, **limits)
    assert not fallbacks.counts()
    assert not counts[expected == 0].any()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()


def _shares(logits: Tensor, top_k: int = VOCAB, top_p: float = 1.0) -> np.ndarray:
    """The definition: of the k likeliest the fewest that together have top_p of their weight."""
    shares = logits.double().softmax(-1).numpy()
    order = np.argsort(-shares, kind="stable")
    shares[order[top_k:]] = 0
    shares /= shares.sum()
    before = shares[order].cumsum() - shares[order]
    shares[order[before >= top_p]] = 0
    return shares / shares.sum()


def test_rows_of_all_kinds_in_one_step() -> None:
    """Who stands beside a row does not matter, whichever rule draws it."""
    kinds = [{}, *LIMITS, {"top_k": MAX_TOP_K + 5}]
    params = [
        SamplingParams(temperature=0.7, seed=row, is_seed_drawn=bool(row % 2), **kinds[row % 5])
        for row in range(20)
    ]
    logits = _logits(20, seed=1)
    together = _sample(logits, params, Fallbacks())
    alone = [_sample(logits[i : i + 1], [params[i]], Fallbacks())[0] for i in range(20)]
    assert together == alone
