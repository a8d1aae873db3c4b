"""Where an accelerator's card sits: its PCI address, its NUMA node, that node's processor cores.

Asks no device: reads /sys, /proc and what `npu-smi` prints, so that any process may ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from stages.host import Host

# A PCI address as `npu-smi info` prints it, one for each chip in the order of their numbers.
_ADDRESS = re.compile(r"\b[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", re.IGNORECASE)
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
GPUS = "proc/driver/nvidia/gpus"

# The logical processors that share a core.
Core = frozenset[int]


class PlaceUnknown(Exception):
    """The text says what is not told."""


class CardPlace(NamedTuple):
    """`cores`: of its NUMA node, ascending."""

    address: str
    node: int
    cores: list[Core]


def card_place(device: str, host: Host) -> CardPlace:
    """Find the first visible card of a kind, npu or cuda.

    Raises:
        PlaceUnknown: the machine does not say.
    """
    address = _address(device, host)
    node = host.read(f"sys/bus/pci/devices/{address}/numa_node").strip()
    cpulist = host.read(f"sys/devices/system/node/node{node}/cpulist").strip()
    if not node or int(node) < 0 or not cpulist:
        raise PlaceUnknown(f"the machine does not tell the NUMA node of card {address}")
    return CardPlace(address, int(node), cores_of(parse_cpulist(cpulist), host))


def cores_of(cpus: Iterable[int], host: Host) -> list[Core]:
    """The cores that some of these processors belong to, each without its other processors."""
    left, cores = set(cpus), []
    while left:
        cpu = min(left)
        path = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings = parse_cpulist(host.read(path).strip()) | {cpu}
        cores.append(frozenset(siblings & left))
        left -= siblings
    return cores


def parse_cpulist(text: str) -> frozenset[int]:
    """The kernel's form of a set of processors: '0-3,8' → 0, 1, 2, 3, 8."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def format_cpulist(cpus: Iterable[int]) -> str:
    """As `parse_cpulist` reads it."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def _address(device: str, host: Host) -> str:
    visible = host.environment.get(VISIBLE[device], "").split(",")[0].strip() or "0"
    addresses = _npu_addresses(host) if device == "npu" else _gpu_addresses(host)
    if visible.isdigit():
        named = addresses[int(visible) :][:1]
    else:
        named = [a for a in addresses if visible in host.read(f"{GPUS}/{a}/information")]
    if not named:
        source = "npu-smi info" if device == "npu" else f"/{GPUS}"
        raise PlaceUnknown(f"{source} does not tell the PCI address of card {visible}")
    return named[0].lower()


def _npu_addresses(host: Host) -> list[str]:
    found: list[str] = _ADDRESS.findall(host.output_of(["npu-smi", "info"]) or "")
    return found


def _gpu_addresses(host: Host) -> list[str]:
    """In the order of the bus, as nvidia-smi counts; so does CUDA where all cards are alike."""
    return sorted(folder.name for folder in (host.root / GPUS).glob("*:*"))
