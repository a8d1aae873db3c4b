"""The screen of a head: whatever it passes over, the chosen tokens are those of a full search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.packing import Packer
from executor_svc.ops.native.quantized_packing import QuantizedPacker
from executor_svc.ops.native.screening import make_screen
from tests.unit.native_models import BUILD_NAMES, load_build, make_config, make_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPS = (0.0, 0.5, 30.0)
INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=BUILD_NAMES)
def library(request: pytest.FixtureRequest) -> Library:
    found = load_build(request.param)
    if found.functions.headrace_screen_bytes(1, 1) == 0:
        pytest.skip(f"the {found.name} build makes no screens")
    return found


class Head:
    """A packed head that searches with its screen and without."""

    def __init__(self, library: Library, weight: Tensor) -> None:
        self._ops = NativeOps(library, num_threads=2)
        self.packed = self._ops.prepare_linear(weight)
        self.screen = make_screen(self._ops.functions, self._ops.pool, self.packed)

    def choose(self, x: Tensor, cap: float = 0.0, *, is_screened: bool = True) -> list[int]:
        assert not is_screened or self.screen is not None
        screen = self.screen if is_screened else None
        return self._ops.choose_tokens(x, self.packed, screen, cap).tolist()

    def argmax(self, x: Tensor, cap: float = 0.0) -> list[int]:
        """numpy's, over the logits that the same kernels give when they are asked for them."""
        logits = self._ops.linear(x, self.packed)
        if cap > 0:
            self._ops.functions.headrace_soft_cap(logits.data_ptr(), cap, logits.numel())
        return logits.numpy().argmax(axis=-1).tolist()  # type: ignore[no-any-return]


def _assert_same(head: Head, x: Tensor, cap: float = 0.0) -> None:
    expected = head.argmax(x, cap)
    assert head.choose(x, cap) == expected
    assert head.choose(x, cap, is_screened=False) == expected


def _make_weight(kind: str, size: int, depth: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(size, depth)
    if kind == "repeated":
        weight = weight[torch.randint(min(7, size), (size,))]
    elif kind == "equal":
        weight = weight[:1].expand(size, depth)
    elif kind == "near":  # one element in one row of all differs, by the least step there is
        weight = weight[:1].expand(size, depth).to(dtype).clone()
        row = int(torch.randint(size, ()))
        weight[row, 0] = torch.nextafter(weight[row, 0], torch.tensor(9.0, dtype=dtype))
    elif kind == "peaked":  # one element is so large that the codes of the others are zeros
        weight[torch.arange(size), torch.randint(depth, (size,))] *= 300
    elif kind == "uneven":
        weight *= torch.logspace(-3, 1, size)[torch.randperm(size), None]
    elif kind == "cluster":  # more rows of the largest logit than are few, fewer than all
        weight[: size // 3] = 4 * weight[:1]
    elif kind == "holes":
        weight *= torch.rand(size, 1) < 0.5
    return weight.to(dtype).contiguous()


KINDS = ("normal", "repeated", "equal", "near", "peaked", "uneven", "cluster", "holes")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 2, 11, 13, 40]),
    size=st.sampled_from([1, 31, 33, 1000, 2500]),
    depth=st.sampled_from([1, 2, 5, 64, 129, 300]),
    dtype=st.sampled_from(DTYPES),
    cap=st.sampled_from(CAPS),
)
def test_a_screened_search_chooses_what_a_full_one_chooses(
    library: Library,
    seed: int,
    kind: str,
    rows: int,
    size: int,
    depth: int,
    dtype: torch.dtype,
    cap: float,
) -> None:
    torch.manual_seed(seed)
    weight = _make_weight(kind, size, depth, dtype)
    x = torch.randn(rows, depth)
    if kind == "peaked":
        x[:, 0] *= 100
    _assert_same(Head(library, weight), x, cap)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1 << 30),
    weight_scale=st.sampled_from([1e-44, 1e-38, 1e-30, 1e-17, 1e-15, 1e15, 1e18]),
    scale=st.sampled_from([0.0, 1e-44, 1e-38, 1e-20, 1e-10, 1e-9, 1e11, 1e12, 1e20]),
    depth=st.sampled_from([3, 64, 200]),
    cap=st.sampled_from(CAPS),
)
def test_from_denormals_to_overflow_the_tokens_are_the_same(
    library: Library, seed: int, weight_scale: float, scale: float, depth: int, cap: float
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(1500, depth) * weight_scale, torch.randn(7, depth) * scale
    x[3] = torch.randn(depth)
    for dtype in (torch.float32, torch.bfloat16):
        _assert_same(Head(library, weight.to(dtype)), x, cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_numbers_or_zeros_do_not_disturb_the_others(
    library: Library, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    head, x = Head(library, torch.randn(1500, 64).to(dtype)), torch.randn(30, 64)
    x[2, 5], x[3, 63], x[17, 0], x[18], x[29] = NAN, INFINITY, -INFINITY, NAN, 0.0
    _assert_same(head, x)
    assert head.choose(x)[2] == head.choose(x)[29] == 0


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, 3e38])
def test_weights_without_finite_squares_have_no_screen(library: Library, value: float) -> None:
    weight = torch.randn(1500, 64)
    weight[1499, 63] = value
    assert Head(library, weight).screen is None


def test_equals_behind_the_cap_give_the_first(library: Library) -> None:
    """The largest logit stands behind others that the cap, which saturates, makes its equals."""
    torch.manual_seed(0)
    weight = torch.randn(2000, 64)
    weight[700], weight[1900] = 4.0, 5.0
    head, x = Head(library, weight), torch.ones(3, 64)
    assert head.choose(x) == [1900] * 3
    assert head.choose(x, 10.0) == head.argmax(x, 10.0)
    assert head.choose(x, 10.0)[0] <= 700


def _rounded_weights() -> tuple[Tensor, Tensor]:
    """Codes fall short of the best row by as much as they can; those of its rival are exact."""
    weight, x = torch.zeros(2000, 512), torch.ones(1, 512)
    weight[30], weight[1900], weight[1900, ::4] = 10.4375, 10.0, 11.0
    weight[:, 0] = 127.0
    return weight, x


def _rounded_activations() -> tuple[Tensor, Tensor]:
    """The same with the codes of the activations that the best row multiplies."""
    weight, x = torch.zeros(2000, 512), torch.full((1, 512), 10.0)
    x[0, :256] = 10.4375
    weight[30, :256], weight[1900, 256:], weight[1900, 256::5] = 10.0, 10.0, 11.0
    weight[:, 0] = x[0, 0] = 127.0
    return weight, x


def _rounded_sums() -> tuple[Tensor, Tensor]:
    """All codes are exact, but behind 2^25 the kernel rounds each 125 up and each 127 down."""
    weight, x = torch.zeros(2000, 4096), torch.full((1, 4096), 127.0)
    weight[30] = 125.0
    weight[1900, 0:4063:2], weight[1900, 1:4063:2], weight[1900, 4063] = 127.0, 125.0, 68.0
    return weight, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [_rounded_weights, _rounded_activations, _rounded_sums])
def test_the_best_row_is_found_behind_a_rival_that_looks_better(
    library: Library, case: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    """Each case needs one term of the bound: without it the rival's logit is above the bound."""
    weight, x = case()
    head = Head(library, weight.to(dtype))
    assert head.argmax(x) == [30]
    _assert_same(head, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [64, 512])
def test_panels_without_a_chance_are_not_read(
    library: Library, dtype: torch.dtype, depth: int
) -> None:
    """Behind the screen's back most weights become large: whoever read them would choose them."""
    torch.manual_seed(0)
    weight = torch.randn(4096, depth).to(dtype) * 0.1
    x = torch.randn(13, depth)
    wanted = torch.randperm(1024)[:13]  # in the first quarter of the panels
    weight[wanted] = x.sign().to(dtype)
    head = Head(library, weight)
    assert head.choose(x) == wanted.tolist()
    assert head.packed.packed is not None
    panels = head.packed.packed.view(4, -1)
    panels[1:] = 9.0
    assert head.choose(x, is_screened=False) != wanted.tolist()
    assert head.choose(x) == wanted.tolist()


def test_a_screen_takes_half_of_the_bytes_of_a_bfloat16_head(library: Library) -> None:
    out_size, in_size = 32768, 1024
    num_bytes = library.functions.headrace_screen_bytes(out_size, in_size)
    assert out_size * in_size <= num_bytes < 1.01 * out_size * in_size
    assert library.functions.headrace_screen_bytes(32, 1 << 17) == 0  # sums would overflow


def test_only_heads_of_floats_without_a_bias_have_a_screen(library: Library) -> None:
    weight, packer, ops = torch.randn(64, 32), QuantizedPacker(library), NativeOps(library)
    screen_of = partial(make_screen, ops.functions, ops.pool)
    assert screen_of(packer.prepare_linear(weight)) is not None
    assert screen_of(packer.prepare_linear(weight, torch.zeros(64))) is None
    assert screen_of(packer.quantize_linear(weight, int8_activations=False)) is None


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_decoder_counts_its_screen_in_place_of_its_head(library: Library, is_tied: bool) -> None:
    config = make_config(tie_word_embeddings=is_tied, vocab_size=4096)
    weights = make_weights(config, Packer(library), torch.bfloat16)
    screen_bytes = library.functions.headrace_screen_bytes(4096, config.hidden_size)
    model = FusedDecoder(config, weights, library, num_threads=1)
    assert model.weight_bytes == weights.num_bytes - weights.head.num_bytes + screen_bytes
