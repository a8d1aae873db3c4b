"""How many streamed tokens a second leave through HTTP when the device takes no time.

The whole group with the emulated device at 0 ms: gateway, scheduler, sampler, rings and sockets are
the real ones, so this is the pipeline's own ceiling. The load client shares the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from server import CPU_FIGURE, Figures, ServerFailed, headrace, serving

PROMPT_TOKENS = 8
VOCAB_SIZE = 256  # every model has these ids
NO_TIME = ("--device", "emulated", "--emulated-step-ms", "0", "--emulated-token-us", "0")


def measure(model: Path | None, streams: int, tokens: int, rounds: int) -> list[Figures]:
    """Stream `tokens` tokens to each of `streams` clients; returns the figures of each round."""
    results = []
    rows = ("--max-num-seqs", str(streams), "--max-num-batched-tokens", str(16 * streams))
    with serving(headrace(model, *NO_TIME, *rows)) as server:
        for seed in range(rounds):
            figures = server.put_load(
                concurrency=streams,
                num_requests=streams,
                prompt_tokens=PROMPT_TOKENS,
                max_tokens=tokens,
                vocab_size=VOCAB_SIZE,
                seed=seed,
            )
            print(
                f"{figures['tokens_per_s']:>10,.0f} tokens/s   "
                f"{1000 * figures[CPU_FIGURE]:6.2f} us of CPU a token in the server",
                flush=True,
            )
            results.append(figures)
    return results


def main() -> int:
    """Print each round and the median; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="whose tokenizer is used (embedded model)")
    parser.add_argument("--streams", type=int, default=256, help="default: 256")
    parser.add_argument("--tokens", type=int, default=500, help="tokens a stream (500)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    try:
        results = measure(arguments.model, arguments.streams, arguments.tokens, arguments.rounds)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    rate = median(figures["tokens_per_s"] for figures in results)
    print(f"median of {len(results)} rounds, {arguments.streams} streams: {rate:,.0f} tokens/s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
