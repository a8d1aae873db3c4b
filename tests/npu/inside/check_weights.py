"""Projections in the cube units' tiles, as the product stores them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.npu import NpuOps
from executor_svc.ops.npu_weights import FRACTAL_NZ


def _make(fallbacks: Fallbacks | None = None) -> NpuOps:
    device = torch.device("npu", torch.npu.current_device())
    return NpuOps(fallbacks or Fallbacks(), device, tiles_weights=True)


def _half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projection_is_tiled_and_its_source_is_not(dtype: torch.dtype, has_bias: bool) -> None:
    ops, x, weight = _make(), _half(5, 48, dtype=dtype), _half(32, 48, dtype=dtype)
    bias = _half(32, dtype=dtype) if has_bias else None
    on_device = weight.npu()
    prepared = ops.prepare_linear(on_device, None if bias is None else bias.npu())
    assert torch_npu.get_npu_format(prepared.weight) == FRACTAL_NZ
    actual = ops.linear(x.npu(), prepared).cpu()
    torch.testing.assert_close(actual, F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
    # A tied embedding is gathered from, which tiles do not allow.
    assert torch_npu.get_npu_format(on_device) != FRACTAL_NZ
    assert torch.equal(F.embedding(torch.tensor([3]).npu(), on_device).cpu()[0], weight[3])


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(32, 48), "float32 weights"),
        (_half(40, 48), "a matrix of 40 x 48"),
        (_half(32, 24), "a matrix of 32 x 24"),
    ],
)
def test_what_cannot_be_tiled_is_counted(weight: Tensor, reason: str) -> None:
    fallbacks = Fallbacks()
    prepared = _make(fallbacks).prepare_linear(weight.npu())
    assert torch_npu.get_npu_format(prepared.weight) != FRACTAL_NZ
    assert fallbacks.counts() == {("weight_tiles", reason): 1}


def test_a_recorded_step_reads_tiles() -> None:
    ops, weight, x = _make(), _half(32, 48), _half(5, 48)
    prepared, source, stream = ops.prepare_linear(weight.npu()), x.npu(), torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.stream(stream):
        ops.linear(source, prepared)
        with torch.npu.graph(graph, stream=stream):
            out = ops.linear(source, prepared)
        source.copy_(-source)
        graph.replay()
    stream.synchronize()
    torch.testing.assert_close(out.cpu(), F.linear(-x, weight), rtol=2e-2, atol=2e-2)
