"""What the accelerator's executor makes of its device at its start: first step, sampling head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.accelerator import loading
from executor_svc.accelerator.first_step import SMALL_STEP
from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache
from executor_svc.model_config import load_model_config
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu_attention import CpuAttentionPlan
from executor_svc.ops.npu_limits import BLOCK_SIZE, MAX_RECORDED_LEN
from sampler_svc.draw import draw_from_top_k, draw_from_top_p
from stages.messages import SamplingParams
from stages.model_folder import embedded_model
from stages.trace import Trace
from tests.accelerator_cpu import CpuDevice, TensorLengthOps, stage_maker
from tests.pipeline import Pipeline, make_config

PROMPTS = [[20, 40, 60], [21, 41], [22]]


class WatchedOps(TensorLengthOps):
    """Keeps the lengths of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query_lens: list[tuple[int, ...]] = []

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> CpuAttentionPlan:
        self.query_lens.append(batch.query_lens_host)
        return super().plan_attention(batch, kv_cache)


class CountingDraw:
    """The draw of a device of its own: the sampler's."""

    def __init__(self) -> None:
        self.num_rows = 0

    def __call__(
        self, weights: Tensor, uniforms: Tensor, top_k: Tensor | None, top_p: Tensor | None
    ) -> Tensor:
        self.num_rows += len(weights)
        if top_k is not None:
            return draw_from_top_k(weights, uniforms, top_k, top_p, int(top_k.max()))
        assert top_p is not None
        return draw_from_top_p(weights, uniforms, top_p)


@pytest.mark.parametrize(
    ("max_model_len", "reason"),
    [(MAX_RECORDED_LEN, None), (MAX_RECORDED_LEN + 1, "context_beyond_decode_kernel")],
)
def test_a_context_beyond_the_decode_kernel_of_an_npu_is_not_recorded(
    max_model_len: int, reason: str | None
) -> None:
    folder = embedded_model()
    model = loading.load_device_model(folder, load_model_config(folder), "float32", CpuDevice())
    config = make_config(folder, device="npu", block_size=BLOCK_SIZE, max_model_len=max_model_len)
    assert loading.why_no_graphs(config, model, frozenset({torch.float32})) == reason


def generate(params: SamplingParams, draw: CountingDraw | None) -> list[list[int]]:
    folder = embedded_model()
    with torch.inference_mode():
        model = load_model(folder, load_model_config(folder), "float32", TensorLengthOps())
    make_executor = stage_maker(model, draw_from_likeliest=draw)
    pipeline = Pipeline(make_config(folder, max_num_seqs=4), make_executor=make_executor)
    return [outcome.token_ids for outcome in pipeline.generate(PROMPTS, params)]


@pytest.mark.parametrize("limits", [{"top_p": 0.8}, {"top_k": 5}, {"top_k": 5, "top_p": 0.8}])
def test_rows_are_drawn_with_the_devices_own_kernel(limits: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True, **limits)
    draw = CountingDraw()
    assert generate(params, draw) == generate(params, None)
    assert draw.num_rows == 6 * len(PROMPTS)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"memory_policy": "static"}, (1, 1, 1, 93)),
        ({"memory_policy": "static", "max_model_len": 40}, (1, 1, 1, 40, 40, 13)),
        ({"memory_policy": "dynamic"}, (1, SMALL_STEP - 1)),
        ({"memory_policy": "dynamic", "max_num_batched_tokens": 1}, (1,)),
    ],
)
def test_a_step_runs_before_the_first_request(
    settings: dict[str, Any], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CpuDevice()
    device.ops = WatchedOps()
    monkeypatch.setattr(loading, "open_device", lambda kind, **_: device)
    defaults = {"max_num_batched_tokens": 96, "max_num_seqs": 4, "num_blocks": 256}
    defaults |= {"enforce_eager": True}
    config = make_config(embedded_model(), device="cuda", **(defaults | settings))
    stage, _ = loading.load_stage(config, Trace())
    stage.close()
    assert device.ops.query_lens == [lengths]
