"""gelu on an NPU: torch_npu's own approximates always, the product's does when it is asked to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu  # noqa: F401  registers the device

from executor_svc.ops.npu_gelu import ExactGelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_the_one_that_is_asked_for(dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 99).to(dtype)
    exact, approximate = F.gelu(x), F.gelu(x, approximate="tanh")
    assert not torch.equal(exact, approximate)
    assert torch.equal(F.gelu(x.npu()).cpu(), approximate)
    replaced = ExactGelu()
    assert torch.equal(F.gelu(x.npu()).cpu(), exact)
    assert torch.equal(torch.nn.GELU()(x.npu()).cpu(), exact)
    assert torch.equal(F.gelu(x.npu(), approximate="tanh").cpu(), approximate)
    del replaced
    assert torch.equal(F.gelu(x.npu()).cpu(), approximate)
