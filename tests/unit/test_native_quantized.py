"""The kernels for quantized weights against float products of their values, on every build."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.quantized_packing import INT8, INT8_DIGITS, QuantizedPacker
from executor_svc.quantization.weight import Layout, QuantizedWeight, join_quantized
from tests.unit.native_models import BUILD_NAMES, load_build

any_weight = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
sizes = st.tuples(st.integers(1, 140), st.integers(1, 400))
DIGITS_LIMIT = 127 * 257  # the largest number of two digits, as linear_dot.c has it
layouts = st.builds(Layout, st.sampled_from([4, 8]), st.sampled_from([2, 32, 64, 128, 1000]))

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(params=BUILD_NAMES)
def kernels(request: pytest.FixtureRequest) -> tuple[NativeOps, QuantizedPacker]:
    library = load_build(request.param)
    return NativeOps(library, num_threads=2), QuantizedPacker(library)


def _draw(
    layout: Layout, out_size: int, in_size: int, *, has_zeros: bool = False, has_order: bool = False
) -> QuantizedWeight:
    """All codes that the bits allow, the lowest included."""
    torch.manual_seed(0)
    middle, groups = 1 << (layout.bits - 1), -(-in_size // layout.group_size)
    codes = torch.randint(-middle, middle, (out_size, in_size)).to(torch.int8)
    scales = torch.rand(out_size, groups) + 0.1
    zeros = torch.randint(-middle, middle + 1, (out_size, groups)).float() if has_zeros else None
    return QuantizedWeight(
        layout, codes, scales, zeros, torch.randperm(in_size) if has_order else None
    )


def _rounding_bound(x: Tensor, values: Tensor, weight: LinearWeight) -> Tensor | float:
    """What activations in two digits may cost [m, out]: half a step of each row for each term."""
    if weight.grid is None or weight.grid.code != INT8_DIGITS:
        return 0.0
    step = x.abs().amax(1, keepdim=True) / DIGITS_LIMIT
    return step / 2 * values.abs().sum(1) * 1.01  # rounded after a product that was rounded


def _assert_close(
    actual: Tensor, x: Tensor, drawn: QuantizedWeight, packed: LinearWeight, bias: Tensor | None
) -> None:
    x, weight = x.double(), drawn.dequantize().double()
    exact = torch.nn.functional.linear(x, weight, None if bias is None else bias.double())
    # Relative to what is summed, not to what is left when terms cancel: a code and a zero do too.
    largest = 2.0**drawn.layout.bits * drawn.scales.amax(1).double()
    scale = x.abs().sum(1, keepdim=True) * largest + 1
    assert ((actual - exact).abs() <= 3e-7 * scale + _rounding_bound(x, weight, packed)).all()


def _assert_row_by_row(ops: NativeOps, x: Tensor, weight: LinearWeight, together: Tensor) -> None:
    """Each row alone, and in pairs and sevens, is what it is among all."""
    for size in (1, 2, 7):
        parts = [ops.linear(part, weight) for part in x.split(size)]
        assert torch.equal(torch.cat(parts).view(torch.int32), together.view(torch.int32))


@any_weight
@given(
    tokens=st.integers(1, 40) | st.sampled_from([100, 300]),
    sizes=sizes,
    layout=layouts,
    has_bias=st.booleans(),
    has_zeros=st.booleans(),
    has_order=st.booleans(),
)
def test_weights_in_groups_agree(
    kernels: tuple[NativeOps, QuantizedPacker],
    tokens: int,
    sizes: tuple[int, int],
    layout: Layout,
    has_bias: bool,
    has_zeros: bool,
    has_order: bool,
) -> None:
    """Any size, groups that do not divide the columns, one group for all; and batch invariance."""
    ops, packer = kernels
    drawn = _draw(layout, *sizes, has_zeros=has_zeros, has_order=has_order)
    bias = torch.randn(sizes[0]) if has_bias else None
    weight, x = packer.prepare_quantized(drawn, bias), torch.randn(tokens, sizes[1])
    actual = ops.linear(x, weight)
    _assert_close(actual, x, drawn, weight, bias)
    _assert_row_by_row(ops, x, weight, actual)


@any_weight
@given(tokens=st.integers(1, 40) | st.sampled_from([100, 300]), sizes=sizes, has_bias=st.booleans())
def test_int8_activations_agree(
    kernels: tuple[NativeOps, QuantizedPacker],
    tokens: int,
    sizes: tuple[int, int],
    has_bias: bool,
) -> None:
    ops, packer = kernels
    drawn = _draw(Layout(8, sizes[1], int8_activations=True), *sizes)
    bias = torch.randn(sizes[0]) if has_bias else None
    weight = packer.prepare_quantized(drawn, bias)
    # Exact codes as activations: what is rounded is known, whichever way halves go.
    codes = torch.randint(-127, 128, (tokens, sizes[1])).float()
    codes[:, 0] = 127
    x = codes * 2.0 ** torch.randint(-3, 4, (tokens, 1))
    actual = ops.linear(x, weight)
    _assert_close(actual, x, drawn, weight, bias)
    _assert_row_by_row(ops, x, weight, actual)


def test_int8_activations_are_rounded_to_the_nearest(
    kernels: tuple[NativeOps, QuantizedPacker],
) -> None:
    ops, packer = kernels
    drawn = _draw(Layout(8, 100, int8_activations=True), 50, 100)
    x = torch.randn(5, 100)
    x[2] = 0
    largest = x.abs().amax(1, keepdim=True)
    error = ops.linear(x, packer.prepare_quantized(drawn)) - x @ drawn.dequantize().T
    # Half a step of 1/127 for each element, and a little for rounding in float.
    bound = largest / 254 * drawn.dequantize().abs().sum(1) * 1.001 + 1e-4
    assert (error.abs() <= bound).all()
    assert (error[2] == 0).all()


@any_weight
@given(
    sizes=sizes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    int8_activations=st.booleans(),
)
def test_quantizing_at_load_rounds_as_torch_does(
    kernels: tuple[NativeOps, QuantizedPacker],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    int8_activations: bool,
) -> None:
    """Rows of zeros too; the packed bytes are those of codes that torch computed."""
    _, packer = kernels
    torch.manual_seed(0)
    weight = torch.randn(sizes).to(dtype)
    weight[sizes[0] // 2] = 0
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scales.where(scales > 0, 1.0)).round().to(torch.int8)
    layout = Layout(8, sizes[1], int8_activations)
    expected = packer.prepare_quantized(QuantizedWeight(layout, codes, scales))
    actual = packer.quantize_linear(weight, int8_activations=int8_activations)
    assert actual.packed is not None and expected.packed is not None
    assert actual.grid is not None and expected.grid is not None
    assert actual.grid.code == expected.grid.code and actual.grid.group_size == 0
    assert torch.equal(actual.grid.scales, expected.grid.scales.flatten())
    # In steps of several codes, what fills the last step does not matter and may differ.
    full = sizes[0] // packer.panel * packer.panel * sizes[1] if actual.grid.code == INT8 else 0
    assert torch.equal(actual.packed[:full], expected.packed[:full])
    ops, _ = kernels
    x = torch.randn(3, sizes[1])
    assert torch.equal(ops.linear(x, actual), ops.linear(x, expected))


def _outliers(num_rows: int, size: int) -> Tensor:
    """Activations as large models have them: a few columns a hundred times the others."""
    x = torch.randn(num_rows, size)
    x[:, :: size // 4] *= 100
    return x


@pytest.mark.parametrize("size", [1024, 14336])
@pytest.mark.parametrize(("draw", "share"), [(torch.randn, 0.1), (_outliers, 1.0)])
def test_float_activations_lose_less_than_bfloat16_would(
    kernels: tuple[NativeOps, QuantizedPacker],
    draw: Callable[[int, int], Tensor],
    share: float,
    size: int,
) -> None:
    """A number is wrong by 2^-16 of the row's largest at most, in bfloat16 by 2^-9 of itself."""
    ops, packer = kernels
    torch.manual_seed(0)
    values, x = torch.randn(64, size), draw(4, size)
    codes = packer.quantize_linear(values, int8_activations=False)
    scales = values.abs().amax(1, keepdim=True) / 127
    weight = ((values / scales).round() * scales).double()
    exact = x.double() @ weight.T
    rounded = x.bfloat16().double() @ weight.T
    assert (ops.linear(x, codes) - exact).norm() < share * (rounded - exact).norm()


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_activation_that_is_no_number_stays_in_its_row(
    kernels: tuple[NativeOps, QuantizedPacker], value: float, int8_activations: bool
) -> None:
    ops, packer = kernels
    weight = packer.quantize_linear(torch.randn(40, 30), int8_activations=int8_activations)
    x = torch.randn(6, 30)
    alone = ops.linear(x, weight)
    x[3, 5] = value
    beside = ops.linear(x, weight)
    assert not beside[3].isfinite().any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(alone[others], beside[others])


def test_rows_that_hardly_differ_from_zero(kernels: tuple[NativeOps, QuantizedPacker]) -> None:
    """No factor of a row overflows: neither of zeros nor of what is nearly that."""
    ops, packer = kernels
    weight = packer.quantize_linear(torch.ones(40, 30), int8_activations=False)
    x = torch.tensor([0.0, 1e-45, 1e-38, 1e-31, 1e-29]).unsqueeze(1).expand(5, 30)
    actual = ops.linear(x, weight)
    assert torch.allclose(actual, 30 * x[:, :1].expand(5, 40), rtol=1e-4, atol=1e-28)


def test_only_equal_layouts_and_orders_join() -> None:
    one = _draw(Layout(4, 32), 5, 96, has_order=True)
    two = _draw(Layout(4, 32), 7, 96, has_zeros=True)
    assert join_quantized([one, two]) is None
    assert join_quantized([two, _draw(Layout(8, 32), 7, 96)]) is None
    plain = _draw(Layout(4, 32), 3, 96)
    joined = join_quantized([two, plain])
    assert joined is not None
    expected = torch.cat([two.dequantize(), plain.dequantize()])
    assert torch.equal(joined.dequantize(), expected)
