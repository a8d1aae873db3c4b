"""Every operator of the CPU backend against the reference, on ragged batches of any shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, KvSpec, allocate_kv_cache
from executor_svc.ops import cpu_attention
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.interface import AttentionParams, Ops
from executor_svc.ops.reference import ReferenceOps

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class AttentionCase:
    """`spans`: (query tokens, context tokens before them) of each sequence, decode rows first."""

    spans: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 4
    sliding_window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    contexts = st.integers(0, 90)
    decode = [(1, draw(contexts)) for _ in range(draw(st.integers(0, 4)))]
    chunks = draw(st.lists(st.tuples(st.integers(1, 40), contexts), max_size=3))
    return AttentionCase(
        spans=(*decode, *chunks) or ((1, 0),),
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 4, 7])),
        head_dim=draw(st.sampled_from([2, 8, 16, 64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([1, 3, 8, 16, 32])),
        sliding_window=draw(st.none() | st.integers(1, 100)),
        soft_cap=draw(st.none() | st.floats(0.5, 50.0)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 99)),
    )


def _poisoned_cache(case: AttentionCase, num_blocks: int) -> KvCache:
    """A cache whose unwritten slots hold what a former request's overflow may have left."""
    spec = KvSpec(1, case.num_kv_heads, case.head_dim, case.dtype)
    cache = allocate_kv_cache(spec, num_blocks, case.block_size)
    for part in cache.layers[0]:
        part.fill_(float("nan"))
    return cache


def _batches(case: AttentionCase) -> tuple[ForwardBatch, ForwardBatch, int]:
    """One batch that fills every context in scattered blocks, then the batch of the case."""
    generator = torch.Generator().manual_seed(case.seed)
    needs = [-(-(query + before) // case.block_size) for query, before in case.spans]
    ids = (1 + torch.randperm(sum(needs), generator=generator)).tolist()
    tables = [[ids.pop() for _ in range(need)] for need in needs]
    pairs = list(zip(case.spans, tables, strict=True))
    contexts = [Span(range(before), 0, table) for (_, before), table in pairs if before]
    spans = [Span(range(query), before, table) for (query, before), table in pairs]
    batch = ForwardBatch.from_spans(spans, case.block_size)
    filling = ForwardBatch.from_spans(contexts, case.block_size) if contexts else batch
    return filling, batch, sum(needs) + 1


def _attend(ops: Ops, case: AttentionCase) -> torch.Tensor:
    filling, batch, num_blocks = _batches(case)
    cache = _poisoned_cache(case, num_blocks)
    generator = torch.Generator().manual_seed(case.seed)
    params = AttentionParams(case.head_dim**-0.5, case.sliding_window, case.soft_cap)

    def random(tokens: int, heads: int) -> torch.Tensor:
        # Strided in the way that a fused projection leaves it.
        wide = torch.randn(tokens, 2 * heads, case.head_dim, generator=generator)
        return wide.to(case.dtype)[:, heads:]

    for part in (filling, batch):
        plan = ops.plan_attention(part, cache)
        key, value = (random(part.num_tokens, case.num_kv_heads) for _ in range(2))
        ops.write_kv(key, value, cache.layers[0], plan)
    query = random(batch.num_tokens, case.num_kv_heads * case.group)
    return ops.paged_attention(query, cache.layers[0], plan, params)


def _assert_attention_agrees(case: AttentionCase) -> None:
    expected, actual = _attend(ReferenceOps(), case), _attend(CpuOps(), case)
    tolerance = TOLERANCE[case.dtype]
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(attention_cases())
@example(AttentionCase(spans=((1, 0),)))
@example(AttentionCase(spans=((1, 5), (1, 40), (300, 0), (7, 33)), soft_cap=5.0))
@example(AttentionCase(spans=((1, 17), (20, 17)), sliding_window=1))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_paged_attention_agrees_on_any_batch(case: AttentionCase) -> None:
    _assert_attention_agrees(case)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_agrees_for_real_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    spans = ((1, 130), (1, 0), (1, 64), (1, 31), (70, 0), (33, 50))
    case = AttentionCase(spans, 4, 4, head_dim, 16, dtype=dtype)
    _assert_attention_agrees(case)
    _assert_attention_agrees(replace(case, sliding_window=40))


def test_decode_rows_split_into_small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "GROUP_BYTES", 3000)
    spans = tuple((1, before) for before in (3, 77, 0, 15, 16, 50, 9))
    _assert_attention_agrees(AttentionCase((*spans, (5, 20))))


def test_a_stale_table_column_is_never_read_as_data() -> None:
    """A persistent block table keeps ids of former requests behind a row's own blocks."""
    case = AttentionCase(spans=((1, 2), (1, 30)))
    _, batch, num_blocks = _batches(case)
    tables = batch.block_tables.clone()
    tables[0, 1:] = tables[1, 0]
    cache = _poisoned_cache(case, num_blocks)
    cache.layers[0].key.zero_()
    cache.layers[0].value.fill_(1.0)
    cache.layers[0].value[batch.block_tables[1].long()] = 100.0
    ops, query = CpuOps(), torch.randn(2, 4, 16)
    plan = ops.plan_attention(replace(batch, block_tables=tables), cache)
    out = ops.paged_attention(query, cache.layers[0], plan, AttentionParams(1.0))
    torch.testing.assert_close(out[0], torch.ones(4, 16))


def test_write_kv_touches_its_slots_only() -> None:
    case = AttentionCase(spans=((3, 2), (1, 4)))
    _, batch, num_blocks = _batches(case)
    cache = _poisoned_cache(case, num_blocks)
    ops, key = CpuOps(), torch.ones(4, 2, 16)
    ops.write_kv(key, 2 * key, cache.layers[0], ops.plan_attention(batch, cache))
    for part, written in zip(cache.layers[0], (1.0, 2.0), strict=True):
        slots = part.transpose(1, 2).reshape(-1, 2 * 16)
        assert (slots[batch.slot_mapping] == written).all()
        assert slots.isnan().all(-1).sum() == len(slots) - batch.num_tokens


def test_reference_attention_is_textbook_attention() -> None:
    """The oracle itself, on one dense prompt, against torch's formula."""
    case = AttentionCase(spans=((9, 0),), num_kv_heads=1, group=1)
    ops = ReferenceOps()
    batch = ForwardBatch.from_spans([Span(range(9), 0, [2, 1, 3])], 4)
    cache = _poisoned_cache(case, 4)
    query, key, value = torch.randn(3, 9, 1, 16, generator=torch.Generator().manual_seed(1))
    plan = ops.plan_attention(batch, cache)
    ops.write_kv(key, value, cache.layers[0], plan)
    actual = ops.paged_attention(query, cache.layers[0], plan, AttentionParams(0.3))
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(actual, expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_linear_agrees(
    tokens: int, sizes: tuple[int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*sizes, dtype=dtype)
    bias = torch.randn(sizes[0], dtype=dtype) if has_bias else None
    x = torch.randn(tokens, sizes[1], dtype=dtype)
    expected, actual = (
        ops.linear(x, ops.prepare_linear(weight, bias)) for ops in (ReferenceOps(), CpuOps())
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_linear_works_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "has_mkl", False)
    ops, weight, x = CpuOps(), torch.randn(5, 3), torch.randn(2, 3)
    prepared = ops.prepare_linear(weight)
    assert prepared.packed is None
    torch.testing.assert_close(ops.linear(x, prepared), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [4, 10, 16])
def test_elementwise_operators_agree(dtype: torch.dtype, rotary_dim: int) -> None:
    torch.manual_seed(0)
    reference, cpu, tolerance = ReferenceOps(), CpuOps(), TOLERANCE[dtype]
    x, residual, weight = torch.randn(5, 3, 16), torch.randn(5, 3, 16), torch.randn(16)
    angles = torch.randn(5, rotary_dim // 2)
    x, residual = x.to(dtype), residual.to(dtype)

    def results(ops: Ops) -> list[torch.Tensor]:
        return [
            ops.rms_norm(x, weight.to(dtype), 1e-6),
            ops.rms_norm(x, weight, 1e-6),
            *ops.add_rms_norm(x, residual, weight, 1e-5),
            *ops.rotary(x, residual, angles.cos(), angles.sin()),
            ops.swiglu(x.flatten(1)),
            ops.geglu(x.flatten(1)),
        ]

    for expected, actual in zip(results(reference), results(cpu), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_operators_leave_their_inputs_alone() -> None:
    ops, x, residual = CpuOps(), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    kept = x.clone(), residual.clone()
    ops.add_rms_norm(x, residual, torch.ones(8), 1e-6)
    ops.rotary(x, residual, torch.randn(3, 4), torch.randn(3, 4))
    ops.swiglu(x)
    ops.geglu(x)
    torch.testing.assert_close((x, residual), kept, rtol=0, atol=0)
