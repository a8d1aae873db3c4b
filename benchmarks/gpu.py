"""Decode on one GPU: tokens/s, share of the memory's bandwidth, idle gaps, beside transformers.

Headrace's executor (launcher, graphs, kernels, sampling; no scheduler and no channels) and the
continuous batching of transformers get the same random weights and prompts, both greedy, and take
turns: A B A B, medians. Run it as `python benchmarks/gpu.py --shape qwen3-8b --batch 1 64`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_engines import Headrace, Run, Transformers, Workload, random_weights

from executor_svc.accelerator.cuda import CudaDevice
from executor_svc.model_shapes import SHAPES, ConfigDict
from stages.errors import HeadraceError

GPU_SHAPES: dict[str, ConfigDict] = {
    "qwen3-0.6b": SHAPES["qwen3-0.6b"],
    # As published, beside what it shares with the small one.
    "qwen3-8b": SHAPES["qwen3-0.6b"]
    | {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "max_window_layers": 36,
        "tie_word_embeddings": False,
    },
}
COPY_BYTES = 4 * 2**30
COPIES = 20


def copy_bandwidth() -> float:
    """Bytes a second that a large copy within the GPU's memory reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(COPIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / median(times)


def quantile(values: list[float], share: float) -> float:
    """The value that a share of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def figures(workload: Workload, runs: list[Run], peer: list[Run], rate: float) -> dict[str, Any]:
    """One line of the table. `rate`: the measured bytes a second."""
    step_s = median(median(run.step_ms) for run in runs) / 1e3
    gaps = [gap for run in runs for gap in run.gap_us]
    num_tokens = workload.batch * workload.num_new
    line = {
        "batch": workload.batch,
        "step_ms": step_s * 1e3,
        "decode_tokens_per_s": workload.batch / step_s,
        "share_of_copy_bandwidth": runs[0].step_bytes / step_s / rate,
        "gap_us_p50": quantile(gaps, 0.5),
        "gap_us_p99": quantile(gaps, 0.99),
        "tokens_per_s": num_tokens / median(run.seconds for run in runs),
        "spread": max(r.seconds for r in runs) / min(r.seconds for r in runs) - 1,
    }
    if peer:
        line["transformers_tokens_per_s"] = num_tokens / median(run.seconds for run in peer)
        line["times_transformers"] = line["tokens_per_s"] / line["transformers_tokens_per_s"]
        pairs = zip(runs[0].token_ids, peer[0].token_ids, strict=True)
        line["rows_with_equal_tokens"] = sum(ours == theirs for ours, theirs in pairs)
    return line


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes of one shape.

    Raises:
        DeviceUnavailable: there is no GPU; the text says what is missing.
    """
    device = CudaDevice()
    config = GPU_SHAPES[arguments.shape]
    rate = copy_bandwidth()
    tensors = random_weights(config)
    workloads = [Workload(batch, arguments.prompt, arguments.new) for batch in arguments.batch]
    headrace = Headrace(config, tensors, workloads, device)
    peer = None if arguments.no_transformers else Transformers(config, tensors)
    lines = []
    for workload in workloads:
        prompts = workload.prompts(config["vocab_size"])
        ours: list[Run] = []
        theirs: list[Run] = []
        with peer.serving(workload) if peer else headrace.alone():
            for _ in range(arguments.rounds + 1):
                ours.append(headrace.run(workload, prompts))
                if peer is not None:
                    theirs.append(peer.run(workload, prompts))
        # The first of each warms up.
        lines.append(figures(workload, ours[1:], theirs[1:], rate))
        print_line(lines[-1])
    return {
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": rate / 1e9,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "lines": lines,
    }


def print_line(line: dict[str, Any]) -> None:
    """One line of figures, named, as they come."""
    print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)


def main() -> None:
    """Measure and print; exit with a clear text where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=GPU_SHAPES, default="qwen3-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate for each")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each")
    parser.add_argument("--no-transformers", action="store_true", help="measure Headrace alone")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except HeadraceError as error:
        sys.exit(f"gpu.py: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
