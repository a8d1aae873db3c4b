"""What transformers' `generate` gives for tiny models of every family: the measure of all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.tiny_models import MODEL_VOCAB_SIZE, build_tiny_model

PROMPT_LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 200, 257, 400, 700)
MAX_TOKENS = 64
LOGITS_PROMPT = 14  # 100 tokens: longer than every window


@dataclass(frozen=True)
class Golden:
    """A family's folder and, for each prompt, the tokens that transformers generates.

    `logits` [vocab] are those behind the last token of prompt LOGITS_PROMPT: a soft cap on
    them, for one, never changes which is the highest.
    """

    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    logits: Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Golden tokens by family, generated once a session."""
    root = tmp_path_factory.mktemp("tiny_models")
    made: dict[str, Golden] = {}

    def make(family: str) -> Golden:
        if family not in made:
            with one_thread():  # a fixture of a module may ask before any test does
                made[family] = _generate(build_tiny_model(family, root))
        return made[family]

    return make


def _generate(folder: Path) -> Golden:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(MODEL_VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    # Gemma 2's soft cap exists in transformers' eager attention only.
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    network.generation_config.eos_token_id = None  # all 64 tokens, whatever they are
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        expected.append(out[0, len(prompt) :].tolist())
    logits = network(torch.tensor([prompts[LOGITS_PROMPT]])).logits[0, -1]
    return Golden(folder, prompts, expected, logits)
