"""`--memory-policy`: whether steps take memory of the card after the start."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
import torch_npu  # noqa: F401  registers the device

from executor_svc.accelerator.loading import load_stage
from stages.messages import SamplingParams
from stages.model_folder import embedded_model
from stages.trace import Trace
from tests.pipeline import Pipeline, make_config

NUM_ROWS = 16
PROMPTS = [[20 + i] * length for i, length in enumerate((1, 300, 127, 2, 500, 64) * 3)]
PARAMS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}]


def _growth(policy: str) -> int:
    """Bytes that torch's allocator has taken from the card since the stage was ready.

    Of the pool of blocks above 1 MiB: what lies below hangs on how many results are on their way.
    """
    torch.npu.empty_cache()
    settings = {"device": "npu", "dtype": "bfloat16", "block_size": 128, "max_num_seqs": NUM_ROWS}
    settings |= {"max_num_batched_tokens": 512, "memory_policy": policy, "num_blocks": 0}
    config = make_config(embedded_model(), **settings, gpu_memory_utilization=0.3)
    stage, kv_cache = load_stage(config, Trace())
    before = _reserved()
    config = msgspec.structs.replace(config, num_blocks=kv_cache.num_blocks)
    pipeline = Pipeline(config, make_executor=lambda *_: stage)
    for params in PARAMS:
        pipeline.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True, **params))
    return _reserved() - before


def _reserved() -> int:
    return int(torch.npu.memory_stats()["reserved_bytes.large_pool.current"])


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_only_dynamic_memory_grows(policy: str) -> None:
    growth = _growth(policy)
    assert (growth == 0) == (policy == "static"), growth
