"""The sort-free draw against the sampler's own, token for token."""

from __future__ import annotations

import pytest
import torch

from sampler_svc import draw
from tests.triton_device import triton_device

DEVICE = triton_device()

from executor_svc.ops.cuda.nucleus import draw_from_likeliest  # noqa: E402

NUM_ROWS = 3
CASES = [("normal", 4097), ("tied", 4097), ("peaked", 40), ("flat", 40), ("normal", 1)]


def weights_of(kind: str, vocab_size: int) -> torch.Tensor:
    """Weights int64 [NUM_ROWS, vocab_size]."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator)
    if kind == "peaked":
        logits *= 20.0
    elif kind == "tied":
        logits = logits.round()
    elif kind == "flat":
        logits.zero_()
    return draw.token_weights(logits, torch.ones(NUM_ROWS, 1), None)


def uniforms(seed: int) -> torch.Tensor:
    """Noise in [0, 1), both ends of it included."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    noise[seed] = (0.0, 1 - 2.0**-53)[seed % 2]
    return noise


def drawn(
    weights: torch.Tensor,
    noise: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> list[int]:
    inputs = [None if tensor is None else tensor.to(DEVICE) for tensor in (top_k, top_p)]
    tokens: list[int] = draw_from_likeliest(weights.to(DEVICE), noise.to(DEVICE), *inputs).tolist()
    return tokens


@pytest.mark.parametrize(("kind", "vocab_size"), CASES)
def test_nucleus_draws_the_samplers_tokens(kind: str, vocab_size: int) -> None:
    weights = weights_of(kind, vocab_size)
    top_p = torch.tensor([[0.9], [1e-9], [0.999999]], dtype=torch.float64)
    expected = draw.draw_from_top_p(weights, uniforms(0), top_p).tolist()
    assert drawn(weights, uniforms(0), None, top_p) == expected


@pytest.mark.parametrize(("kind", "vocab_size"), CASES)
@pytest.mark.parametrize("has_top_p", [False, True])
def test_top_k_draws_the_samplers_tokens(kind: str, vocab_size: int, has_top_p: bool) -> None:
    weights = weights_of(kind, vocab_size)
    top_k = torch.tensor([[1], [7], [4000]]).clamp_(max=vocab_size)
    top_p = torch.full((NUM_ROWS, 1), 0.8, dtype=torch.float64) if has_top_p else None
    expected = draw.draw_from_top_k(weights, uniforms(1), top_k, top_p, int(top_k.max()))
    assert drawn(weights, uniforms(1), top_k, top_p) == expected.tolist()


def test_a_row_without_weight_stays_within_the_vocabulary() -> None:
    """Logits of NaN give weights of no meaning; the row must not break its neighbours."""
    weights = weights_of("normal", 40)
    weights[2] = 0
    top_p = torch.full((NUM_ROWS, 1), 0.9, dtype=torch.float64)
    expected = draw.draw_from_top_p(weights, uniforms(0), top_p).tolist()
    tokens = drawn(weights, uniforms(0), None, top_p)
    assert tokens[:2] + tokens[3:] == expected[:2] + expected[3:]
    assert 0 <= tokens[2] < 40


def test_all_the_weight_on_one_token_is_that_token() -> None:
    weights = torch.zeros(NUM_ROWS, 5000, dtype=torch.int64)
    weights[:, 4321] = 2**40
    top_p = torch.ones(NUM_ROWS, 1, dtype=torch.float64)
    assert drawn(weights, uniforms(0), None, top_p) == [4321] * NUM_ROWS
