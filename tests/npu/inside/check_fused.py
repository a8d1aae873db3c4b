"""The fused operators of a decoder layer, against the formulas of their documentation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _close(actual: Tensor, expected: Tensor) -> None:
    wide = actual.dtype == torch.float32
    tolerance = 1e-5 if wide else 2e-2
    torch.testing.assert_close(
        actual.cpu(), expected.to(actual.dtype), rtol=tolerance, atol=tolerance
    )


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * gamma.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 128)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gamma = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    out, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), epsilon=1e-5)
    _close(out, _rms_norm(x, gamma, 1e-5))
    assert rstd.dtype == torch.float32
    _close(rstd, torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5))


def test_rms_norm_with_a_float32_gamma() -> None:
    x, gamma = torch.randn(5, 64).bfloat16(), torch.randn(64)
    out, _ = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), epsilon=1e-5)
    _close(out, _rms_norm(x, gamma, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, gamma = (torch.randn(*shape).to(dtype) for shape in ((5, 64), (5, 64), (64,)))
    out, _, total = torch_npu.npu_add_rms_norm(x.npu(), residual.npu(), gamma.npu(), 1e-6)
    _close(total, x + residual)
    _close(out, _rms_norm(x + residual, gamma, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    _close(torch_npu.npu_swiglu(x.npu()), F.silu(gate) * up)


def _rotate(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_mul(mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 1, 4, 64).to(dtype)
    cos, sin = torch.rand(5, 1, 1, 64).to(dtype), torch.rand(5, 1, 1, 64).to(dtype)
    actual = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), rotary_mode=mode)
    _close(actual, x.float() * cos.float() + _rotate(x.float(), mode) * sin.float())


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_mrope_with_plain_positions(mode: str, rotary_dim: int) -> None:
    positions = torch.tensor([3, 0, 7])
    query, key, table = torch.randn(3, 4 * 64), torch.randn(3, 2 * 64), torch.randn(8, rotary_dim)
    # Without mrope_section torch_npu passes on the address of a list that is gone.
    options = {"mrope_section": [0, 0, 0], "rotary_mode": mode}
    out = torch_npu.npu_mrope(positions.npu(), query.npu(), key.npu(), table.npu(), 64, **options)
    cos, sin = table[positions].chunk(2, dim=-1)
    is_half = mode == "half"
    cos, sin = (
        torch.cat([part, part], -1)[:, None] if is_half else part.repeat_interleave(2, -1)[:, None]
        for part in (cos, sin)
    )
    for actual, x in zip(out, (query, key), strict=True):
        heads = x.view(3, -1, 64)
        turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
        turned = turned * cos + _rotate(turned, "half" if is_half else "interleave") * sin
        _close(actual, torch.cat([turned, rest], dim=-1).view(x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_pa_kv_cache_skips_padding(dtype: torch.dtype) -> None:
    key, value = torch.randn(4, 2, 128).to(dtype), torch.randn(4, 2, 128).to(dtype)
    caches = [torch.zeros(3, 128, 2, 128, dtype=dtype) for _ in "kv"]
    on_device = [cache.npu() for cache in caches]
    slots = [130, -1, 5, 383]
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(),
        value.npu(),
        *on_device,
        torch.tensor(slots, dtype=torch.int32).npu(),
        cache_mode="Norm",
    )
    for cache, source in zip(caches, (key, value), strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                cache.flatten(0, 1)[slot] = source[token]
    assert all(torch.equal(one.cpu(), other) for one, other in zip(on_device, caches, strict=True))


def _top_k_top_p(logits: Tensor, p: Tensor | None, k: Tensor | None) -> Tensor:
    kept = logits.clone()
    for row in range(len(logits)):
        values, places = logits[row].float().sort(stable=True)
        if k is not None:
            values[values < values[len(values) - int(k[row])]] = float("-inf")
        if p is not None:
            below = values.softmax(-1).cumsum(-1) <= 1 - p[row]
            below[-1] = False
            values[below] = float("-inf")
        kept[row, places] = values.to(logits.dtype)
    return kept


@pytest.mark.parametrize("uses", ["p", "k", "pk"])
def test_top_k_top_p(uses: str) -> None:
    logits = torch.randn(3, 50).mul(4).round()  # ties
    p = torch.tensor([0.3, 0.9, 1.0]) if "p" in uses else None
    k = torch.tensor([1, 7, 50], dtype=torch.int32) if "k" in uses else None
    actual = torch_npu.npu_top_k_top_p(
        logits.npu(), p if p is None else p.npu(), k if k is None else k.npu()
    )
    assert torch.equal(actual.cpu(), _top_k_top_p(logits, p, k))
