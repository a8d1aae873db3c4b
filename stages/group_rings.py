"""The rings of one epoch as the supervisor holds them: made, handed out, closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from shm.descriptors import RingDescriptors, create_ring
from stages.messages import RingEnd
from stages.ring_ends import WRITER
from stages.topology import RingSpec


class GroupRings:
    """Owns the descriptors; what it hands out are duplicates made by the kernel."""

    def __init__(self, specs: Sequence[RingSpec], slot_bytes: int) -> None:
        self._specs = specs
        self._rings = [
            create_ring(spec.name, spec.readers, slot_bytes, writer_name=spec.writer)
            for spec in specs
        ]

    @contextmanager
    def ends_of(self, stage: str) -> Iterator[tuple[list[RingEnd], list[int]]]:
        """The ends of `stage` and their descriptors, valid inside the `with`."""
        ends: list[RingEnd] = []
        all_fds: list[int] = []
        with ExitStack() as stack:
            for spec, ring in zip(self._specs, self._rings, strict=True):
                for role, duplicate in self._ends(spec, ring, stage):
                    payload, fds = stack.enter_context(duplicate).to_wire()
                    ends.append(RingEnd(spec.name, role, payload, len(fds)))
                    all_fds += fds
            yield ends, all_fds

    def close(self) -> None:
        """Let go; the memory lives while a stage is still attached."""
        for ring in self._rings:
            ring.close()

    @staticmethod
    def _ends(
        spec: RingSpec, ring: RingDescriptors, stage: str
    ) -> list[tuple[str, RingDescriptors]]:
        ends = [(WRITER, ring.for_writer())] if stage == spec.writer else []
        if stage in spec.readers:
            index = spec.readers.index(stage)
            ends.append((str(index), ring.for_reader(index)))
        return ends
