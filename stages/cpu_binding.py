"""Which processors each stage of a group runs on: those beside the card, the executor's its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

from stages.card_place import Core, PlaceUnknown, card_place, format_cpulist
from stages.host import Host
from stages.topology import EXECUTOR

# What launches steps, what waits for their ends, and two threads of the device's runtime.
EXECUTOR_CORES = 4
# Fewer are not worth dividing: on another node there may be idle ones.
MIN_CORES = 4
UNBOUND: Mapping[str, list[int]] = MappingProxyType({})


@dataclass(frozen=True)
class CpuBinding:
    """`cpus`: of each stage, ascending, none where stages stay where they are; `text` says why."""

    text: str
    cpus: Mapping[str, list[int]] = field(default_factory=lambda: UNBOUND)


def bind_cpus(
    device: str, stages: Sequence[str], affinity: Iterable[int], host: Host
) -> CpuBinding:
    """Bind the stages of a group that computes on a device, npu or cuda.

    `affinity`: the processors that the group may use at all.
    """
    try:
        place = card_place(device, host)
    except PlaceUnknown as unknown:
        return CpuBinding(f"none: {unknown}")
    allowed = frozenset(affinity)
    cores = [core & allowed for core in place.cores if core & allowed]
    where = f"NUMA node {place.node}, where card {place.address} sits"
    if len(cores) < MIN_CORES:
        return CpuBinding(f"none: only {len(cores)} usable cores on {where}")
    cpus = divide(cores, stages)
    own, others = (format_cpulist(cpus[stage]) for stage in (EXECUTOR, stages[0]))
    return CpuBinding(f"executor on {own}, the other stages on {others}, of {where}", cpus)


def divide(cores: Sequence[Core], stages: Sequence[str]) -> dict[str, list[int]]:
    """Give the executor the last cores, at most half of all, and the others the rest together.

    The first cores of a node are where a kernel sends interrupts.
    """
    num_own = min(EXECUTOR_CORES, len(cores) // 2)
    own, rest = cores[len(cores) - num_own :], cores[: len(cores) - num_own]
    return {
        stage: sorted(chain.from_iterable(own if stage == EXECUTOR else rest)) for stage in stages
    }
