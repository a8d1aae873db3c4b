"""Attention over a bfloat16 cache: how exact it is, and that few and many rows give equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, KvSpec, allocate_kv_cache
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import AttentionParams
from tests.unit.native_models import BUILD_NAMES, has_bfloat_dot, load_build

BLOCK_SIZE = 16
KV_HEADS = 2
CONTEXT = 531  # two splits and a part of a third that ends within a pair of tokens

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(params=BUILD_NAMES)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(load_build(request.param), num_threads=2)


def _draw(group: int, head_dim: int) -> tuple[KvCache, Tensor]:
    """A cache of one sequence in scattered blocks, and a query for each of its tokens."""
    generator = torch.Generator().manual_seed(group * 1000 + head_dim)
    cache = allocate_kv_cache(KvSpec(1, KV_HEADS, head_dim, torch.bfloat16), 35, BLOCK_SIZE)
    for part in cache.layers[0]:
        part.copy_(torch.randn(part.shape, generator=generator))
    return cache, torch.randn(CONTEXT, KV_HEADS * group, head_dim, generator=generator)


def _blocks() -> list[int]:
    return [*range(34, 0, -1)]


def _attend(
    ops: NativeOps, cache: KvCache, query: Tensor, first: int, params: AttentionParams
) -> Tensor:
    """The queries of the tokens from `first` on, in one step."""
    span = Span([0] * len(query), first, _blocks())
    plan = ops.plan_attention(ForwardBatch.from_spans([span], BLOCK_SIZE), cache)
    return ops.paged_attention(query, cache.layers[0], plan, params)


@pytest.mark.parametrize("window", [None, 77])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_a_row_alone_has_the_bits_that_it_has_in_a_chunk(
    ops: NativeOps, group: int, head_dim: int, window: int | None
) -> None:
    """Up to four rows take keys and values straight from the cache, more rows from panels."""
    cache, query = _draw(group, head_dim)
    params = AttentionParams(head_dim**-0.5, sliding_window=window)
    together = _attend(ops, cache, query, 0, params)
    for position in (0, 1, 15, 16, 255, 256, 300, CONTEXT - 1):
        alone = _attend(ops, cache, query[position : position + 1], position, params)
        assert torch.equal(alone[0], together[position])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_over_bfloat16_keeps_its_bound(ops: NativeOps, head_dim: int, rows: int) -> None:
    """Queries and weights may be rounded to bfloat16, sums may not: an output is within two
    roundings, 2^-8, of the mean size of what it averages."""
    cache, query = _draw(2, head_dim)
    query = query[-rows:]
    actual = _attend(ops, cache, query, CONTEXT - rows, AttentionParams(head_dim**-0.5))
    if has_bfloat_dot(ops.functions):
        query = query.bfloat16()
    key, value = (
        part[_blocks()].double().transpose(0, 1).flatten(1, 2)[:, :CONTEXT].repeat_interleave(2, 0)
        for part in cache.layers[0]
    )
    scores = torch.einsum("thd,hsd->hts", query.double(), key) * head_dim**-0.5
    is_seen = torch.arange(CONTEXT) <= torch.arange(CONTEXT - rows, CONTEXT)[:, None]
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    exact = torch.einsum("hts,hsd->thd", weights, value)
    mean_size = torch.einsum("hts,hsd->thd", weights, value.abs())
    bound = 2**-8 if has_bfloat_dot(ops.functions) else 1e-5
    assert ((actual - exact).abs() <= 1.01 * bound * mean_size).all()
