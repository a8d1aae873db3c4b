"""The step before the first request: kernels compile and load, and static memory is taken."""

from __future__ import annotations

import numpy as np
import torch

from executor_svc.accelerator.device import Device
from executor_svc.accelerator.transfers import Transfers
from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import MIN_BLOCKS
from executor_svc.models.model import Model
from sampler_svc.sampling import RowSampler, TorchHead
from stages.config import ServerConfig
from stages.messages import NewRow, SamplingParams

# Tokens of the step that only makes kernels compile and load.
SMALL_STEP = 32
# What takes the most memory: a nucleus of the whole vocabulary.
WIDEST_CHOICE = SamplingParams(temperature=1.0, top_p=0.5)


def run_first_step(
    config: ServerConfig, device: Device, model: Model, transfers: Transfers
) -> None:
    """Run a step of decoding rows and prompts, which lands in the null block and is read by nobody.

    With static memory it is the largest one, and the sampling of all rows: the allocator keeps
    what they needed, for the stream that they ran on, before the cache is sized. Log-probabilities
    of prompts take theirs when somebody asks.
    """
    is_static = config.memory_policy == "static"
    spec, block_size = device.cache_spec(model.kv_spec), config.block_size
    lengths = _largest_step(config) if is_static else _small_step(config)
    spans = [Span([0] * length, 0, [0] * -(-length // block_size)) for length in lengths]
    with torch.inference_mode(), transfers.on_compute():
        batch = ForwardBatch.from_spans(spans, block_size).to(device.torch_device)
        model.forward(batch, device.allocate_kv_cache(spec, MIN_BLOCKS, block_size))
        if is_static and config.sampling_placement == "device":
            _sample_all_rows(config, device, transfers)
    device.module.synchronize()


def make_sampler(config: ServerConfig, device: Device, transfers: Transfers) -> RowSampler:
    """A sampler of all rows, around the device's own kernels where it has any."""
    draw, keeper = device.draw_from_likeliest, device.likeliest_keeper
    has_own = draw is not None or keeper is not None
    return RowSampler(
        config.max_num_seqs,
        config.facts.vocab_size,
        device.torch_device,
        upload=transfers.upload,
        head=TorchHead(transfers.upload, draw, keeper) if has_own else None,
    )


def _largest_step(config: ServerConfig) -> list[int]:
    """A token of each row but one, and prompts with the rest of the budget."""
    num_decoding = min(config.max_num_seqs, config.max_num_batched_tokens) - 1
    whole, rest = divmod(config.max_num_batched_tokens - num_decoding, config.max_model_len)
    return [*[1] * num_decoding, *[config.max_model_len] * whole, *([rest] if rest else [])]


def _small_step(config: ServerConfig) -> list[int]:
    num_tokens = min(config.max_num_batched_tokens, config.max_model_len, SMALL_STEP)
    return [1, num_tokens - 1] if num_tokens > 1 else [1]


def _sample_all_rows(config: ServerConfig, device: Device, transfers: Transfers) -> None:
    sampler = make_sampler(config, device, transfers)
    for row in range(config.max_num_seqs):
        sampler.admit(NewRow(row, row, b"", 0, 0, 0, b"", WIDEST_CHOICE))
    shape = config.max_num_seqs, config.facts.vocab_size
    logits = torch.zeros(shape, device=device.torch_device)
    sampler.sample(logits, np.arange(config.max_num_seqs, dtype=np.int32))
