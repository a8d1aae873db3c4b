"""Memory of packed weights."""

from __future__ import annotations

import pytest
import torch

from executor_svc.ops.native.packing import HUGE_PAGE, allocate_pages


@pytest.mark.parametrize("num_bytes", [2, HUGE_PAGE - 2, HUGE_PAGE, 3 * HUGE_PAGE // 2 + 2])
def test_allocated_pages_are_zeros_and_whole_huge_pages_from_the_size_of_one_on(
    num_bytes: int,
) -> None:
    first, second = (allocate_pages(num_bytes // 2, torch.bfloat16) for _ in range(2))
    first.fill_(1)
    for memory in (first, second):
        assert memory.shape == (num_bytes // 2,)
        assert num_bytes < HUGE_PAGE or memory.data_ptr() % HUGE_PAGE == 0
    assert not second.any()
