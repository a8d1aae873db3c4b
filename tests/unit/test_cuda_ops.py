"""Every operator of the CUDA backend against the reference: on a GPU, else interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, KvSpec, LayerKv, allocate_kv_cache
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import AttentionParams, Ops, QkNorms
from executor_svc.ops.reference import ReferenceOps
from tests.triton_device import triton_device

DEVICE = triton_device()

from executor_svc.ops.cuda.ops import CudaOps  # noqa: E402
from executor_svc.ops.cuda.splits import SPLIT_TOKENS  # noqa: E402

# The interpreter computes with NumPy, which warns of infinities that a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter multiplies no bfloat16 matrices.
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
HEAD_DIMS = [64, 80, 96, 128, 256]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def ops() -> CudaOps:
    return CudaOps(Fallbacks())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 4096), (5, 24), (3, 1000), (9, 3, 80), (70, 16)])
def test_norms_agree(ops: CudaOps, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    weight = randn(shape[-1], seed=2)
    for own in (weight, weight.to(dtype)):
        close(ops.rms_norm(x, own, 1e-6), ReferenceOps().rms_norm(x, own, 1e-6))
    expected = ReferenceOps().add_rms_norm(x, residual, weight, 1e-5)
    for ours, theirs in zip(ops.add_rms_norm(x, residual, weight, 1e-5), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 2 * 1025), (7, 200)])
def test_activations_agree(ops: CudaOps, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = 4 * randn(*shape, dtype=dtype)
    close(ops.swiglu(gate_up), ReferenceOps().swiglu(gate_up))
    close(ops.geglu(gate_up), ReferenceOps().geglu(gate_up))


def test_an_activation_of_large_values_stays_finite(ops: CudaOps) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, -80.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    close(ops.swiglu(gate_up), ReferenceOps().swiglu(gate_up))
    close(ops.geglu(gate_up), ReferenceOps().geglu(gate_up))


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 40), (130, 1500), (6, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_agrees(
    ops: CudaOps, tokens: int, sizes: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    weight = randn(*sizes, dtype=dtype)
    bias = randn(sizes[0], dtype=dtype, seed=1) if has_bias else None
    x = randn(tokens, sizes[1], dtype=dtype, seed=2) / sizes[1] ** 0.5
    expected = ReferenceOps().linear(x, ReferenceOps().prepare_linear(weight, bias))
    close(ops.linear(x, ops.prepare_linear(weight, bias)), expected)


# ── query, key and value ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Projection:
    """The split views of a fused projection, and the angles of its tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def projection(
    num_tokens: int, heads: tuple[int, int], dim: int, rotary_dim: int, dtype: torch.dtype
) -> Projection:
    num_heads, num_kv_heads = heads
    wide = randn(num_tokens, num_heads + 2 * num_kv_heads, dim, dtype=dtype)
    query, key, value = wide.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = 10 * randn(num_tokens, rotary_dim // 2, seed=1)
    return Projection(query, key, value, angles.cos(), angles.sin())


ROTARY_CASES = [((4, 2), 64, 64), ((3, 1), 80, 80), ((9, 3), 96, 96), ((4, 4), 128, 32)]


@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), [*ROTARY_CASES, ((2, 1), 256, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_agrees(
    ops: CudaOps, heads: tuple[int, int], dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    own = projection(5, heads, dim, rotary_dim, dtype)
    expected = ReferenceOps().rotary(own.query, own.key, own.cos, own.sin)
    kept = own.query.clone()
    for ours, theirs in zip(
        ops.rotary(own.query, own.key, own.cos, own.sin), expected, strict=True
    ):
        close(ours, theirs)
    assert torch.equal(own.query, kept)


def nan_cache(num_blocks: int, num_kv_heads: int, block_size: int, like: torch.Tensor) -> KvCache:
    """A cache whose unwritten slots hold what a former request's overflow may have left."""
    spec = KvSpec(1, num_kv_heads, like.shape[-1], like.dtype)
    cache = allocate_kv_cache(spec, num_blocks, block_size, DEVICE)
    for part in cache.layers[0]:
        part.fill_(float("nan"))
    return cache


@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), ROTARY_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_the_fused_projection_pass_agrees(
    ops: CudaOps,
    heads: tuple[int, int],
    dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    has_norms: bool,
) -> None:
    batch = on_device(ForwardBatch.from_spans([Span([0] * 4, 3, [2, 1, 3])], 3))
    own = projection(4, heads, dim, rotary_dim, dtype)
    norms = None
    query, key = own.query, own.key
    reference = ReferenceOps()
    if has_norms:
        norms = QkNorms(randn(dim, seed=3), randn(dim, seed=4), 1e-6)
        query = reference.rms_norm(query, norms.query, norms.eps)
        key = reference.rms_norm(key, norms.key, norms.eps)
    expected, theirs = (nan_cache(4, heads[1], 3, own.key) for _ in range(2))
    query, key = reference.rotary(query, key, own.cos, own.sin)
    plan = reference.plan_attention(batch, expected)
    reference.write_kv(key, own.value, expected.layers[0], plan)
    rotated = ops.rotary_and_write_kv(
        own.query,
        own.key,
        own.value,
        own.cos,
        own.sin,
        theirs.layers[0],
        ops.plan_attention(batch, theirs),
        norms,
    )
    close(rotated, query)
    for ours, wanted in zip(theirs.layers[0], expected.layers[0], strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_write_kv_touches_its_slots_only(ops: CudaOps) -> None:
    batch = on_device(ForwardBatch.from_spans([Span([0] * 3, 2, [3, 1]), Span([0], 4, [2, 4])], 4))
    cache = nan_cache(5, 9, 4, randn(1, 24))
    key = torch.ones(4, 9, 24, device=DEVICE)
    ops.write_kv(key, 2 * key, cache.layers[0], ops.plan_attention(batch, cache))
    for part, written in zip(cache.layers[0], (1.0, 2.0), strict=True):
        slots = part.transpose(1, 2).reshape(-1, 9 * 24)
        assert (slots[batch.slot_mapping] == written).all()
        assert slots.isnan().all(-1).sum() == len(slots) - batch.num_tokens


# ── attention ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """`spans`: (query tokens, context tokens before them) of each sequence, decode rows first."""

    spans: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_size: int = 16
    sliding_window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(self.head_dim**-0.5, self.sliding_window, self.soft_cap)


@dataclass(frozen=True)
class Attention:
    """A filled cache, and the step that attends to it."""

    batch: ForwardBatch
    cache: KvCache
    query: torch.Tensor


def on_device(batch: ForwardBatch) -> ForwardBatch:
    names = ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_tables")
    moved = {name: getattr(batch, name).to(DEVICE) for name in (*names, "logits_indices")}
    return replace(batch, **moved)


def prepare(case: Case) -> Attention:
    """Scatter contexts over the blocks; the rest of the cache, the null block too, is NaN."""
    needs = [-(-(query + before) // case.block_size) for query, before in case.spans]
    ids = (1 + torch.randperm(sum(needs), generator=generator())).tolist()
    tables = [[ids.pop() for _ in range(need)] for need in needs]
    spans = [
        Span(range(query), before, table)
        for (query, before), table in zip(case.spans, tables, strict=True)
    ]
    batch = on_device(ForwardBatch.from_spans(spans, case.block_size))
    like = randn(1, case.head_dim, dtype=case.dtype)
    cache = nan_cache(sum(needs) + 1, case.num_kv_heads, case.block_size, like)
    for seed, part in enumerate(cache.layers[0]):
        for table, length in zip(tables, batch.seq_lens_host, strict=True):
            fill(part, table, length, seed)
    num_heads = case.num_kv_heads * case.group
    # Strided in the way that a fused projection leaves it.
    query = randn(batch.num_tokens, 2 * num_heads, case.head_dim, dtype=case.dtype, seed=9)
    return Attention(batch, cache, query[:, num_heads:])


def fill(part: torch.Tensor, table: list[int], length: int, seed: int) -> None:
    _, num_kv_heads, block_size, dim = part.shape
    values = randn(length, num_kv_heads, dim, dtype=part.dtype, seed=seed + 31 * table[0])
    for position in range(length):
        block, offset = table[position // block_size], position % block_size
        part[block, :, offset] = values[position]


def attend(ops: Ops, own: Attention, params: AttentionParams) -> torch.Tensor:
    plan = ops.plan_attention(own.batch, own.cache)
    return ops.paged_attention(own.query, own.cache.layers[0], plan, params)


def assert_agrees(case: Case) -> None:
    own = prepare(case)
    expected = attend(ReferenceOps(), own, case.params)
    assert expected.isfinite().all()
    close(attend(CudaOps(Fallbacks()), own, case.params), expected)


# The last sequence has one token, but stands behind longer ones.
RAGGED = ((1, 130), (1, 0), (1, 300), (40, 0), (17, 50), (1, 20))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_attention_agrees_for_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    assert_agrees(Case(RAGGED, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("sliding_window", [1, 40, 1000])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_attention_agrees_with_windows_and_caps(
    sliding_window: int, soft_cap: float | None
) -> None:
    assert_agrees(Case(RAGGED, sliding_window=sliding_window, soft_cap=soft_cap))


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "block_size"),
    [(1, 1, 1), (3, 1, 3), (1, 7, 16), (2, 4, 128), (1, 32, 8), (8, 2, 32)],
)
def test_attention_agrees_for_any_grouping_and_block(
    num_kv_heads: int, group: int, block_size: int
) -> None:
    assert_agrees(Case(((1, 70), (1, 5), (20, 33)), num_kv_heads, group, 32, block_size))


@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("num_splits", [1, 2, 17])
@pytest.mark.parametrize("sliding_window", [None, SPLIT_TOKENS])
def test_contexts_around_split_boundaries(
    beyond: int, num_splits: int, sliding_window: int | None
) -> None:
    spans = ((1, 3), (1, num_splits * SPLIT_TOKENS + beyond - 1), (1, 40))
    assert_agrees(Case(spans, 1, 2, 16, 32, sliding_window=sliding_window))


def test_more_sequences_than_one_load_covers() -> None:
    assert_agrees(Case(((1, 2),) * 130, 1, 1, 16))


def test_a_chunk_of_several_tiles() -> None:
    assert_agrees(Case(((1, 5), (150, 70)), 1, 2, 16))


def test_a_stale_table_column_is_never_read_as_data() -> None:
    """A persistent block table keeps ids of former requests behind a row's own blocks."""
    case = Case(((1, 2), (1, 60), (3, 4)))
    own = prepare(case)
    tables = own.batch.block_tables.clone()
    tables[0, 1:] = 10**6
    tables[2, 1:] = 10**6
    stale = replace(own, batch=replace(own.batch, block_tables=tables))
    expected = attend(CudaOps(Fallbacks()), own, case.params)
    assert torch.equal(attend(CudaOps(Fallbacks()), stale, case.params), expected)


def test_padding_rows_of_a_captured_bucket_hurt_nobody() -> None:
    case = Case(((1, 300), (1, 2)))
    own = prepare(case)
    batch = own.batch
    padded = replace(
        own.batch,
        seq_lens=torch.cat([batch.seq_lens, batch.seq_lens.new_tensor([1, 0])]),
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables)]),
        num_decode_rows=4,
        max_seq_len=5000,
    )
    query = torch.cat([own.query, own.query])
    out = attend(CudaOps(Fallbacks()), Attention(padded, own.cache, query), case.params)
    assert torch.equal(out[:2], attend(CudaOps(Fallbacks()), own, case.params))
    assert out[2].isnan().all(), "the null block here is NaN, and belongs to nobody"
    assert (out[3] == 0).all()


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_a_sequence_gives_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    case = Case(((1, 700), (1, 5), (1, 256), (9, 30), (40, 0)), dtype=dtype)
    own = prepare(case)
    together = attend(CudaOps(Fallbacks()), own, case.params)
    batch, starts = own.batch, own.batch.query_start.tolist()
    for row, (num_queries, _) in enumerate(case.spans):
        tokens = slice(starts[row], starts[row + 1])
        alone = replace(
            batch,
            token_ids=batch.token_ids[tokens],
            query_start=batch.query_start.new_tensor([0, num_queries]),
            seq_lens=batch.seq_lens[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
            max_seq_len=batch.seq_lens_host[row],
            num_decode_rows=int(num_queries == 1),
        )
        out = attend(
            CudaOps(Fallbacks()), Attention(alone, own.cache, own.query[tokens]), case.params
        )
        assert torch.equal(out, together[tokens]), row


def test_rows_give_the_same_bits_in_any_batch(ops: CudaOps) -> None:
    x, residual = randn(20, 640, dtype=torch.bfloat16), randn(20, 640, dtype=torch.bfloat16, seed=1)
    weight = randn(640, seed=2)
    own = projection(20, (6, 2), 64, 64, torch.bfloat16)

    def results(rows: slice) -> list[torch.Tensor]:
        rotated = ops.rotary(own.query[rows], own.key[rows], own.cos[rows], own.sin[rows])
        normed = ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6)
        return [*rotated, *normed, ops.swiglu(x[rows])]

    for alone, together in zip(results(slice(13, 14)), results(slice(None)), strict=True):
        assert torch.equal(alone[0], together[13])


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_heads_that_an_adapted_model_transposed(ops: CudaOps, num_kv_heads: int) -> None:
    case = Case(((1, 3), (2, 5)), num_kv_heads, 1, 16)
    own = prepare(case)
    transposed = own.query.transpose(0, 1).contiguous().transpose(0, 1)
    expected = attend(ops, own, case.params)
    assert torch.equal(attend(ops, replace(own, query=transposed), case.params), expected)
    other = nan_cache(own.cache.num_blocks, num_kv_heads, case.block_size, own.query)
    plan = ops.plan_attention(own.batch, other)
    ops.write_kv(transposed, transposed, other.layers[0], plan)
    stored = other.layers[0].key.transpose(1, 2).flatten(0, 1)[own.batch.slot_mapping]
    assert torch.equal(stored, own.query)


def test_heads_beyond_the_kernels_fall_back_aloud() -> None:
    case = Case(((1, 3), (2, 5)), 1, 1, 264)
    own, ops = prepare(case), CudaOps(Fallbacks())
    close(attend(ops, own, case.params), attend(ReferenceOps(), own, case.params))
    ((operator, reason),) = ops.fallbacks.counts()
    assert (operator, reason) == ("attention", "heads of 264 are beyond 256")


def test_a_cache_of_other_strides_is_refused(ops: CudaOps) -> None:
    case = Case(((1, 3),))
    own = prepare(case)
    parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in own.cache.layers[0]]
    plan = ops.plan_attention(own.batch, own.cache)
    with pytest.raises(AssertionError):
        ops.paged_attention(own.query, LayerKv(*parts), plan, case.params)
