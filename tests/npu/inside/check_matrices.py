"""Matrix products, with ordinary weights and with weights in FRACTAL_NZ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu

FRACTAL_NZ = 29


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    x, weight = torch.randn(5, 48).to(dtype), torch.randn(32, 48).to(dtype)
    offset = torch.randn(32).to(dtype) if bias else None
    expected = F.linear(x, weight, offset)
    actual = F.linear(x.npu(), weight.npu(), None if offset is None else offset.npu())
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_products_of_each_rank() -> None:
    a, b, c = torch.randn(4, 6), torch.randn(6, 8), torch.randn(4, 8)
    batch_a, batch_b = torch.randn(3, 4, 6), torch.randn(3, 6, 8)
    for expected, actual in (
        (a.mm(b), a.npu().mm(b.npu())),
        (a.npu().t().cpu().t() @ b, a.npu() @ b.npu()),
        (
            torch.addmm(c, a, b, beta=0.5, alpha=2),
            torch.addmm(c.npu(), a.npu(), b.npu(), beta=0.5, alpha=2),
        ),
        (batch_a.bmm(batch_b), batch_a.npu().bmm(batch_b.npu())),
        (torch.matmul(batch_a, b), torch.matmul(batch_a.npu(), b.npu())),
    ):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("shape", [(32, 48), (40, 24)])
def test_a_weight_in_nz_format(shape: tuple[int, int]) -> None:
    torch.npu.config.allow_internal_format = True
    weight = torch.randn(shape).to(torch.bfloat16)
    x = torch.randn(5, shape[1]).to(torch.bfloat16)
    tiled = torch_npu.npu_format_cast(weight.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(tiled) == FRACTAL_NZ
    torch.testing.assert_close(
        F.linear(x.npu(), tiled).cpu(), F.linear(x, weight), rtol=2e-2, atol=2e-2
    )
    back = torch_npu.npu_format_cast(tiled, 2)
    assert torch.equal(back.cpu(), weight)


def test_the_operands_have_one_dtype() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 2, device="npu"), torch.ones(2, 2, device="npu").bfloat16())
