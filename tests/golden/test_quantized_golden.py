"""Quantized models compute what their formats say: checkpoints of every published format against
transformers on the values that their codes mean, the embedded model by the sums that it knows.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from executor_svc.batch import ForwardBatch, Span
from executor_svc.embedded.evaluate import addition_questions
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.model_config import load_model_config
from executor_svc.models.cpu import load_fused_decoder
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from stages.model_folder import embedded_model
from tests.golden.quantized_folders import FORMATS, write_folders
from tests.golden.tiny_models import build_tiny_model
from tests.unit.native_models import best_build

TOKENS = [*range(3, 60), 7, 7, 300, 1]
NUM_SUMS = 6


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("models"))


def _logits(model: Model) -> Tensor:
    batch = ForwardBatch.from_spans([Span(TOKENS, 0, [1, 2, 3, 4])], 16)
    batch = replace(batch, logits_indices=torch.arange(len(TOKENS)))
    with torch.inference_mode():
        return model.forward(batch, allocate_kv_cache(model.kv_spec, 5, 16))


def _expected(folder: Path, *, int8_activations: bool) -> Tensor:
    """transformers' logits; with the inputs of projections rounded, token by token."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in network.named_modules():
        if int8_activations and name.endswith("_proj"):
            module.register_forward_pre_hook(_round_inputs)
    with torch.inference_mode():
        return network(torch.tensor([TOKENS])).logits[0]


def _round_inputs(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checkpoint_computes_what_its_codes_mean(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    quantized, plain = write_folders(tiny_llama, tmp_path, kind)
    int8_activations = FORMATS[kind].int8_activations
    expected = _expected(plain, int8_activations=int8_activations)
    config = load_model_config(quantized)
    actual = _logits(load_fused_decoder(config, "float32", best_build()))
    tolerance = 1e-5
    if int8_activations:
        # Two values that are rounded to neighbours of the same half differ by a whole step.
        tolerance = 1e-2
    elif FORMATS[kind].bits == 8 and FORMATS[kind].group_size < 0:
        # Activations in steps of 2^-15 of the largest, some 5 times the mean size: 5e-5 for each of
        # 14 projections, which add up as chance errors do.
        tolerance = 3e-4
    assert (actual - expected).norm() < tolerance * expected.norm()
    if not int8_activations:
        expanded = _logits(load_model(quantized, config, "float32", CpuOps()))
        assert (expanded - expected).norm() < 1e-5 * expected.norm()


def test_projections_of_different_orders_are_expanded_with_a_warning(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized, _ = write_folders(tiny_llama, tmp_path, "gptq_own_orders")
    with caplog.at_level(logging.WARNING):
        load_fused_decoder(load_model_config(quantized), "float32", best_build())
    assert re.search(r"q_proj\+.*k_proj\+.*v_proj differ in their quantization", caplog.text)


def test_without_kernels_the_expansion_is_said(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized, _ = write_folders(tiny_llama, tmp_path, "awq")
    with caplog.at_level(logging.WARNING):
        load_model(quantized, load_model_config(quantized), "float32", CpuOps())
    assert "expanded to torch.float32" in caplog.text


@pytest.mark.parametrize("quantization", ["int8", "w8a8"])
def test_the_embedded_model_still_adds(quantization: str) -> None:
    folder = embedded_model()
    model = load_fused_decoder(load_model_config(folder), "auto", best_build(), quantization)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for question in addition_questions(Random(1), NUM_SUMS):
        text = question.messages[0]["content"]
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        answer = tokenizer.decode(_greedy(model, tokenizer.encode(prompt).ids))
        assert question.is_right(answer), (text, answer)


def _greedy(model: Model, tokens: list[int], num_tokens: int = 24) -> list[int]:
    cache = allocate_kv_cache(model.kv_spec, 9, 16)
    output: list[int] = []
    span = Span(tokens, 0, [*range(1, 9)])
    while len(output) < num_tokens:
        with torch.inference_mode():
            logits = model.forward(ForwardBatch.from_spans([span], 16), cache)
        token = int(logits[-1].argmax())
        if token == 2:  # the end of the turn
            break
        output.append(token)
        span = Span([token], span.start + len(span.token_ids), span.block_ids)
    return output
