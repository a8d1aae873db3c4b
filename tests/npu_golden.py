"""Runs golden cases on `--device npu` in a process of its own, which torch_npu wants for itself.

Usage: python -m tests.npu_golden CASES RESULTS   (JSON files; see golden/test_npu_golden.py)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from executor_svc.accelerator.loading import load_device_model, why_no_graphs
from executor_svc.accelerator.npu import NpuDevice
from executor_svc.accelerator.stage import AcceleratorStage
from executor_svc.accelerator.steps import StepLauncher
from executor_svc.accelerator.transfers import Transfers
from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache
from executor_svc.model_config import load_model_config
from executor_svc.models.model import Model
from executor_svc.ops.npu_limits import BLOCK_SIZE, FUSED_DTYPES
from stages.config import ServerConfig
from stages.messages import SamplingParams
from stages.topology import EXECUTOR
from stages.trace import Trace
from tests.pipeline import Outcome, Pipeline, make_config

# The emulator computes attention in float32 too, so that tokens can be compared one by one.
EMULATED_DTYPES = FUSED_DTYPES | {torch.float32}
NUM_BLOCKS = 64
# Whoever gives weight to what was not written gets other tokens. Not NaN: a recorded step reads
# some keys and values in vain, which nothing times NaN would show (see decision 10).
NEVER_WRITTEN = 3e4
# Whether it fuses operators, and whether it stores weights in tiles.
DeviceKey = tuple[bool, bool]


class Cases:
    """Devices and models that cases share."""

    def __init__(self) -> None:
        # By what of a configuration makes them differ.
        self._devices: dict[DeviceKey, NpuDevice] = {}
        self._models: dict[tuple[str, str, DeviceKey], Model] = {}
        self._transfers: dict[tuple[int, DeviceKey], Transfers] = {}

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """The tokens of a case's last round, and the executor's figures."""
        config = _config(case)
        device = self._device(config)
        before = device.fallbacks.stats()
        pipeline = Pipeline(config, seed=3, make_executor=self._make_executor)
        for _ in range(case["rounds"]):
            outcomes = _round(pipeline, case)
        fallbacks = device.fallbacks.stats()
        return {
            "tokens": [outcome.token_ids for outcome in outcomes],
            "logprobs": [[token.logprob for token in outcome.logprobs] for outcome in outcomes],
            "num_cached": [o.started.num_cached_tokens for o in outcomes if o.started is not None],
            "num_preemptions": pipeline.scheduler.stats()["num_preemptions_total"],
            "stats": pipeline.stats_of(EXECUTOR),
            "fallbacks": [name for name in fallbacks if fallbacks[name] > before.get(name, 0)],
        }

    @torch.inference_mode()
    def logits(self, case: dict[str, Any]) -> dict[str, Any]:
        """Those behind the last token of a prompt, computed in one step."""
        config, [prompt] = _config(case), case["prompts"]
        device = self._device(config)
        model = self._model(config, device)
        spans = [Span(prompt, 0, [*range(1, 2 + len(prompt) // BLOCK_SIZE)])]
        batch = ForwardBatch.from_spans(spans, BLOCK_SIZE).to(device.torch_device)
        logits = model.forward(batch, self._kv_cache(config, device, model))
        return {"logits": logits[0].tolist()}

    def _make_executor(self, config: ServerConfig, trace: Trace) -> AcceleratorStage:
        device = self._device(config)
        model = self._model(config, device)
        cache = self._kv_cache(config, device, model)
        no_graphs_because = why_no_graphs(config, model, EMULATED_DTYPES)
        transfers = self._transfers_of(config, device)
        launcher = StepLauncher(config, device, model, cache, no_graphs_because, transfers)
        return AcceleratorStage(device, launcher, trace)

    def _kv_cache(self, config: ServerConfig, device: NpuDevice, model: Model) -> KvCache:
        spec = device.cache_spec(model.kv_spec)
        cache = device.allocate_kv_cache(spec, config.num_blocks, config.block_size)
        for layer in cache.layers:
            layer.key.fill_(NEVER_WRITTEN)
            layer.value.fill_(NEVER_WRITTEN)
        return cache

    def _transfers_of(self, config: ServerConfig, device: NpuDevice) -> Transfers:
        """A server has one set of streams; torch's pool has no fresh ones for every case."""
        key = config.parallel_streams, _device_key(config)
        if key not in self._transfers:
            self._transfers[key] = Transfers(device, config.parallel_streams)
        return self._transfers[key]

    def _device(self, config: ServerConfig) -> NpuDevice:
        key = uses_fusion, tiles_weights = _device_key(config)
        if key not in self._devices:
            self._devices[key] = NpuDevice(0, uses_fusion, EMULATED_DTYPES, tiles_weights)
        return self._devices[key]

    def _model(self, config: ServerConfig, device: NpuDevice) -> Model:
        key = config.model, config.dtype, _device_key(config)
        if key not in self._models:
            folder = Path(config.model)
            loaded = load_device_model(folder, load_model_config(folder), config.dtype, device)
            self._models[key] = loaded
        return self._models[key]


def _device_key(config: ServerConfig) -> DeviceKey:
    return config.operator_fusion == "on", config.weight_format == "nz"


def _config(case: dict[str, Any]) -> ServerConfig:
    settings = {"device": "npu", "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
    return make_config(Path(case["folder"]), **(settings | {"max_num_seqs": 20} | case["settings"]))


def _round(pipeline: Pipeline, case: dict[str, Any]) -> list[Outcome]:
    """`deaths`: which stage dies at a turn; `leaves`: whose client, by the place of its prompt."""
    fields: dict[str, Any] = dict(case["params"])
    for name, value in fields.items():
        if isinstance(value, str):  # JSON has no bytes: they come as hexadecimal text
            fields[name] = bytes.fromhex(value)
    params = SamplingParams(**fields)
    request_ids = [pipeline.open(prompt, params) for prompt in case["prompts"]]
    deaths = {int(turn): stage for turn, stage in case["deaths"].items()}
    leaves = {int(turn): place for turn, place in case.get("leaves", {}).items()}

    def on_turn(turn: int) -> None:
        if turn in deaths:
            pipeline.kill(deaths[turn])
        if turn in leaves:
            pipeline.close(request_ids[leaves[turn]])

    pipeline.run(on_turn)
    return [pipeline.outcomes[request_id] for request_id in request_ids]


def main(cases_path: str, results_path: str) -> None:
    """Run the cases of a file."""
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = json.loads(Path(cases_path).read_text())
    runner = Cases()
    kinds = {"tokens": runner.run, "logits": runner.logits}
    results = {name: kinds[case["kind"]](case) for name, case in cases.items()}
    Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
