"""Greedy tokens of tiny models of every family, equal to transformers' `generate`, however the
work is cut into steps: alone, all together, or in chunks beside decode rows; and whichever of the
CPU's backends computes them: torch, or the compiled kernels for the native families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.model_config import load_model_config
from executor_svc.models.cpu import load_fused_decoder
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.native.library import Library, LibraryUnavailable, load_library
from executor_svc.ops.reference import ReferenceOps
from tests.golden.conftest import LOGITS_PROMPT, MAX_TOKENS, Golden
from tests.golden.tiny_models import FAMILIES, MODEL_VOCAB_SIZE, NATIVE_FAMILIES

BLOCK_SIZE = 16


@dataclass
class _Sequence:
    tokens: list[int]
    block_ids: list[int]
    num_computed: int = 0
    output: list[int] = field(default_factory=list)

    def next_span(self, chunk_size: int) -> Span:
        end = min(len(self.tokens), self.num_computed + chunk_size)
        return Span(self.tokens[self.num_computed : end], self.num_computed, self.block_ids)


class GreedyDriver:
    """The least that can drive a model: a shuffled free list and one span a sequence a step."""

    def __init__(self, model: Model, num_blocks: int) -> None:
        self._model = model
        self._cache = allocate_kv_cache(model.kv_spec, num_blocks, BLOCK_SIZE)
        for layer in self._cache.layers:  # what was never written must never count
            layer.key.fill_(float("nan"))
            layer.value.fill_(float("nan"))
        generator = torch.Generator().manual_seed(2)
        self._free = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()

    def run(self, prompts: Sequence[list[int]], chunk_size: int) -> list[list[int]]:
        sequences = [_Sequence([*prompt], self._take_blocks(prompt)) for prompt in prompts]
        while running := [s for s in sequences if len(s.output) < MAX_TOKENS]:
            self._step(running, chunk_size)
        for sequence in sequences:
            self._free += sequence.block_ids
        return [sequence.output for sequence in sequences]

    def _take_blocks(self, prompt: list[int]) -> list[int]:
        return [self._free.pop(0) for _ in range(-(-(len(prompt) + MAX_TOKENS) // BLOCK_SIZE))]

    def _step(self, running: list[_Sequence], chunk_size: int) -> None:
        work = [(sequence, sequence.next_span(chunk_size)) for sequence in running]
        work.sort(key=lambda item: len(item[1].token_ids) != 1)  # decode rows come first
        batch = ForwardBatch.from_spans([span for _, span in work], BLOCK_SIZE)
        ends = [span.start + len(span.token_ids) == len(sequence.tokens) for sequence, span in work]
        wanted = batch.logits_indices[torch.tensor(ends)]
        logits = self._model.forward(replace(batch, logits_indices=wanted), self._cache)
        assert logits.shape == (sum(ends), MODEL_VOCAB_SIZE)
        chosen = iter(logits.argmax(-1).tolist())
        for (sequence, span), is_end in zip(work, ends, strict=True):
            sequence.num_computed += len(span.token_ids)
            if is_end:
                sequence.output.append(next(chosen))
                sequence.tokens.append(sequence.output[-1])


def _load(folder: Path, backend: str, dtype: str = "auto") -> Model:
    config = load_model_config(folder)
    if backend == "torch":
        return load_model(folder, config, dtype, CpuOps())
    return load_fused_decoder(config, dtype, _kernels())


def _kernels() -> Library:
    try:
        return load_library()
    except LibraryUnavailable as unavailable:
        pytest.skip(str(unavailable))


on_each_backend = pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "torch") for family in FAMILIES),
        *((family, "kernels") for family in NATIVE_FAMILIES),
    ],
)


@on_each_backend
def test_alone(family: str, backend: str, golden: Callable[[str], Golden]) -> None:
    case = golden(family)
    driver = GreedyDriver(_load(case.folder, backend), num_blocks=50)
    outputs = [driver.run([prompt], chunk_size=1024)[0] for prompt in case.prompts]
    assert outputs == case.expected


@on_each_backend
def test_all_together(family: str, backend: str, golden: Callable[[str], Golden]) -> None:
    case = golden(family)
    driver = GreedyDriver(_load(case.folder, backend), num_blocks=256)
    assert driver.run(case.prompts, chunk_size=1024) == case.expected


@on_each_backend
def test_chunked_beside_decode(family: str, backend: str, golden: Callable[[str], Golden]) -> None:
    case = golden(family)
    driver = GreedyDriver(_load(case.folder, backend), num_blocks=256)
    assert driver.run(case.prompts, chunk_size=16) == case.expected


@on_each_backend
def test_logits(family: str, backend: str, golden: Callable[[str], Golden]) -> None:
    case = golden(family)
    prompt = case.prompts[LOGITS_PROMPT]
    batch = ForwardBatch.from_spans([Span(prompt, 0, [5, 2, 7, 1, 4, 3, 6])], BLOCK_SIZE)
    model = _load(case.folder, backend)
    logits = model.forward(batch, allocate_kv_cache(model.kv_spec, 8, BLOCK_SIZE))
    torch.testing.assert_close(logits[0], case.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_reference_operators_agree(family: str, golden: Callable[[str], Golden]) -> None:
    """All backends compute one model: the same logits for a ragged batch."""
    case = golden(family)
    config = load_model_config(case.folder)
    spans = [Span(case.prompts[10], 0, [3, 1, 4]), Span(case.prompts[6], 0, [2])]
    batch = ForwardBatch.from_spans(spans, BLOCK_SIZE)
    reference = load_model(case.folder, config, "float32", ReferenceOps())
    logits: list[Tensor] = []
    for model in (reference, _load(case.folder, "torch"), _load(case.folder, "kernels")):
        cache = allocate_kv_cache(model.kv_spec, 5, BLOCK_SIZE)
        logits.append(model.forward(batch, cache))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-3)


@on_each_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(
    family: str, backend: str, dtype: str, golden: Callable[[str], Golden]
) -> None:
    case = golden(family)
    span = Span(case.prompts[9], 0, [1, 2])
    batch = ForwardBatch.from_spans([span], BLOCK_SIZE)
    full, half = _load(case.folder, backend), _load(case.folder, backend, dtype)
    expected, actual = (
        model.forward(batch, allocate_kv_cache(model.kv_spec, 3, BLOCK_SIZE))
        for model in (full, half)
    )
    assert half.kv_spec.dtype == getattr(torch, dtype)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.1 * expected.norm()
