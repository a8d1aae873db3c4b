"""Decode steps as recorded graphs, one for each batch bucket, and why a step could not use one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from torch import Tensor

from executor_svc.accelerator.device import Captured, Device

# Beyond this many rows launching is a small part of a step.
LARGEST_BUCKET = 512
# The context length of a padding row: its own token.
PADDING_LEN = 1


def batch_buckets(max_num_rows: int) -> list[int]:
    """The batch sizes that are recorded: powers of two, and the largest batch itself."""
    largest = min(max_num_rows, LARGEST_BUCKET)
    buckets = [1]
    while buckets[-1] * 2 < largest:
        buckets.append(buckets[-1] * 2)
    return buckets if largest == 1 else [*buckets, largest]


class DecodeGraphs:
    """Records a decode step once a bucket (or twice, see `Device.num_captures`), then replays."""

    def __init__(
        self, device: Device, stream: Any, buckets: Sequence[int], decode: Callable[[int], Tensor]
    ) -> None:
        """`decode`: enqueue a step of so many rows, return its logits [rows, vocab]."""
        self._buckets = buckets
        self._captures: dict[int, Iterator[Captured]] = {}
        # The largest first: the smaller ones fit into the memory that it took.
        for bucket in sorted(buckets, reverse=True):
            run = partial(decode, bucket)
            run()  # compiles and loads what a capture must not
            copies = [device.capture(run, stream) for _ in range(device.num_captures)]
            self._captures[bucket] = cycle(copies)

    def bucket(self, num_rows: int) -> int | None:
        """The smallest recorded size that holds so many rows."""
        return next((bucket for bucket in self._buckets if bucket >= num_rows), None)

    def take(self, bucket: int, seq_lens: Sequence[int]) -> Captured:
        """The recorded step whose turn it is, told its lengths."""
        captured = next(self._captures[bucket])
        padding = [PADDING_LEN] * (bucket - len(seq_lens))
        captured.set_lengths([*seq_lens, *padding])
        return captured


class GraphCounts:
    """How many steps ran as a graph, and for which reasons others did not."""

    def __init__(self) -> None:
        self.num_replayed = 0
        self._eager: Counter[str] = Counter()

    def count_eager(self, reason: str) -> None:
        """One step fell out; `reason` is a word or a few joined by underscores."""
        self._eager[reason] += 1

    def stats(self) -> dict[str, float]:
        """As `Stage.stats`."""
        eager = {f"executor_eager_steps_{name}_total": n for name, n in self._eager.items()}
        return {"executor_graph_steps_total": self.num_replayed, **eager}
