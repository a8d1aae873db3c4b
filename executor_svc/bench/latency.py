"""`headrace bench latency`: prefill and decode time of the executor alone, in this process.

Drives the very `ExecutorStage` of a server, greedy sampling included, with plans made here: no
other stage, no channel, no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import msgspec
import torch

from executor_svc.bench.plans import Plans, Workload
from executor_svc.bench.report import Report, make_phase
from executor_svc.bench.work import Work, WorkModel
from executor_svc.kv_cache import KvCacheSizeError
from executor_svc.loading import load
from executor_svc.model_config import ModelLoadError, load_model_config
from executor_svc.models.decoder import Decoder
from executor_svc.models.decoder_config import parse_decoder_config
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.models.model import Model
from executor_svc.ops.native.library import LibraryUnavailable, load_library
from executor_svc.ops.native.limits import Limits, Probe
from executor_svc.stage import ExecutorStage
from stages.config import ServerConfig
from stages.errors import ConfigError
from stages.messages import ExecuteStep
from stages.model_folder import model_path
from stages.native_library import TORCH
from stages.stage import Stage

Clock = Callable[[], int]


class Round(NamedTuple):
    """Nanoseconds of the whole prefill, and of each decode step.

    `read_bytes_per_s`: what the machine read right before and after, the mean; None: not measured.
    """

    prefill_ns: int
    decode_ns: list[int]
    read_bytes_per_s: float | None = None

    @property
    def total_ns(self) -> int:
        return self.prefill_ns + sum(self.decode_ns)


def bench_latency(
    config: ServerConfig, *, input_len: int, output_len: int, rounds: int, warmup: int
) -> Report:
    """Measure `rounds` rounds of `config.max_num_seqs` requests after `warmup` unmeasured ones.

    Raises:
        ConfigError: the model cannot be loaded, or its KV cache does not fit.
    """
    workload = Workload(
        input_len=input_len,
        output_len=output_len,
        batch_size=config.max_num_seqs,
        block_size=config.block_size,
        token_budget=config.max_num_batched_tokens,
        vocab_size=config.facts.vocab_size,
    )
    try:
        model, kv_cache = load(msgspec.structs.replace(config, num_blocks=workload.num_blocks))
    except (ModelLoadError, KvCacheSizeError) as error:
        raise ConfigError(str(error)) from error
    probe = _start_probe(model.kv_spec.dtype, config.cpu_kernels)
    limits, read_now = (probe.measure_limits(), probe.read_now) if probe else (None, None)
    stage = ExecutorStage(config, model, kv_cache)
    measured = run_rounds(stage, workload, rounds, warmup, config.seed, read_now=read_now)
    return make_report(config, model, workload, limits, measured)


def run_rounds(
    stage: Stage,
    workload: Workload,
    rounds: int,
    warmup: int,
    seed: int,
    clock: Clock = time.perf_counter_ns,
    read_now: Callable[[], float] | None = None,
) -> list[Round]:
    """Compute the workload again and again, each time with other prompts and other blocks.

    `read_now` tells between the rounds how many bytes a second the machine reads.
    """
    plans = Plans(workload, seed)
    for _ in range(warmup):
        _run_round(stage, plans, clock)
    if read_now is None:
        return [_run_round(stage, plans, clock) for _ in range(rounds)]
    rates, measured = [read_now()], list[Round]()
    for _ in range(rounds):
        measured.append(_run_round(stage, plans, clock))
        rates.append(read_now())
    around = (sum(pair) / 2 for pair in pairwise(rates))
    return [
        round_._replace(read_bytes_per_s=rate)
        for round_, rate in zip(measured, around, strict=True)
    ]


def make_report(
    config: ServerConfig,
    model: Model,
    workload: Workload,
    limits: Limits | None,
    rounds: list[Round],
) -> Report:
    """Set the times against what had to be done and what the machine can do."""
    prefill_ns = [round_.prefill_ns for round_ in rounds]
    decode_ns = [time_ns for round_ in rounds for time_ns in round_.decode_ns]
    prefill_work = decode_work = None
    if isinstance(model, FusedDecoder | Decoder):
        prefill_work, decode_work = _count_work(config, model, workload)
    prompt_tokens = workload.batch_size * workload.input_len
    return Report(
        model=config.served_model_name,
        dtype=str(model.kv_spec.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        batch_size=workload.batch_size,
        input_len=workload.input_len,
        output_len=workload.output_len,
        rounds=len(rounds),
        read_bytes_per_s=limits.read if limits else None,
        flops_per_s=limits.flops if limits else None,
        prefill=make_phase(prefill_ns, prompt_tokens, prefill_work, limits),
        decode=make_phase(decode_ns, workload.batch_size, decode_work, limits)
        if decode_ns
        else None,
        latency_ms_p50=median(round_.total_ns for round_ in rounds) / 1e6,
        paired_bandwidth_share=paired_share(rounds, decode_work),
    )


def paired_share(rounds: list[Round], work: Work | None) -> float | None:
    """The median over rounds of decode's bytes a second over what was read beside the round."""
    shares = [
        work.num_bytes / (median(round_.decode_ns) / 1e9) / round_.read_bytes_per_s
        for round_ in rounds
        if work is not None and round_.decode_ns and round_.read_bytes_per_s is not None
    ]
    return median(shares) if shares else None


def _count_work(
    config: ServerConfig, model: FusedDecoder | Decoder, workload: Workload
) -> tuple[Work, Work]:
    """Of the whole prefill, and of a mean decode step."""
    decoder_config = parse_decoder_config(load_model_config(model_path(config)))
    counter = WorkModel(decoder_config, model.kv_spec, model.weight_bytes)
    decode = counter.steps(workload.decode_steps(), workload.input_len)
    num_steps = max(1, workload.output_len - 1)
    return counter.steps(workload.prefill_steps(), workload.input_len), decode / num_steps


def _start_probe(dtype: torch.dtype, kernels: str) -> Probe | None:
    if kernels == TORCH:
        return None
    try:
        library = load_library(choice=kernels)
    except LibraryUnavailable:
        return None
    return Probe(library, torch.get_num_threads(), dtype)


def _run_round(stage: Stage, plans: Plans, clock: Clock) -> Round:
    prefill = _times(stage, plans.prefill(), clock)
    decode = _times(stage, plans.decode(), clock)
    return Round(prefill[-1] - prefill[0], [end - begin for begin, end in pairwise(decode)])


def _times(stage: Stage, steps: Iterable[ExecuteStep], clock: Clock) -> list[int]:
    """The clock before the first step and behind each; plans are made beforehand."""
    plans = [*steps]
    times = [clock()]
    for plan in plans:
        stage.handle([plan], now_ns=0)
        times.append(clock())
    return times
