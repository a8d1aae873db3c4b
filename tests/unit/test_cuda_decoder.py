"""A whole decoder on the CUDA backend against the reference: prompts, then mixed, then decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.make_model import make_model
from executor_svc.model_config import load_model_config
from executor_svc.models.decoder_loader import load_decoder
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from executor_svc.ops.reference import ReferenceOps
from tests.triton_device import triton_device

DEVICE = triton_device()

from executor_svc.ops.cuda.ops import CudaOps  # noqa: E402

# The interpreter computes with NumPy, which warns of infinities that a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BLOCK_SIZE = 4
PROMPTS = ((5, 9, 2, 7, 11, 3), (8, 1, 4))
BLOCK_IDS = ((4, 2), (3, 1))


def step(spans: list[Span]) -> ForwardBatch:
    batch = ForwardBatch.from_spans(spans, BLOCK_SIZE)
    names = ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_tables")
    moved = {name: getattr(batch, name).to(DEVICE) for name in (*names, "logits_indices")}
    return replace(batch, **moved)


def steps() -> list[ForwardBatch]:
    """A prompt alone; its first output beside the other prompt; an output of each."""
    first, second = BLOCK_IDS
    return [
        step([Span(PROMPTS[0], 0, first)]),
        step([Span([6], 6, first), Span(PROMPTS[1], 0, second)]),
        step([Span([1], 7, first), Span([2], 3, second)]),
    ]


def logits(folder: Path, ops: Ops) -> list[torch.Tensor]:
    decoder = load_decoder(load_model_config(folder), torch.float32, ops, DEVICE)
    cache = allocate_kv_cache(decoder.kv_spec, 5, BLOCK_SIZE, DEVICE)
    with torch.inference_mode():
        return [decoder.forward(batch, cache) for batch in steps()]


def test_a_decoder_gives_the_references_logits(tmp_path: Path) -> None:
    make_model("tiny-qwen3", tmp_path, vocab_size=300, dtype="float32")
    fallbacks = Fallbacks()
    actual, expected = logits(tmp_path, CudaOps(fallbacks)), logits(tmp_path, ReferenceOps())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not fallbacks.counts()
