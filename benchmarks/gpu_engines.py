"""The two engines that `gpu.py` compares, each on the same weights in one GPU's memory."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor_svc.accelerator.device import Device
from executor_svc.accelerator.results import LaunchedStep
from executor_svc.accelerator.steps import StepLauncher
from executor_svc.make_model import STD, weight_shapes
from executor_svc.model_config import load_model_config
from executor_svc.model_shapes import ConfigDict
from executor_svc.models.decoder import Decoder, DecoderWeights, LayerWeights
from executor_svc.models.decoder_config import parse_decoder_config
from executor_svc.ops.interface import Ops
from stages.columns import i32_bytes
from stages.config import ModelFacts, ServerConfig
from stages.messages import ExecuteStep, Message, NewRow, SamplingParams, StepTokens

DTYPE = torch.bfloat16
BLOCK_SIZE = 16
# As many prompt tokens as one step takes.
MAX_BATCHED_TOKENS = 8192


@dataclass(frozen=True)
class Workload:
    """So many requests at once, each of `prompt_len` tokens, each to get `num_new`."""

    batch: int
    prompt_len: int
    num_new: int

    @property
    def length(self) -> int:
        return self.prompt_len + self.num_new

    @property
    def blocks_per_row(self) -> int:
        return -(-self.length // BLOCK_SIZE)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random prompts, always the same, no two with a common beginning."""
        rng = np.random.default_rng(0)
        ids: list[list[int]] = rng.integers(3, vocab_size, (self.batch, self.prompt_len)).tolist()
        return ids


@dataclass(frozen=True)
class Run:
    """One run: from the first prompt to the last token.

    step_ms: from the end of a decode step to the end of the next; gap_us: from the end of one to
    the beginning of the next, in which the GPU idles; step_bytes: what a step in the middle reads.
    """

    seconds: float
    token_ids: list[list[int]]
    step_ms: list[float] = field(default_factory=list)
    gap_us: list[float] = field(default_factory=list)
    step_bytes: int = 0


def random_weights(config: ConfigDict, device: str = "cuda") -> dict[str, Tensor]:
    """A checkpoint's tensors by their names, made where they are needed."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, shape in weight_shapes(config):
        tensor = torch.empty(shape, dtype=DTYPE, device=device)
        is_norm = name.endswith("norm.weight")
        tensors[name] = (
            tensor.fill_(1.0) if is_norm else tensor.normal_(std=STD, generator=generator)
        )
    return tensors


def make_decoder(config: ConfigDict, tensors: dict[str, Tensor], ops: Ops) -> Decoder:
    """Qwen3 over these tensors; projections that read the same input are joined."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
        decoder_config = parse_decoder_config(load_model_config(Path(folder)))

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."

        def joined(*names: str) -> Tensor:
            return torch.cat([tensors[f"{prefix}{name}.weight"] for name in names])

        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return LayerWeights(
            attention_norm=tensors[f"{prefix}input_layernorm.weight"],
            qkv=ops.prepare_linear(joined(*attention)),
            query_norm=tensors[f"{prefix}self_attn.q_norm.weight"],
            key_norm=tensors[f"{prefix}self_attn.k_norm.weight"],
            output=ops.prepare_linear(tensors[f"{prefix}self_attn.o_proj.weight"]),
            behind_attention_norm=None,
            mlp_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
            gate_up=ops.prepare_linear(joined("mlp.gate_proj", "mlp.up_proj")),
            down=ops.prepare_linear(tensors[f"{prefix}mlp.down_proj.weight"]),
            behind_mlp_norm=None,
        )

    embedding = tensors["model.embed_tokens.weight"]
    weights = DecoderWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config["num_hidden_layers"])),
        final_norm=tensors["model.norm.weight"],
        head=ops.prepare_linear(tensors.get("lm_head.weight", embedding)),
    )
    return Decoder(decoder_config, weights, ops)


class Headrace:
    """The executor as `serve --device cuda` has it, with two steps in flight."""

    def __init__(
        self,
        config: ConfigDict,
        tensors: dict[str, Tensor],
        workloads: Sequence[Workload],
        device: Device,
    ) -> None:
        self._device = device
        self._decoder = make_decoder(config, tensors, device.ops)
        max_model_len = max(workload.length for workload in workloads)
        server_config = ServerConfig(
            model="m",
            served_model_name="m",
            facts=ModelFacts("Qwen3ForCausalLM", config["vocab_size"], max_model_len, [0]),
            run_dir="",
            max_model_len=max_model_len,
            max_num_seqs=max(workload.batch for workload in workloads),
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            block_size=BLOCK_SIZE,
        )
        spec = device.cache_spec(self._decoder.kv_spec)
        num_blocks = 1 + max(workload.batch * workload.blocks_per_row for workload in workloads)
        self._cache = device.allocate_kv_cache(spec, num_blocks, BLOCK_SIZE)
        self._token_bytes = spec.block_bytes(BLOCK_SIZE) // BLOCK_SIZE
        self._launcher = StepLauncher(server_config, device, self._decoder, self._cache)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Stands where transformers would be ready to take requests."""
        yield

    def run(self, workload: Workload, prompts: list[list[int]]) -> Run:
        """Compute all prompts, then decode all rows together."""
        self._launcher.forget()
        self._device.module.synchronize()
        started = perf_counter()
        chunks = _prompt_steps(workload, prompts)
        in_flight: deque[LaunchedStep] = deque()
        tokens: list[StepTokens] = []
        marks: list[tuple[Any, Any]] = []
        rows = i32_bytes(np.arange(workload.batch, dtype=np.int32))
        for index in range(len(chunks) + workload.num_new - 1):
            is_prompt = index < len(chunks)
            step = chunks[index] if is_prompt else ExecuteStep(index + 1)
            if index == len(chunks):
                step = ExecuteStep(index + 1, started_rows=rows)
            marks.append(self._launch(step, in_flight))
            if len(in_flight) > 1:
                _take(in_flight, tokens)
        while in_flight:
            _take(in_flight, tokens)
        seconds = perf_counter() - started
        return self._run(workload, seconds, tokens, marks[len(chunks) :])

    def _launch(self, step: ExecuteStep, in_flight: deque[LaunchedStep]) -> tuple[Any, Any]:
        start, end = (self._device.module.Event(enable_timing=True) for _ in range(2))
        start.record(self._launcher.transfers.compute)
        in_flight.append(self._launcher.launch(step))
        end.record(self._launcher.transfers.compute)
        return start, end

    def _run(
        self,
        workload: Workload,
        seconds: float,
        tokens: list[StepTokens],
        marks: list[tuple[Any, Any]],
    ) -> Run:
        outputs: list[list[int]] = [[] for _ in range(workload.batch)]
        for message in tokens:
            rows, ids = (np.frombuffer(part, "<i4") for part in (message.rows, message.token_ids))
            for row, token_id in zip(rows.tolist(), ids.tolist(), strict=True):
                outputs[row].append(token_id)
        pairs = [(last[1], this) for last, this in pairwise(marks)]
        context = workload.prompt_len + workload.num_new // 2
        return Run(
            seconds=seconds,
            token_ids=outputs,
            step_ms=[last.elapsed_time(end) for last, (_, end) in pairs],
            gap_us=[last.elapsed_time(start) * 1e3 for last, (start, _) in pairs],
            step_bytes=self._decoder.weight_bytes + workload.batch * context * self._token_bytes,
        )


def _prompt_steps(workload: Workload, prompts: list[list[int]]) -> list[ExecuteStep]:
    """Admit all requests with the blocks that they will ever need, as many a step as fit."""
    steps = []
    params = SamplingParams(max_tokens=workload.num_new, temperature=0.0)
    rows_per_step = max(MAX_BATCHED_TOKENS // workload.prompt_len, 1)
    for first in range(0, workload.batch, rows_per_step):
        rows = np.arange(first, min(first + rows_per_step, workload.batch), dtype=np.int32)
        new_rows = [
            NewRow(
                row=row,
                request_id=row + 1,
                token_ids=i32_bytes(np.array(prompts[row], dtype=np.int32)),
                num_prompt_tokens=workload.prompt_len,
                num_computed_tokens=0,
                num_cached_tokens=0,
                block_ids=i32_bytes(
                    1
                    + row * workload.blocks_per_row
                    + np.arange(workload.blocks_per_row, dtype=np.int32)
                ),
                params=params,
            )
            for row in rows.tolist()
        ]
        lens = np.full(len(rows), workload.prompt_len, dtype=np.int32)
        steps.append(
            ExecuteStep(
                len(steps) + 1,
                new_rows=new_rows,
                prefill_rows=i32_bytes(rows),
                prefill_lens=i32_bytes(lens),
            )
        )
    return steps


def _take(in_flight: deque[LaunchedStep], tokens: list[StepTokens]) -> None:
    """Wait for the oldest step and keep its tokens."""
    launched = in_flight.popleft()
    launched.arrived.synchronize()
    messages: list[Message] = launched.result.to_messages()
    tokens += [message for message in messages if isinstance(message, StepTokens)]


class Transformers:
    """The continuous batching of transformers, as `generate_batch` sets it up."""

    def __init__(
        self, config: ConfigDict, tensors: dict[str, Tensor], device: str = "cuda"
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {name: value for name, value in config.items() if name != "model_type"}
        model_config = AutoConfig.for_model(config["model_type"], **settings)
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(model_config, dtype=DTYPE).eval()
        # strict=False: a tied head is not among the tensors.
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self._manager: Any = None

    @contextmanager
    def serving(self, workload: Workload) -> Iterator[None]:
        """Its engine runs, graphs captured, sized for the workload, within this context."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        # Room for twice the workload, and no more: the rest of the memory is the other engine's.
        num_tokens = 2 * workload.batch * (workload.length + 256)
        engine = self._model.continuous_batching_context_manager(
            generation_config=GenerationConfig(
                max_new_tokens=workload.num_new, do_sample=False, eos_token_id=-1
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=-(-num_tokens // 256),
                max_batch_tokens=MAX_BATCHED_TOKENS,
                max_requests_per_batch=workload.batch,
                allow_block_sharing=False,
            ),
        )
        with engine as self._manager:
            yield

    def run(self, workload: Workload, prompts: list[list[int]]) -> Run:
        """Hand over all prompts at once and wait for all outputs."""
        started = perf_counter()
        ids = self._manager.add_requests(inputs=prompts, max_new_tokens=workload.num_new)
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("the continuous batching of transformers has ended early")
            if result is not None and result.is_finished():
                outputs[result.request_id] = result.generated_tokens
        return Run(perf_counter() - started, [outputs[request_id] for request_id in ids])
