"""The compiled kernels against the reference operators, on every build that this machine runs."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvSpec, allocate_kv_cache
from executor_svc.models.decoder_config import DecoderConfig
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import Ops
from executor_svc.ops.reference import ReferenceOps
from tests.unit.native_models import (
    BUILD_NAMES,
    GEMMA_LIKE,
    QWEN_LIKE,
    best_build,
    has_bfloat_dot,
    load_build,
    make_config,
    make_fused,
    make_reference,
)
from tests.unit.test_ops import AttentionCase, _attend, attention_cases

# A result that is rounded to bfloat16 may round the other way: one unit in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
HEAD_SIZES = (64, 80, 96, 128, 256)
any_batch = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(params=BUILD_NAMES)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(load_build(request.param), num_threads=2)


@any_batch
@given(
    tokens=st.integers(0, 40) | st.sampled_from([64, 100, 300]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 300)),
    has_bias=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_linear_agrees(
    ops: NativeOps, tokens: int, sizes: tuple[int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    """Any number of rows, and sizes that fill no panel, tile or strip; activations stay float32,
    but for weights that the processor's dot product takes, which has both sides in bfloat16."""
    torch.manual_seed(0)
    weight, x = torch.randn(sizes).to(dtype), torch.randn(tokens, sizes[1])
    bias = torch.randn(sizes[0]) if has_bias else None
    actual = ops.linear(x, ops.prepare_linear(weight, bias))
    if dtype == torch.bfloat16 and has_bfloat_dot(ops.functions):
        x = x.to(dtype)
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    # Relative to what is summed, not to what is left when terms cancel.
    scale = x.abs().double() @ weight.abs().double().T + 1
    assert ((actual - exact).abs() <= 1e-6 * scale).all()


@any_batch
@given(attention_cases())
def test_paged_attention_agrees_on_any_batch(ops: NativeOps, case: AttentionCase) -> None:
    _assert_attention_agrees(ops, case)


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_paged_attention_agrees_beyond_one_split(
    ops: NativeOps, head_dim: int, dtype: torch.dtype
) -> None:
    """Contexts around multiples of 256, where partial results are merged; windows that cut them."""
    spans = ((1, 255), (1, 256), (1, 0), (1, 700), (90, 200), (33, 512))
    case = AttentionCase(spans, 2, 3, head_dim, 16, dtype=dtype)
    _assert_attention_agrees(ops, case)
    _assert_attention_agrees(ops, replace(case, sliding_window=300, soft_cap=4.0))
    _assert_attention_agrees(ops, replace(case, spans=((1, 1500),), sliding_window=None))
    # Rows of one work item of which only the first still see the first split.
    _assert_attention_agrees(ops, replace(case, spans=((60, 500),), sliding_window=270))


def test_attention_with_many_heads_to_a_key_head(ops: NativeOps) -> None:
    """More query heads share a key head than fit into one work item."""
    _assert_attention_agrees(ops, AttentionCase(((1, 300), (5, 30)), 1, 71, 64, 16))


def _assert_attention_agrees(ops: NativeOps, case: AttentionCase) -> None:
    expected, actual = _attend(ReferenceOps(), case), _attend(ops, case)
    tolerance = TOLERANCE[case.dtype]
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 33, 256])
@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_elementwise_operators_agree(ops: NativeOps, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size *= 2
    x, residual = (torch.randn(5, 3, size).mul_(3).to(dtype) for _ in range(2))
    weight, angles = torch.randn(size), torch.randn(5, size // 4 + 1)

    def results(own: Ops) -> list[torch.Tensor]:
        return [
            own.rms_norm(x, weight, 1e-6),
            *own.add_rms_norm(x, residual, weight, 1e-5),
            *own.rotary(x, residual, angles.cos()[:, : size // 2], angles.sin()[:, : size // 2]),
            own.swiglu(x.float().flatten(1)),
            own.geglu(x.float().flatten(1)),
        ]

    tolerance = TOLERANCE[dtype]
    for expected, actual in zip(results(ReferenceOps()), results(ops), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_activations_at_the_ends(ops: NativeOps) -> None:
    """Gates so large that exp overflows, and so small that tanh would cancel."""
    gate = torch.tensor([-1e4, -200.0, -88.0, -1e-4, 0.0, 1e-4, 0.6, 20.0, 88.0, 200.0, 1e4])
    gate_up = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    for name in ("swiglu", "geglu"):
        expected = getattr(ReferenceOps(), name)(gate_up)
        actual = getattr(ops, name)(gate_up)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-30)
    assert ops.swiglu(torch.tensor([[float("nan"), 1.0]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_write_kv_rounds_as_torch_does(ops: NativeOps, dtype: torch.dtype) -> None:
    """To nearest even; overflow, subnormals, infinities and NaN included."""
    edges = [0.0, -0.0, 1e-45, 6e-8, 5.9e-8, 1e-5, 65504.0, 65519.9, 65520.0, 1e30, 3.4e38]
    values = torch.tensor([*edges, float("inf"), float("nan")])
    many = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    key = torch.cat([values, -values, many, many * 1e-6])[None, None]
    key = torch.nn.functional.pad(key, (0, -key.shape[-1] % 256)).view(1, -1, 256)
    value = key.flip(0) * 0.5
    batch = ForwardBatch.from_spans([Span([1], 0, [1])], 4)
    cache = allocate_kv_cache(KvSpec(1, key.shape[1], 256, dtype), 2, 4)
    ops.write_kv(key, value, cache.layers[0], ops.plan_attention(batch, cache))
    for part, written in ((cache.layers[0].key, key), (cache.layers[0].value, value)):
        expected = written[0].to(dtype)
        torch.testing.assert_close(part[1, :, 0], expected, rtol=0, atol=0, equal_nan=True)
        assert not part[0].any()


@pytest.mark.parametrize("config", [QWEN_LIKE, GEMMA_LIKE, make_config()])
@pytest.mark.parametrize("build", BUILD_NAMES)
def test_the_fused_step_agrees(build: str, config: DecoderConfig) -> None:
    """A whole step: every token's logits, in chunks and alone."""
    fused, reference = make_fused(config, load_build(build), 2), make_reference(config)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (400,), generator=generator).tolist()
    outputs = []
    for model in (reference, fused):
        cache = allocate_kv_cache(model.kv_spec, 64, 16)
        spans = [Span(tokens[:130], 0, [*range(20, 30)]), Span(tokens[130:], 0, [*range(1, 18)])]
        first = _with_all_logits(ForwardBatch.from_spans(spans, 16))
        second = ForwardBatch.from_spans([Span([5], 130, [*range(20, 30)])], 16)
        outputs.append(torch.cat([model.forward(batch, cache) for batch in (first, second)]))
    expected, actual = outputs
    assert actual.shape == (401, config.vocab_size)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def _with_all_logits(batch: ForwardBatch) -> ForwardBatch:
    return replace(batch, logits_indices=torch.arange(batch.num_tokens))


def test_the_weights_and_the_cache_may_be_bfloat16() -> None:
    config = GEMMA_LIKE
    fused, reference = make_fused(config, best_build(), 1, torch.bfloat16), make_reference(config)
    batch = ForwardBatch.from_spans([Span(range(40), 0, [1, 2, 3])], 16)
    assert fused.kv_spec.dtype == torch.bfloat16
    expected, actual = (
        model.forward(batch, allocate_kv_cache(model.kv_spec, 4, 16))
        for model in (reference, fused)
    )
    assert (actual - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("wrong", ["token_ids", "slot_mapping", "logits_indices"])
@pytest.mark.parametrize("value", [-1, 1 << 40])
def test_a_wrong_index_raises_and_writes_nothing(wrong: str, value: int) -> None:
    fused = make_fused(QWEN_LIKE, best_build())
    cache = allocate_kv_cache(fused.kv_spec, 3, 16)
    batch = ForwardBatch.from_spans([Span([1, 2, 3], 0, [1])], 16)
    getattr(batch, wrong)[0] = value
    with pytest.raises(IndexError, match="out of range"):
        fused.forward(batch, cache)
    assert not any(part.any() for layer in cache.layers for part in layer)


def test_a_second_cache_is_not_mistaken_for_the_first() -> None:
    fused = make_fused(QWEN_LIKE, best_build())
    batch = ForwardBatch.from_spans([Span([1, 2, 3], 0, [1])], 16)
    caches = [allocate_kv_cache(fused.kv_spec, 3, 16) for _ in range(2)]
    first, second = (fused.forward(batch, cache) for cache in caches)
    assert torch.equal(first, second)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(*(layer.key for layer in layers))
        assert layers[0].key[1].any()


def test_idle_threads_use_no_processor() -> None:
    fused = make_fused(QWEN_LIKE, best_build(), num_threads=4)
    batch = ForwardBatch.from_spans([Span(range(300), 0, [*range(1, 20)])], 16)
    fused.forward(batch, allocate_kv_cache(fused.kv_spec, 20, 16))
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.1
