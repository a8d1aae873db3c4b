"""The plain operators that the executor and the sampler use, against the same call on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

Case = Callable[[Callable[[Tensor], Tensor]], object]


def _float(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _int(seed: int, high: int, *size: int) -> Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))


A, B, C = _float(0, 6, 8), _float(1, 6, 8), _float(2, 6, 8)
N, M = _int(3, 1 << 40, 6, 8), _int(4, 1000, 6, 8) + 1
ROWS = torch.tensor([4, 0, 3])
MASK = _float(5, 6, 8) > 0


def _index_put(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(A.clone())
    x.index_put_((d(ROWS), d(torch.tensor([1, 2, 3]))), d(torch.ones(3)), accumulate=True)
    return x


def _assign_rows(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(A.clone())
    x[d(ROWS)] = d(B[:3].clone())
    return x


def _assign_elements(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(A.clone())
    x[d(ROWS), d(torch.tensor([7, 0, 5]))] = float("-inf")
    return x


def _assign_true(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(torch.zeros(8, dtype=torch.bool))
    x[d(ROWS)] = True
    return x


def _count(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(torch.zeros(6, 8, dtype=torch.int32))
    x[d(ROWS), d(torch.tensor([7, 0, 5]))] += 1
    return x


def _index_add(d: Callable[[Tensor], Tensor]) -> Tensor:
    x = d(torch.zeros(8, dtype=torch.int32))
    return x.index_add_(0, d(torch.tensor([1, 1, 5])), d(torch.ones(3, dtype=torch.int32)))


def _ops() -> dict[str, Case]:
    unary = "neg exp tanh sigmoid cos sin ceil floor abs isfinite isinf isnan"
    cases: dict[str, Case] = {
        name: lambda d, name=name: getattr(torch, name)(d(A)) for name in unary.split()
    }
    compare = "eq ne lt le gt ge maximum minimum"
    cases |= {
        name: lambda d, name=name: getattr(torch, name)(d(A), d(B)) for name in compare.split()
    }
    scalar = "eq ne lt le gt ge"
    cases |= {
        f"{name} scalar": lambda d, name=name: getattr(torch, name)(d(A), 0.1)
        for name in scalar.split()
    }
    return cases


CASES: dict[str, Case] = _ops() | {
    "add": lambda d: d(A) + d(B),
    "add scalar": lambda d: d(A) + 2,
    "add broadcast": lambda d: d(A) + d(B[:, :1]),
    "sub": lambda d: d(A) - d(B),
    "sub scalar": lambda d: d(A) - 2.5,
    "scalar sub": lambda d: 1 - d(A),
    "mul": lambda d: d(A) * d(B),
    "mul scalar": lambda d: d(A) * 0.5,
    "div": lambda d: d(A) / d(B),
    "div scalar": lambda d: d(A) / 3,
    "scalar div": lambda d: 1 / d(A),
    "pow": lambda d: d(A).pow(2),
    "scalar pow": lambda d: 2.0 ** d(A),
    "rsqrt": lambda d: d(A).abs().add(1).rsqrt(),
    "sqrt": lambda d: d(A).abs().sqrt(),
    "log": lambda d: d(A).abs().log(),
    "reciprocal": lambda d: d(A).reciprocal(),
    "gelu": lambda d: F.gelu(d(A), approximate="tanh"),
    "silu": lambda d: F.silu(d(A)),
    "relu": lambda d: F.relu(d(A)),
    "softmax": lambda d: d(A).softmax(-1),
    "log_softmax": lambda d: d(A).log_softmax(-1),
    "logsumexp": lambda d: d(A).logsumexp(-1),
    "addcmul": lambda d: torch.addcmul(d(A), d(B), d(C), value=0.5),
    "where": lambda d: torch.where(d(A) > 0, d(B), d(C)),
    "where scalar": lambda d: torch.where(d(A) > 0, d(B), 0.0),
    "masked_fill": lambda d: d(A).masked_fill(d(MASK), float("-inf")),
    "masked_fill_": lambda d: d(A.clone()).masked_fill_(d(MASK), 0.0),
    "clamp": lambda d: d(A).clamp(-0.5, 0.5),
    "clamp_min": lambda d: d(A).clamp(min=0.2),
    "clamp_max_": lambda d: d(N.clone()).clamp_(max=99),
    "logical": lambda d: (d(MASK) & ~d(A > 0)) | (d(B > 0) ^ d(MASK)),
    "logical_and": lambda d: torch.logical_and(d(MASK), d(A > 0)),
    "logical_or": lambda d: torch.logical_or(d(MASK), d(A > 0)),
    "logical_not": lambda d: torch.logical_not(d(MASK)),
    "bitwise": lambda d: (d(N) & 255) | d(M) ^ d(N),
    "int mul add": lambda d: (d(M) * (1 << 22)).add_(d(torch.arange(8))),
    "int floor div": lambda d: d(N) // 4096,
    "int floor div tensor": lambda d: d(N) // d(M),
    "int remainder": lambda d: d(N) % 4096,
    "int remainder tensor": lambda d: d(N) % d(M),
    "int minimum": lambda d: torch.minimum(d(N), d(M) - 1),
    "float trunc div": lambda d: torch.div(d(A), d(B), rounding_mode="trunc"),
    "double times int": lambda d: (d(_float(9, 6).double().abs())[:, None] * d(M)).to(torch.int64),
    "ceil to int": lambda d: (d(M).sum(dim=-1, keepdim=True) * d(A[:, :1].double())).ceil().long(),
    "sum": lambda d: d(A).sum(),
    "sum dim": lambda d: d(M).sum(dim=-1),
    "mean": lambda d: d(A).pow(2).mean(-1, keepdim=True),
    "max": lambda d: d(A).max(),
    "max dim": lambda d: tuple(d(A).max(-1)),
    "min dim": lambda d: tuple(d(A).min(0)),
    "amax": lambda d: d(A).amax(dim=-1, keepdim=True),
    "amin": lambda d: d(A).amin(dim=0),
    "any": lambda d: (d(MASK).any(), d(MASK).any(-1)),
    "all": lambda d: (d(MASK).all(), d(MASK).all(0)),
    "argmax": lambda d: (d(A).argmax(-1), d(A).argmax()),
    "argmin": lambda d: d(A).argmin(-1),
    "cumsum": lambda d: (d(A).cumsum(-1), d(M).cumsum(0)),
    "sort": lambda d: tuple(d(A).sort(-1, descending=True)),
    "sort int": lambda d: tuple(d(N).sort(-1)),
    "topk": lambda d: tuple(d(A).topk(3)),
    "topk int": lambda d: d(N).topk(3).values,
    "searchsorted": lambda d: torch.searchsorted(d(M.cumsum(-1)), d(M[:, :2] * 3), right=True),
    "embedding": lambda d: F.embedding(d(ROWS.int()), d(A)),
    "index_select": lambda d: d(A).index_select(0, d(ROWS)),
    "index_select int32": lambda d: d(A).index_select(1, d(ROWS.int())),
    "gather": lambda d: d(A).gather(-1, d(_int(7, 8, 6, 2))),
    "scatter": lambda d: d(A).scatter(-1, d(_int(8, 8, 6, 1)), d(B[:, :1])),
    "scatter value": lambda d: d(A).scatter(-1, d(_int(8, 8, 6, 1)), 5.0),
    "scatter_": lambda d: d(A.clone()).scatter_(-1, d(_int(8, 8, 6, 1)), d(B[:, :1])),
    "scatter_add_": lambda d: d(A.clone()).scatter_add_(-1, d(_int(8, 8, 6, 4)), d(B[:, :4])),
    "bincount": lambda d: torch.bincount(d(ROWS), minlength=8),
    "index": lambda d: d(A)[d(ROWS)],
    "index pairs": lambda d: d(A)[d(ROWS), d(torch.tensor([1, 2, 3]))],
    "index column": lambda d: d(A)[:, d(ROWS)],
    "index_put": _index_put,
    "assign rows": _assign_rows,
    "assign elements": _assign_elements,
    "assign true": _assign_true,
    "count": _count,
    "index_add": _index_add,
    "nonzero": lambda d: d(MASK).nonzero(),
    "masked_select": lambda d: d(A)[d(MASK)],
    "assign where": lambda d: d(A.clone()).index_put_((d(MASK),), d(torch.tensor(2.0))),
    "cat": lambda d: torch.cat([d(A), d(B)], dim=-1),
    "stack": lambda d: torch.stack([d(A), d(B)]),
    "split": lambda d: tuple(part.contiguous() for part in d(A).split([3, 5], dim=-1)),
    "chunk": lambda d: d(A).chunk(2, dim=-1)[1] * 1,
    "flatten": lambda d: d(A).view(3, 2, 8).flatten(1).contiguous(),
    "repeat": lambda d: d(A).repeat(2, 1),
    "repeat_interleave": lambda d: d(A).repeat_interleave(2, dim=0),
    "flip": lambda d: d(A).flip(0),
    "triu": lambda d: d(A).triu(1),
    "tril": lambda d: d(A).tril(),
    "expand": lambda d: d(A)[:, None].expand(6, 2, 8).contiguous(),
    "pad": lambda d: F.pad(d(N), (1, 2), value=-1),
    "layer_norm": lambda d: F.layer_norm(d(A), (8,), d(B[0]), d(C[0]), 1e-5),
    "layer_norm plain": lambda d: F.layer_norm(d(A), (8,)),
    "histc": lambda d: torch.histc(d(ROWS).float(), bins=8, min=0, max=7),
    "zero_": lambda d: d(A.clone()).zero_(),
    "fill_": lambda d: d(A.clone()).fill_(3),
    "zeros_like": lambda d: torch.zeros_like(d(A)),
    "ones_like": lambda d: torch.ones_like(d(N), dtype=torch.int32),
    "one_hot": lambda d: F.one_hot(d(ROWS), 8),
    "einsum": lambda d: torch.einsum("ij,kj->ik", d(A), d(B)),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    expected, actual = CASES[name](lambda x: x), CASES[name](lambda x: x.npu())
    many = expected if isinstance(expected, tuple) else (expected,)
    found = actual if isinstance(actual, tuple) else (actual,)
    for one, other in zip(many, found, strict=True):
        assert other.device.type == "npu"
        torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=1e-6)


def test_factories() -> None:
    assert torch.arange(7, -1, -1, device="npu").cpu().tolist() == list(range(7, -1, -1))
    assert torch.full((3,), 7, dtype=torch.int32, device="npu").cpu().tolist() == [7, 7, 7]
    assert torch.tensor([1.5, 2.5], device="npu").cpu().tolist() == [1.5, 2.5]
    assert torch.linspace(0, 1, 3, device="npu").cpu().tolist() == [0.0, 0.5, 1.0]


def test_gelu_is_the_approximation_as_on_a_card() -> None:
    exact, approximate = F.gelu(A), F.gelu(A, approximate="tanh")
    torch.testing.assert_close(F.gelu(A.npu()).cpu(), approximate)
    torch.testing.assert_close(torch_npu.npu_gelu(A.npu()).cpu(), exact)
    torch.testing.assert_close(torch_npu.npu_gelu(A.npu(), approximate="tanh").cpu(), approximate)


def test_random_numbers_follow_the_seed() -> None:
    def draw() -> list[Tensor]:
        torch.npu.manual_seed(7)
        x = torch.empty(1000, device="npu")
        uniform, normal = x.uniform_().cpu(), torch.randn(1000, device="npu").cpu()
        return [uniform, normal, torch.randint(10, (100,), device="npu").cpu()]

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert 0 <= first[0].min() <= first[0].max() < 1
    assert abs(first[1].mean()) < 0.2


def test_a_tensor_can_be_printed() -> None:
    assert "2.5" in repr(torch.tensor([1.0, 2.5], device="npu"))
