"""`headrace collect-env`: the machine as a bug report needs it, and what in it does not match.

Reads files, package metadata and what the vendors' tools print; loads no device.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from typing import NamedTuple

from stages.card_place import PlaceUnknown, card_place, format_cpulist
from stages.host import Host

PACKAGES = ("headrace", "torch", "torch-npu", "triton", "transformers", "tokenizers", "numpy")
# Instructions that decide which CPU kernels run and how fast.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimddp", "bf16", "sve")
ASCEND = "usr/local/Ascend"


class Fact(NamedTuple):
    """One line."""

    name: str
    value: str


def installed_version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def kernel_build() -> str:
    """The compiled CPU kernels that this machine loads, or why it has none."""
    from executor_svc.ops.native.library import LibraryUnavailable, load_library

    try:
        return load_library().name
    except LibraryUnavailable as unavailable:
        return f"none: {unavailable}"


@dataclass(frozen=True)
class Machine(Host):
    """Where the facts come from: a test brings its own."""

    version_of: Callable[[str], str | None] = installed_version
    kernels: Callable[[], str] = kernel_build


def collect_env(machine: Machine | None = None) -> list[str]:
    """Lines of `name value`, and behind them a line for each thing that does not match."""
    machine = machine or Machine()
    facts = [*_host(machine), *_packages(machine), *_ascend(machine), *_nvidia(machine)]
    lines = [f"{fact.name:<18} {fact.value}" for fact in facts]
    found = list(mismatches(machine, dict(facts)))
    return [*lines, *(f"! {text}" for text in found or ["nothing that does not match"])]


def mismatches(machine: Machine, facts: Mapping[str, str]) -> Iterator[str]:
    """What keeps a device from working, each with the remedy."""
    torch, torch_npu = machine.version_of("torch"), machine.version_of("torch-npu")
    has_npu = facts["NPU cards"] != NONE
    if torch and torch_npu and _minor(torch) != _minor(torch_npu):
        yield f"torch-npu {torch_npu} is not of torch {torch}: install the same minor version"
    if torch_npu and facts["NPU driver"] == NONE:
        yield "torch-npu is installed, but there is no NPU driver: --device npu cannot work here"
    if torch_npu and facts["CANN"] == NONE:
        yield "torch-npu is installed, but there is no CANN: install it and source its set_env.sh"
    if torch_npu and facts["CANN"] != NONE and "ASCEND_HOME_PATH" not in machine.environment:
        yield "CANN is installed, but ASCEND_HOME_PATH is not set: source its set_env.sh"
    if has_npu and not torch_npu:
        yield "there is an NPU, but no torch-npu: pip install 'headrace[npu]'"
    has_cuda = facts["NVIDIA driver"] != NONE
    if has_cuda and torch and torch.endswith("+cpu"):
        yield f"there is an NVIDIA driver, but torch {torch} is built for the CPU"
    if has_cuda and machine.version_of("triton") is None:
        yield "there is an NVIDIA driver, but no triton: pip install 'headrace[cuda]'"
    if facts["CPU kernels"].startswith(NONE):
        yield "no compiled CPU kernels: install a C compiler, then headrace again"


NONE = "none"


def _host(machine: Machine) -> Iterator[Fact]:
    cpuinfo = machine.read("proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags", "Features").split())
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Fact("Python", platform.python_version())
    yield Fact(
        "CPU", f"{cpuinfo.count('processor')} x {_field(cpuinfo, 'model name') or 'unknown'}"
    )
    yield Fact("CPU flags", " ".join(flag for flag in CPU_FLAGS if flag in flags) or NONE)
    yield Fact("CPU kernels", machine.kernels())


def _packages(machine: Machine) -> Iterator[Fact]:
    for package in PACKAGES:
        yield Fact(package, machine.version_of(package) or NONE)


def _ascend(machine: Machine) -> Iterator[Fact]:
    home = machine.environment.get("ASCEND_HOME_PATH", "/" + ASCEND + "/ascend-toolkit/latest")
    cards = sorted((machine.root / "dev").glob("davinci[0-9]*"))
    yield Fact("NPU driver", _version(machine.read(f"{ASCEND}/driver/version.info")))
    yield Fact("NPU firmware", _version(machine.read(f"{ASCEND}/firmware/version.info")))
    yield Fact("CANN", _cann_version(machine, home.lstrip("/")))
    yield Fact("NPU cards", " ".join(card.name for card in cards) or NONE)
    if cards:
        yield Fact("NPU place", _place(machine, "npu"))
    yield from _lines("npu-smi", machine.output_of(["npu-smi", "info"]))


def _nvidia(machine: Machine) -> Iterator[Fact]:
    driver = machine.read("proc/driver/nvidia/version").split("\n")[0]
    query = ["--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
    yield Fact("NVIDIA driver", driver or NONE)
    if driver:
        yield Fact("GPU place", _place(machine, "cuda"))
    yield from _lines("nvidia-smi", machine.output_of(["nvidia-smi", *query]))


def _place(machine: Machine, device: str) -> str:
    """Of the first visible card, as `--cpu-binding auto` sees it."""
    try:
        place = card_place(device, machine)
    except PlaceUnknown as unknown:
        return f"unknown: {unknown}"
    cpus = format_cpulist(chain.from_iterable(place.cores))
    return f"{place.address}, NUMA node {place.node}, processors {cpus}"


def _lines(tool: str, output: str | None) -> Iterator[Fact]:
    for line in (NONE if output is None else output).splitlines():
        yield Fact(tool, line)


def _cann_version(machine: Machine, home: str) -> str:
    folder = machine.root / home
    files = [*sorted(folder.glob("*-linux/ascend_toolkit_install.info")), folder / "version.cfg"]
    found = (_version(machine.read(str(file.relative_to(machine.root)))) for file in files)
    return next((version for version in found if version != NONE), NONE)


def _version(text: str) -> str:
    """From lines of `Version=...`, as Ascend's installers write them."""
    return _field(text, "version", "Version", separator="=") or NONE


def _field(text: str, *names: str, separator: str = ":") -> str:
    for line in text.splitlines():
        name, _, value = line.partition(separator)
        if name.strip() in names:
            return value.strip()
    return ""


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
