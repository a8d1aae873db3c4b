"""`headrace collect-env` on machines that are folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from executor_svc.collect_env import Machine, collect_env

VERSIONS = {"torch": "2.13.0+cpu", "numpy": "2.4.0", "headrace": "0.1.0"}
NO_MISMATCH = ["! nothing that does not match"]


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def make_machine(
    root: Path,
    versions: Mapping[str, str],
    tools: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    kernels: str = "avx2",
) -> Machine:
    def output_of(command: Sequence[str]) -> str | None:
        return (tools or {}).get(command[0])

    return Machine(root, environment or {}, output_of, versions.get, lambda: kernels)


def ascend(root: Path) -> None:
    """A host with a card, its driver and CANN."""
    write(root, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd bf16 sve\n")
    write(root, "dev/davinci0", "")
    write(root, "dev/davinci1", "")
    write(root, "dev/davinci_manager", "")
    write(root, "usr/local/Ascend/driver/version.info", "Version=25.2.0\nascendhal_version=7\n")
    write(root, "usr/local/Ascend/firmware/version.info", "Version=7.7.0\n")
    home = "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info"
    write(root, home, "package_name=Ascend-cann-toolkit\nversion=8.5.0\n")


def marks(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("!")]


def test_a_plain_machine_matches(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor : 0\nmodel name : Xeon\nflags : sse avx2 avx512f\n")
    lines = collect_env(make_machine(tmp_path, VERSIONS))
    assert "CPU                1 x Xeon" in lines
    assert "CPU flags          avx2 avx512f" in lines
    assert "NPU driver         none" in lines
    assert marks(lines) == NO_MISMATCH


def test_an_ascend_host_matches(tmp_path: Path) -> None:
    ascend(tmp_path)
    environment = {"ASCEND_HOME_PATH": "/usr/local/Ascend/ascend-toolkit/latest"}
    tools = {"npu-smi": "| NPU 910B3 |\n| OK | 0000:C1:00.0 |"}
    write(tmp_path, "sys/bus/pci/devices/0000:c1:00.0/numa_node", "3\n")
    write(tmp_path, "sys/devices/system/node/node3/cpulist", "72-95\n")
    versions = {**VERSIONS, "torch-npu": "2.13.0"}
    lines = collect_env(make_machine(tmp_path, versions, tools, environment))
    for line in (
        "NPU driver         25.2.0",
        "NPU firmware       7.7.0",
        "CANN               8.5.0",
        "NPU cards          davinci0 davinci1",
        "npu-smi            | NPU 910B3 |",
        "npu-smi            | OK | 0000:C1:00.0 |",
        "NPU place          0000:c1:00.0, NUMA node 3, processors 72-95",
    ):
        assert line in lines
    assert marks(lines) == NO_MISMATCH


@pytest.mark.parametrize(
    ("versions", "has_ascend", "expected"),
    [
        ({"torch-npu": "2.12.0"}, True, "torch-npu 2.12.0 is not of torch 2.13.0+cpu"),
        ({"torch-npu": "2.13.0"}, False, "there is no NPU driver"),
        ({"torch-npu": "2.13.0"}, False, "there is no CANN"),
        ({"torch-npu": "2.13.0"}, True, "ASCEND_HOME_PATH is not set"),
        ({}, True, "there is an NPU, but no torch-npu: pip install 'headrace[npu]'"),
    ],
)
def test_what_does_not_match_is_said(
    versions: dict[str, str], has_ascend: bool, expected: str, tmp_path: Path
) -> None:
    if has_ascend:
        ascend(tmp_path)
    found = marks(collect_env(make_machine(tmp_path, VERSIONS | versions)))
    assert any(expected in line for line in found)


def test_a_gpu_without_its_packages(tmp_path: Path) -> None:
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: 580.1\nGCC\n")
    found = marks(collect_env(make_machine(tmp_path, VERSIONS)))
    assert any("torch 2.13.0+cpu is built for the CPU" in line for line in found)
    assert any("no triton" in line for line in found)


def test_missing_kernels_are_said(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, VERSIONS, kernels="none: no compiler")
    assert any("no compiled CPU kernels" in line for line in marks(collect_env(machine)))
