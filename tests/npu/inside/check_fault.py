"""Errors that end a device, in file order. EMULATED_CANN_DEVICES=4, TASK_QUEUE_ENABLE=0."""

from __future__ import annotations

import pytest
import torch
import torch_npu


def test_an_operator_that_is_not_emulated_says_so() -> None:
    with pytest.raises(RuntimeError, match="operator Atan2 is not emulated"):
        torch.atan2(torch.ones(4, device="npu"), torch.ones(4, device="npu"))


def test_there_are_as_many_devices_as_asked_for() -> None:
    assert torch.npu.device_count() == 4
    assert torch.ones(2, device="npu:1").add(1).cpu().tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="device"):
        torch.npu.set_device(4)


def test_a_fault_shows_at_the_next_synchronization_and_stays() -> None:
    table, out_of_range = torch.ones(4, 4, device="npu"), torch.tensor([9], device="npu")
    table.index_select(0, out_of_range)
    with pytest.raises(RuntimeError, match="index out of range"):
        torch.npu.synchronize()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="index out of range"):
            torch.npu.synchronize()
    assert torch.ones(2, device="npu:1").add(1).cpu().tolist() == [2, 2]


@pytest.mark.parametrize(
    ("device", "slots", "reason"), [(2, [3, 3], "a slot occurs twice"), (3, [3, 900], "outside")]
)
def test_wrong_slots_are_a_fault(device: int, slots: list[int], reason: str) -> None:
    torch.npu.set_device(device)
    caches = [torch.zeros(3, 128, 2, 128, dtype=torch.bfloat16, device="npu") for _ in "kv"]
    new = torch.ones(2, 2, 128, dtype=torch.bfloat16, device="npu")
    slot_mapping = torch.tensor(slots, dtype=torch.int32, device="npu")
    torch_npu.npu_scatter_pa_kv_cache(new, new, *caches, slot_mapping, cache_mode="Norm")
    with pytest.raises(RuntimeError, match=f"slot_mapping: .*{reason}"):
        torch.npu.synchronize()
