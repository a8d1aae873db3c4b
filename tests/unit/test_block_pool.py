"""Block pool: counts, order of taking, sharing."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler_svc.block_pool import BlockPool, FreeQueue


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, dtype=np.int32)


def test_never_gives_out_the_null_block() -> None:
    pool = BlockPool(8)
    assert sorted(pool.take(7).tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert (pool.num_free, pool.num_used) == (0, 7)


def test_refuses_to_give_more_than_it_has() -> None:
    pool = BlockPool(4)
    with pytest.raises(AssertionError, match="more blocks than there are"):
        pool.take(4)


def test_takes_blank_blocks_before_cached_ones_and_the_first_freed_first() -> None:
    pool = BlockPool(6)
    taken = pool.take(5)
    pool.is_cached[ids(2, 4)] = True
    pool.release(ids(4, 5, 2, 1, 3))
    assert len(taken) == 5
    assert pool.take(3).tolist() == [5, 1, 3]
    assert pool.take(2).tolist() == [4, 2]


def test_a_taken_block_forgets_its_content() -> None:
    pool = BlockPool(2)
    pool.is_cached[pool.take(1)] = True
    pool.release(ids(1))
    assert pool.is_cached[1]
    pool.take(1)
    assert not pool.is_cached[1]


def test_a_shared_block_is_free_when_its_last_holder_has_left() -> None:
    pool = BlockPool(3)
    pool.is_cached[pool.take(2)] = True
    pool.share(ids(1, 2))
    pool.release(ids(1, 2))
    assert pool.num_used == 2
    pool.release(ids(2, 1))
    assert pool.num_used == 0


def test_sharing_revives_a_free_cached_block() -> None:
    pool = BlockPool(3)
    pool.is_cached[pool.take(2)] = True
    pool.release(ids(1, 2))
    assert pool.count_free(ids(1, 2)) == 2
    pool.share(ids(1))
    assert pool.count_free(ids(1, 2)) == 1
    assert pool.take(1).tolist() == [2]


def test_a_blank_block_cannot_be_shared() -> None:
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="only cached blocks"):
        pool.share(pool.take(1))


def test_a_double_release_is_a_programmer_error() -> None:
    pool = BlockPool(3)
    block_ids = pool.take(1)
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(block_ids)


def test_release_all_keeps_what_is_cached() -> None:
    pool = BlockPool(4)
    pool.take(3)
    pool.is_cached[2] = True
    pool.share(ids(2))
    pool.release_all()
    assert pool.num_free == 3
    assert not pool.num_refs.any()
    assert pool.is_cached.tolist() == [False, False, True, False]


def test_queue_survives_its_compaction() -> None:
    queue = FreeQueue(4)
    queue.push(ids(0, 1, 2, 3))
    queue.remove(ids(1))
    for _ in range(20):
        queue.push(queue.pop(1))
    assert queue.pop(3).tolist() == [3, 0, 2]
    assert len(queue) == 0
