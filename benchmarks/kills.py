"""kill -9 of random stages, again and again, under streams whose every token is known.

    python -m benchmarks.kills [--seconds 120] [--seed 0] [-- FLAGS OF headrace serve]

Prints how many processes were killed, how many streams ran, and how many of them differed from the
undisturbed ones; exit code 1 if any did. From the root of a checkout.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from stages.errors import HeadraceError
from tests.process.group import Group, serving
from tests.process.streams import KINDS, NUM_STREAMS, run_streams

VICTIMS = ("tokenizer", "scheduler", "executor", "sampler")
MAX_PAUSE_S = 1.5
# The point is to disturb far more often than any limit allows.
NO_LIMITS = ("--max-restarts", "1000000", "--max-recoveries", "1000000")


class Killer(threading.Thread):
    """Kills a random stage after random pauses until it is told to stop."""

    def __init__(self, group: Group, seed: int) -> None:
        super().__init__()
        self.num_kills = 0
        self._group = group
        self._random = random.Random(seed)
        self._is_over = threading.Event()

    def run(self) -> None:
        """See the class."""
        while not self._is_over.wait(self._random.random() * MAX_PAUSE_S):
            try:
                self._group.kill(self._random.choice(VICTIMS))
                self.num_kills += 1
            except (ProcessLookupError, HeadraceError):
                continue  # it was dead already

    def stop(self) -> None:
        """Stop and wait for the end."""
        self._is_over.set()
        self.join()


def main(seconds: float, seed: int, flags: list[str]) -> int:
    """Run; returns the exit code."""
    num_rounds = num_wrong = 0
    with (
        tempfile.TemporaryDirectory(prefix="headrace-") as folder,
        serving(Path(folder) / "run", *NO_LIMITS, *flags) as group,
    ):
        undisturbed = {kind: run_streams(group, kind) for kind in KINDS}
        killer = Killer(group, seed)
        killer.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                kind = KINDS[num_rounds % len(KINDS)]
                texts = run_streams(group, kind)
                num_rounds += 1
                pairs = zip(texts, undisturbed[kind], strict=True)
                num_wrong += sum(text != expected for text, expected in pairs)
        finally:
            killer.stop()
    num_streams = num_rounds * NUM_STREAMS
    print(f"{killer.num_kills} kills, {num_streams} streams, {num_wrong} of them wrong")
    return 1 if num_wrong or not killer.num_kills else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="flags of headrace serve, behind --")
    arguments = parser.parse_args()
    sys.exit(main(arguments.seconds, arguments.seed, arguments.flags))
