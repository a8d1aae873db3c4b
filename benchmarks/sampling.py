"""What a token costs to sample, in microseconds a row: the compiled head beside the torch path.

Flat logits are what a model with random weights gives: most of the vocabulary is in the nucleus.
Both heads run on one thread and take turns; the best time of each counts.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch

from benchmarks.kernels import Bench, Call
from sampler_svc.native.head import NativeHead
from sampler_svc.native.library import load_library
from sampler_svc.sampling_head import SamplingHead
from sampler_svc.sampling_rows import ChoiceColumns
from sampler_svc.torch_head import TorchHead
from sampler_svc.uploads import upload_to

# Temperature, min_p, top_k, top_p.
RULES = {
    "greedy": (0.0, 0.0, 0, 1.0),
    "temperature": (0.8, 0.0, 0, 1.0),
    "min_p": (0.8, 0.05, 0, 1.0),
    "top_p 0.95": (0.8, 0.0, 0, 0.95),
    "top_k 50": (0.8, 0.0, 50, 1.0),
    "top_k 50, top_p 0.95": (0.8, 0.0, 50, 0.95),
}
LOGITS_SCALE = {"flat": 0.2, "peaked": 3.0}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="a round of one contender")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vocab_size, rows = arguments.vocab_size, arguments.rows
    bench = Bench(arguments.rounds, arguments.seconds)
    library = load_library()
    heads = [NativeHead(library, vocab_size, 1), TorchHead(upload_to(torch.device("cpu")))]
    print(f"{rows} rows of {vocab_size} tokens, us a row; build {library.name}")
    print(f"{'':32} {'compiled':>9} {'torch':>9} {'ratio':>6}")
    generator = torch.Generator().manual_seed(0)
    for shape, scale in LOGITS_SCALE.items():
        logits = torch.randn(rows, vocab_size, generator=generator) * scale
        for rule in RULES:
            _line(f"{shape}, {rule}", bench, [_choice(head, logits, rule) for head in heads], rows)
        _line(f"{shape}, 5 logprobs", bench, [_logprobs(head, logits) for head in heads], rows)


def _choice(head: SamplingHead, logits: torch.Tensor, rule: str) -> Call:
    temperature, min_p, top_k, top_p = RULES[rule]
    rows = len(logits)
    columns = ChoiceColumns(
        temperatures=np.full(rows, temperature, dtype=np.float32),
        min_p=np.full(rows, min_p, dtype=np.float32),
        top_k=np.full(rows, top_k, dtype=np.int64),
        top_p=np.full(rows, top_p, dtype=np.float64),
        is_seeded=np.ones(rows, dtype=np.bool_),
        is_greedy=temperature == 0,
    )
    uniforms = np.random.default_rng(0).random(rows)
    return partial(head.choose, logits, columns, uniforms)


def _logprobs(head: SamplingHead, logits: torch.Tensor) -> Call:
    token_ids = torch.zeros(len(logits), dtype=torch.int64)
    return partial(head.token_logprobs, logits, token_ids, np.arange(len(logits)), 5)


def _line(name: str, bench: Bench, calls: list[Call], rows: int) -> None:
    compiled, on_torch = (seconds / rows * 1e6 for seconds in bench.best(*calls))
    print(f"{name:32} {compiled:9.1f} {on_torch:9.1f} {on_torch / compiled:6.1f}", flush=True)


if __name__ == "__main__":
    main()
