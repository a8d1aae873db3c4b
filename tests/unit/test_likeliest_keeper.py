"""The torch head beside a device's kernel for top-k and top-p sets: whose rows are whose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.sampling import RowSampler, TorchHead
from sampler_svc.uploads import upload_to
from stages.messages import SamplingParams
from tests.sampling_reference import new_row

VOCAB = 100
KINDS: list[dict[str, Any]] = [{}, {"top_k": 4}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.7}]


class FourLikeliest:
    """Keeps the four likeliest tokens of a row, whatever is asked."""

    def __init__(self) -> None:
        self.num_rows = 0

    def takes(self, top_k: NDArray[np.int64], is_seeded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        assert (top_k[is_seeded] >= 0).all() and len(top_k) == len(is_seeded)
        return ~is_seeded

    def keep(self, weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        self.num_rows += len(weights)
        least = weights.topk(4).values[:, -1:]
        return weights.masked_fill(weights < least, 0)


def sample(logits: Tensor, params: list[SamplingParams], keeper: FourLikeliest | None) -> list[int]:
    device = torch.device("cpu")
    head = TorchHead(upload_to(device), keeper=keeper)
    sampler = RowSampler(len(params), VOCAB, device, head=head)
    for row, own in enumerate(params):
        sampler.admit(new_row(row, own, [1]))
    token_ids = sampler.sample(logits, np.arange(len(params), dtype=np.int32)).token_ids
    chosen: list[int] = token_ids.tolist()
    return chosen


@pytest.fixture
def logits() -> Tensor:
    return torch.randn((40, VOCAB), generator=torch.Generator().manual_seed(0)) * 2


def make_params(is_drawn: bool) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=1.0, seed=row, is_seed_drawn=is_drawn, **KINDS[row % 4])
        for row in range(40)
    ]


def test_a_clients_seed_is_not_the_kernels(logits: Tensor) -> None:
    keeper = FourLikeliest()
    assert sample(logits, make_params(False), keeper) == sample(logits, make_params(False), None)
    assert keeper.num_rows == 0


def test_a_drawn_seed_is_if_the_row_has_a_set(logits: Tensor) -> None:
    keeper, params = FourLikeliest(), make_params(True)
    tokens, usual = sample(logits, params, keeper), sample(logits, params, None)
    assert keeper.num_rows == 30
    assert tokens[::4] == usual[::4]  # all tokens of the vocabulary: one rule for everybody
    likeliest = logits.topk(4).indices.tolist()
    assert all(tokens[row] in likeliest[row] for row in range(40) if row % 4)


def test_no_row_depends_on_its_company(logits: Tensor) -> None:
    mixed = [make_params(is_drawn=row % 3 > 0)[row] for row in range(40)]
    together = sample(logits, mixed, FourLikeliest())
    alone = [sample(logits[i : i + 1], [mixed[i]], FourLikeliest())[0] for i in range(40)]
    assert together == alone
