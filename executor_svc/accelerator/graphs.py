"""Decode steps as recorded graphs, one for each batch bucket, and why a step could not use one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from executor_svc.accelerator.device import Captured, DecodeOutput, Device

# Beyond this many rows launching is a small part of a step.
LARGEST_BUCKET = 512


def batch_buckets(max_num_rows: int) -> list[int]:
    """The batch sizes that are recorded: powers of two, and the largest batch itself."""
    largest = min(max_num_rows, LARGEST_BUCKET)
    buckets = [1]
    while buckets[-1] * 2 < largest:
        buckets.append(buckets[-1] * 2)
    return buckets if largest == 1 else [*buckets, largest]


class DecodeGraphs:
    """Records a decode step once a bucket."""

    def __init__(
        self,
        device: Device,
        stream: Any,
        buckets: Sequence[int],
        decode: Callable[[int], DecodeOutput],
        capacity: int,
    ) -> None:
        """`decode`: enqueue a step of so many rows. `capacity`: the longest context of a row."""
        # The largest first: the smaller ones fit into the memory that it took.
        recorded = {
            bucket: device.capture(partial(decode, bucket), stream, capacity)
            for bucket in sorted(buckets, reverse=True)
        }
        self._captured = [(bucket, recorded[bucket]) for bucket in sorted(buckets)]

    def of(self, num_rows: int) -> Captured | None:
        """The recorded step of the smallest size that holds so many rows."""
        return next((own for bucket, own in self._captured if bucket >= num_rows), None)


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
