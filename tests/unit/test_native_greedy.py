"""The argmax in the head against numpy's over the logits of the same step, on every build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.packing import Packer
from tests.unit.native_models import BUILD_NAMES, load_build, make_config, make_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN = 56
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=BUILD_NAMES)
def library(request: pytest.FixtureRequest) -> Library:
    return load_build(request.param)


def _choices(
    library: Library,
    head: Tensor,
    num_tokens: int = 5,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """The tokens that a model with this head chooses, and numpy's argmax of its logits."""
    config = make_config(
        vocab_size=len(head), tie_word_embeddings=False, logits_soft_cap=soft_cap, num_layers=1
    )
    packer = Packer(library)
    weights = replace(
        make_weights(config, packer, head.dtype), head=packer.prepare_linear(head, bias)
    )
    model = FusedDecoder(config, weights, library, num_threads=2)
    ids = [token % len(head) for token in range(num_tokens + 1)]
    blocks = [*range(1, 2 + len(ids) // 16)]
    batch = ForwardBatch.from_spans([Span(ids, 0, blocks)], 16)
    batch = replace(batch, logits_indices=torch.arange(num_tokens).flip(0))
    cache = allocate_kv_cache(model.kv_spec, 1 + len(blocks), 16)
    chosen = model.forward_greedy(batch, cache)
    return chosen, model.forward(batch, cache).numpy().argmax(axis=-1)


def _assert_chosen(chosen: Tensor, expected: NDArray[np.int64]) -> None:
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected.tolist()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_tokens=st.sampled_from([1, 2, 12, 13, 100, 300]),
    vocab_size=st.sampled_from([1, 15, 16, 33, 1024, 1500]),
    dtype=st.sampled_from(DTYPES),
    is_coarse=st.booleans(),
    soft_cap=st.sampled_from([None, 0.5, 30.0]),
)
def test_the_first_of_the_largest_is_chosen(
    library: Library,
    num_tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    is_coarse: bool,
    soft_cap: float | None,
) -> None:
    """Few distinct columns make equal logits, and so does a cap of 0.5, which saturates."""
    torch.manual_seed(0)
    head = torch.randn(vocab_size, HIDDEN).to(dtype)
    if is_coarse:
        head = head[torch.randint(min(7, vocab_size), (vocab_size,))]
    _assert_chosen(*_choices(library, head, num_tokens, soft_cap=soft_cap))


@pytest.mark.parametrize("places", [(1400, 40), (40, 41), (0,), (1499,)])
def test_the_first_nan_is_chosen(library: Library, places: tuple[int, ...]) -> None:
    head = torch.randn(1500, HIDDEN, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(1500)
    bias[list(places)] = float("nan")
    bias[7] = INFINITY
    chosen, expected = _choices(library, head, bias=bias)
    _assert_chosen(chosen, expected)
    assert set(chosen.tolist()) == {min(places)}


@pytest.mark.parametrize("value", [-INFINITY, INFINITY, -0.0])
def test_among_equals_everywhere_the_first_is_chosen(library: Library, value: float) -> None:
    chosen, expected = _choices(library, torch.zeros(1500, HIDDEN), bias=torch.full((1500,), value))
    _assert_chosen(chosen, expected)
    assert not chosen.any()


def test_a_step_in_the_middle_of_a_prompt_chooses_nothing(library: Library) -> None:
    chosen, _ = _choices(library, torch.randn(33, HIDDEN), num_tokens=0)
    assert chosen.shape == (0,)
