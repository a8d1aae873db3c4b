"""Which processors stages get, on machines that are folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.card_place import (
    PlaceUnknown,
    card_place,
    cores_of,
    format_cpulist,
    parse_cpulist,
)
from stages.cpu_binding import EXECUTOR_CORES, bind_cpus, divide
from stages.host import Host, tool_output
from stages.launch import run_on
from stages.topology import EXECUTOR, stage_names

STAGES = stage_names(1)
# As an Atlas 800T A2 prints its eight cards: not in the order of the bus.
NPU_SMI = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 92.4        35                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3389 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 90.1        36                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3389 / 65536         |
"""


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def add_card(root: Path, address: str, node: int) -> None:
    write(root, f"sys/bus/pci/devices/{address}/numa_node", str(node))


def add_node(root: Path, node: int, cpulist: str, threads: Sequence[str] = ()) -> None:
    """`threads`: the processors of each core that has several."""
    write(root, f"sys/devices/system/node/node{node}/cpulist", cpulist)
    for core in threads:
        for cpu in parse_cpulist(core):
            write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", core)


def host(
    root: Path, tools: Mapping[str, str] | None = None, environment: Mapping[str, str] | None = None
) -> Host:
    def output_of(command: Sequence[str]) -> str | None:
        return (tools or {}).get(" ".join(command))

    return Host(root, environment or {}, output_of)


@pytest.fixture
def ascend(tmp_path: Path) -> Path:
    """Two nodes of eight cores; card 0 is on the second."""
    add_node(tmp_path, 0, "0-7")
    add_node(tmp_path, 1, "8-15")
    add_card(tmp_path, "0000:c1:00.0", 1)
    add_card(tmp_path, "0000:01:00.0", 0)
    return tmp_path


def ascend_host(root: Path, **environment: str) -> Host:
    return host(root, {"npu-smi info": NPU_SMI}, environment)


def test_the_executor_has_cores_of_its_own_beside_the_card(ascend: Path) -> None:
    binding = bind_cpus("npu", STAGES, range(16), ascend_host(ascend))
    others = [8, 9, 10, 11]
    assert binding.cpus == {s: [12, 13, 14, 15] if s == EXECUTOR else others for s in STAGES}
    assert binding.text == (
        "executor on 12-15, the other stages on 8-11, of NUMA node 1, where card 0000:c1:00.0 sits"
    )


def test_the_first_visible_card_counts(ascend: Path) -> None:
    place = card_place("npu", ascend_host(ascend, ASCEND_RT_VISIBLE_DEVICES="1,0"))
    assert (place.address, place.node) == ("0000:01:00.0", 0)


def test_only_processors_that_the_group_may_use(ascend: Path) -> None:
    binding = bind_cpus("npu", STAGES, [0, 1, 9, 11, 13, 15], ascend_host(ascend))
    assert binding.cpus["gateway"] == [9, 11]
    assert binding.cpus[EXECUTOR] == [13, 15]


def test_too_few_of_them_bind_nobody(ascend: Path) -> None:
    binding = bind_cpus("npu", STAGES, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], ascend_host(ascend))
    assert not binding.cpus
    assert binding.text.startswith("none: only 2 usable cores on NUMA node 1")


def test_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-3,8-11", ["0,8", "1,9", "2,10", "3,11"])
    assert cores_of(range(12), host(tmp_path))[:4] == [{0, 8}, {1, 9}, {2, 10}, {3, 11}]
    add_card(tmp_path, "0000:c1:00.0", 0)
    binding = bind_cpus("npu", STAGES, range(12), ascend_host(tmp_path))
    assert binding.cpus["sampler"] == [0, 1, 8, 9]
    assert binding.cpus[EXECUTOR] == [2, 3, 10, 11]


def gpu_host(root: Path, **environment: str) -> Host:
    add_node(root, 0, "0-31")
    for address, node, uuid in (("0000:5d:00.0", 0, "GPU-a1"), ("0000:0a:00.0", -1, "GPU-b2")):
        write(root, f"proc/driver/nvidia/gpus/{address}/information", f"GPU UUID: \t {uuid}")
        add_card(root, address, node)
    return host(root, environment=environment)


@pytest.mark.parametrize("visible", ["1", "GPU-a1", "1,0"])
def test_a_gpu_by_its_number_on_the_bus_or_its_name(tmp_path: Path, visible: str) -> None:
    place = card_place("cuda", gpu_host(tmp_path, CUDA_VISIBLE_DEVICES=visible))
    assert place.address == "0000:5d:00.0"
    assert place.cores == [{cpu} for cpu in range(32)]


@pytest.mark.parametrize(
    ("device", "environment", "text"),
    [
        ("cuda", {}, "does not tell the NUMA node of card 0000:0a:00.0"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2"}, "does not tell the PCI address of card 2"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-x"}, "does not tell the PCI address of card GPU-x"),
        ("npu", {}, "npu-smi info does not tell the PCI address of card 0"),
    ],
)
def test_what_is_not_told_binds_nobody(
    tmp_path: Path, device: str, environment: dict[str, str], text: str
) -> None:
    machine = gpu_host(tmp_path, **environment)
    with pytest.raises(PlaceUnknown, match=text):
        card_place(device, machine)
    binding = bind_cpus(device, STAGES, range(32), machine)
    assert not binding.cpus and text in binding.text


@given(num_cores=st.integers(2, 64), threads=st.integers(1, 4), gateways=st.integers(1, 4))
def test_every_processor_has_one_owner(num_cores: int, threads: int, gateways: int) -> None:
    cores = [frozenset(range(i * threads, (i + 1) * threads)) for i in range(num_cores)]
    stages = stage_names(gateways)
    cpus = divide(cores, stages)
    assert list(cpus) == stages
    [others] = {tuple(cpus[stage]) for stage in stages if stage != EXECUTOR}
    assert sorted([*cpus[EXECUTOR], *others]) == list(range(num_cores * threads))
    assert threads <= len(cpus[EXECUTOR]) <= min(EXECUTOR_CORES * threads, len(others))


@given(st.frozensets(st.integers(0, 200)))
def test_a_set_of_processors_as_the_kernel_writes_it(cpus: frozenset[int]) -> None:
    assert parse_cpulist(format_cpulist(cpus)) == cpus


def test_a_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert tool_output(["no-such-tool"]) is None
    assert tool_output(["false"]) is None


def test_a_process_runs_where_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    before = os.sched_getaffinity(0)
    try:
        run_on([min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
        run_on([])
        assert os.sched_getaffinity(0) == {min(before)}
        run_on([1023])
        assert "cannot run on processors [1023]" in caplog.text
    finally:
        os.sched_setaffinity(0, before)
