"""Runs golden cases on `--device npu` in a process of its own, which torch_npu wants for itself.

Usage: python -m tests.npu_golden CASES RESULTS   (JSON files; see test_npu_golden.py)
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
from executor_svc.model_config import load_model_config
from executor_svc.models.model import Model
from executor_svc.ops.npu_limits import BLOCK_SIZE, FUSED_DTYPES
from stages.config import ServerConfig
from stages.messages import SamplingParams
from stages.topology import EXECUTOR
from stages.trace import Trace
from tests.pipeline import Pipeline, make_config

# The emulator computes attention in float32 too, so that tokens can be compared one by one.
EMULATED_DTYPES = FUSED_DTYPES | {torch.float32}
NUM_BLOCKS = 64


class Cases:
    """Devices and models that cases share."""

    def __init__(self) -> None:
        self._devices: dict[bool, NpuDevice] = {}
        self._models: dict[tuple[str, bool], Model] = {}
        self._transfers: dict[tuple[int, bool], Transfers] = {}

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """The tokens of a case, and the executor's figures."""
        settings = {"device": "npu", "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
        settings |= {"max_num_seqs": 20} | case["settings"]
        config = make_config(Path(case["folder"]), **settings)
        device = self._device(config.operator_fusion == "on")
        before = device.fallbacks.stats()
        pipeline = Pipeline(config, seed=3, make_executor=self._make_executor)
        params = SamplingParams(**case["params"])
        request_ids = [pipeline.open(prompt, params) for prompt in case["prompts"]]
        deaths = {int(turn): stage for turn, stage in case["deaths"].items()}
        pipeline.run(lambda turn: pipeline.kill(deaths[turn]) if turn in deaths else None)
        fallbacks = device.fallbacks.stats()
        outcomes = [pipeline.outcomes[request_id] for request_id in request_ids]
        return {
            "tokens": [outcome.token_ids for outcome in outcomes],
            "logprobs": [[token.logprob for token in outcome.logprobs] for outcome in outcomes],
            "stats": pipeline.stats_of(EXECUTOR),
            "fallbacks": [name for name in fallbacks if fallbacks[name] > before.get(name, 0)],
        }

    def _make_executor(self, config: ServerConfig, trace: Trace) -> AcceleratorStage:
        device = self._device(config.operator_fusion == "on")
        model = self._model(config, device)
        cache = device.allocate_kv_cache(
            device.cache_spec(model.kv_spec), config.num_blocks, config.block_size
        )
        no_graphs_because = why_no_graphs(config, model, EMULATED_DTYPES)
        transfers = self._transfers_of(config, device)
        launcher = StepLauncher(config, device, model, cache, no_graphs_because, transfers)
        return AcceleratorStage(device, launcher, trace)

    def _transfers_of(self, config: ServerConfig, device: NpuDevice) -> Transfers:
        """A server has one set of streams; torch's pool has no fresh ones for every case."""
        key = config.parallel_streams, config.operator_fusion == "on"
        if key not in self._transfers:
            self._transfers[key] = Transfers(device, config.parallel_streams)
        return self._transfers[key]

    def _device(self, uses_fusion: bool) -> NpuDevice:
        if uses_fusion not in self._devices:
            self._devices[uses_fusion] = NpuDevice(0, uses_fusion, EMULATED_DTYPES)
        return self._devices[uses_fusion]

    def _model(self, config: ServerConfig, device: NpuDevice) -> Model:
        key = config.model, config.operator_fusion == "on"
        if key not in self._models:
            folder = Path(config.model)
            loaded = load_device_model(folder, load_model_config(folder), "float32", device)
            self._models[key] = loaded
        return self._models[key]


def main(cases_path: str, results_path: str) -> None:
    """Run the cases of a file."""
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = json.loads(Path(cases_path).read_text())
    runner = Cases()
    results = {name: runner.run(case) for name, case in cases.items()}
    Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
