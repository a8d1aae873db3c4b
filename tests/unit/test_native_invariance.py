"""A token's logits on the compiled kernels are the same bit for bit, whatever stands beside it.

It is what lets a request go on with the tokens that it would have had, after a prefix hit, a
preemption or the death of a stage: its context is then computed in other chunks, beside others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, allocate_kv_cache
from executor_svc.models.decoder_config import DecoderConfig
from executor_svc.models.fused_decoder import FusedDecoder
from tests.unit.native_models import (
    BUILD_NAMES,
    GEMMA_LIKE,
    QWEN_LIKE,
    best_build,
    load_build,
    make_fused,
)

LENGTHS = (1, 7, 40, 255, 256, 257, 300, 530)
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass
class _Sequence:
    tokens: list[int]
    block_ids: list[int]
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)


def _compute(model: FusedDecoder, cache: KvCache, work: list[tuple[_Sequence, int]]) -> None:
    """One step: each sequence advances by its number of tokens; all their logits are kept."""
    spans = [
        Span(s.tokens[s.num_computed : s.num_computed + count], s.num_computed, s.block_ids)
        for s, count in work
    ]
    batch = ForwardBatch.from_spans(spans, cache.block_size)
    batch = replace(batch, logits_indices=torch.arange(batch.num_tokens))
    parts = model.forward(batch, cache).split([count for _, count in work])
    for (sequence, count), logits in zip(work, parts, strict=True):
        sequence.num_computed += count
        sequence.logits.append(logits)


def _sequences(lengths: list[int], vocab_size: int, block_size: int) -> list[_Sequence]:
    generator = random.Random(5)
    free = list(range(1, 1 + sum(-(-length // block_size) for length in lengths)))
    generator.shuffle(free)
    return [
        _Sequence(
            tokens=[generator.randrange(vocab_size) for _ in range(length)],
            block_ids=[free.pop() for _ in range(-(-length // block_size))],
        )
        for length in lengths
    ]


def _run(
    model: FusedDecoder, lengths: list[int], vocab_size: int, order: random.Random | None
) -> list[Tensor]:
    """All logits of each sequence: alone and at once, or in random chunks in random company."""
    block_size = 16
    sequences = _sequences(lengths, vocab_size, block_size)
    num_blocks = 1 + sum(len(sequence.block_ids) for sequence in sequences)
    cache = allocate_kv_cache(model.kv_spec, num_blocks, block_size)
    for layer in cache.layers:
        layer.key.fill_(float("nan"))
        layer.value.fill_(float("nan"))
    if order is None:
        for sequence in sequences:
            _compute(model, cache, [(sequence, len(sequence.tokens))])
    else:
        while open_ones := [s for s in sequences if s.num_computed < len(s.tokens)]:
            chosen = order.sample(open_ones, order.randint(1, len(open_ones)))
            _compute(model, cache, [(s, _chunk(s, order)) for s in chosen])
    return [torch.cat(sequence.logits) for sequence in sequences]


def _chunk(sequence: _Sequence, order: random.Random) -> int:
    left = len(sequence.tokens) - sequence.num_computed
    return min(left, order.choice([1, 1, 2, 16, 37, 100, 256]))


def _assert_equal_bits(expected: list[Tensor], actual: list[Tensor]) -> None:
    for one, other in zip(expected, actual, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5),
    seed=st.integers(0, 1 << 20),
    num_threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from([QWEN_LIKE, GEMMA_LIKE]),
)
def test_logits_do_not_depend_on_company_chunks_or_threads(
    lengths: list[int], seed: int, num_threads: int, dtype: torch.dtype, config: DecoderConfig
) -> None:
    library = best_build()
    alone = _run(make_fused(config, library, 1, dtype), lengths, config.vocab_size, None)
    model = make_fused(config, library, num_threads, dtype)
    together = _run(model, lengths, config.vocab_size, random.Random(seed))
    _assert_equal_bits(alone, together)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("build", BUILD_NAMES)
def test_every_build_is_invariant(build: str, dtype: torch.dtype) -> None:
    library, lengths = load_build(build), [300, 40, 257, 1]
    alone = _run(make_fused(QWEN_LIKE, library, 1, dtype), lengths, QWEN_LIKE.vocab_size, None)
    model = make_fused(QWEN_LIKE, library, 2, dtype)
    together = _run(model, lengths, QWEN_LIKE.vocab_size, random.Random(1))
    _assert_equal_bits(alone, together)


def test_a_recomputed_context_gives_the_same_next_token_logits() -> None:
    """Decode token by token, then lose the cache and prefill what was decoded."""
    model, cache_blocks = make_fused(QWEN_LIKE, best_build(), 2), 40
    tokens = [random.Random(2).randrange(QWEN_LIKE.vocab_size) for _ in range(280)]
    lived, recovered = (_Sequence(tokens, list(range(start, start + 18))) for start in (1, 20))
    cache = allocate_kv_cache(model.kv_spec, cache_blocks, 16)
    _compute(model, cache, [(lived, 240)])
    for _ in range(40):
        _compute(model, cache, [(lived, 1)])
    _compute(model, cache, [(recovered, 280)])
    _assert_equal_bits([torch.cat(lived.logits)], [torch.cat(recovered.logits)])


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 7, 40]), min_size=1, max_size=4),
    data=st.data(),
    config=st.sampled_from([QWEN_LIKE, GEMMA_LIKE]),
)
def test_logits_do_not_depend_on_which_are_wanted(
    lengths: list[int], data: st.DataObject, config: DecoderConfig
) -> None:
    """Behind the last attention the other tokens are left out; in any order, and none at all."""
    model = make_fused(config, best_build(), 2, torch.bfloat16)
    sequences = _sequences(lengths, config.vocab_size, 16)
    cache = allocate_kv_cache(model.kv_spec, 1 + sum(len(s.block_ids) for s in sequences), 16)
    batch = ForwardBatch.from_spans([Span(s.tokens, 0, s.block_ids) for s in sequences], 16)
    everything = replace(batch, logits_indices=torch.arange(batch.num_tokens))
    logits = model.forward(everything, cache)
    wanted = data.draw(st.lists(st.integers(0, batch.num_tokens - 1), max_size=6))
    for indices in (wanted, sorted(set(wanted))):
        part = replace(batch, logits_indices=torch.tensor(indices, dtype=torch.int64))
        _assert_equal_bits([logits[indices]], [model.forward(part, cache)])
        assert model.forward_greedy(part, cache).tolist() == logits[indices].argmax(-1).tolist()
