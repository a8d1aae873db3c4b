"""Prefix cache: keys stand for whole prefixes; only what is cached is found."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from scheduler_svc.block_pool import BlockPool
from scheduler_svc.prefix_cache import PrefixCache, extend_block_keys


def keys_of(token_ids: list[int], cache_salt: str = "", block_size: int = 2) -> list[bytes]:
    keys: list[bytes] = []
    extend_block_keys(keys, np.array(token_ids, dtype=np.int32), block_size, cache_salt)
    return keys


def filled_cache(num_blocks: int, keys: list[bytes]) -> tuple[BlockPool, PrefixCache, list[int]]:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    block_ids = pool.take(len(keys))
    cache.publish(keys, block_ids)
    return pool, cache, block_ids.tolist()


def test_a_key_chains_salt_parent_and_tokens() -> None:
    root = blake2b(b"salt", digest_size=32).digest()
    tokens = np.array([7, 8], dtype="<i4").tobytes()
    assert keys_of([7, 8, 9], "salt") == [blake2b(root + tokens, digest_size=32).digest()]


def test_only_full_blocks_have_keys() -> None:
    assert [len(keys_of([1] * n)) for n in range(6)] == [0, 0, 1, 1, 2, 2]


def test_keys_grow_in_place_as_if_made_at_once() -> None:
    keys = keys_of([1, 2, 3])
    extend_block_keys(keys, np.array([1, 2, 3, 4, 5, 6], dtype=np.int32), 2, "")
    assert keys == keys_of([1, 2, 3, 4, 5, 6])


def test_equal_blocks_behind_different_prefixes_differ() -> None:
    assert keys_of([1, 2, 5, 5])[1] != keys_of([2, 1, 5, 5])[1]


def test_salts_share_nothing() -> None:
    assert not set(keys_of([1, 2, 3, 4], "a")) & set(keys_of([1, 2, 3, 4], "b"))


def test_finds_the_longest_cached_prefix() -> None:
    keys = keys_of([1, 2, 3, 4, 5, 6])
    _, cache, block_ids = filled_cache(8, keys[:2])
    assert cache.find(keys).tolist() == block_ids
    assert cache.find(keys[:1]).tolist() == block_ids[:1]
    assert cache.find(keys_of([9, 9, 3, 4])).tolist() == []
    assert cache.find([]).tolist() == []


def test_a_freed_block_is_found_until_it_is_taken() -> None:
    keys = keys_of([1, 2, 3, 4])
    pool, cache, block_ids = filled_cache(3, keys)
    pool.release(np.array(block_ids[::-1], dtype=np.int32))
    assert cache.find(keys).tolist() == block_ids
    pool.take(1)  # takes the tail of the prefix
    assert cache.find(keys).tolist() == block_ids[:1]


def test_of_two_equal_blocks_the_first_stays() -> None:
    keys = keys_of([1, 2])
    pool, cache, block_ids = filled_cache(4, keys)
    second = pool.take(1)
    cache.publish(keys, second)
    assert cache.find(keys).tolist() == block_ids
    assert not pool.is_cached[second[0]]


def test_a_block_with_new_content_is_not_found_by_its_old_key() -> None:
    old_keys, new_keys = keys_of([1, 2]), keys_of([3, 4])
    pool, cache, block_ids = filled_cache(2, old_keys)
    pool.release(np.array(block_ids, dtype=np.int32))
    cache.publish(new_keys, pool.take(1))
    assert cache.find(old_keys).tolist() == []
    assert cache.find(new_keys).tolist() == block_ids


def test_a_stale_key_may_move_to_another_block() -> None:
    keys, other_keys = keys_of([1, 2]), keys_of([3, 4])
    pool, cache, block_ids = filled_cache(3, keys)
    pool.release(np.array(block_ids, dtype=np.int32))
    second, first = pool.take(2).tolist()
    cache.publish(keys, np.array([second], dtype=np.int32))
    cache.publish(other_keys, np.array([first], dtype=np.int32))
    assert cache.find(keys).tolist() == [second]
    assert cache.find(other_keys).tolist() == [first]


def test_holds_at_most_one_entry_a_block() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(pool)
    for token_id in range(50):
        block_ids = pool.take(1)
        cache.publish(keys_of([token_id, token_id]), block_ids)
        pool.release(block_ids)
    assert len(cache._block_of) <= 2
