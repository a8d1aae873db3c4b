"""The index of full blocks by what they hold, so that equal prefixes are computed once.

Owns keys; block life is the pool's. Must not hold references: a cached block is free to be taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from scheduler_svc.block_pool import BlockPool
from stages.columns import Int32Array

_KEY_BYTES = 32


def extend_block_keys(
    keys: list[bytes], token_ids: Int32Array, block_size: int, cache_salt: str
) -> None:
    """Append the keys of all full blocks of `token_ids` [n] that `keys` does not yet have.

    A key is the BLAKE2b hash of the parent's key and the block's tokens; the chain begins with
    the hash of the salt. So it stands for the whole prefix, and without the salt nobody can find
    or forge the block of another user.
    """
    parent = keys[-1] if keys else blake2b(cache_salt.encode(), digest_size=_KEY_BYTES).digest()
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        block = token_ids[start : start + block_size].astype("<i4", copy=False)
        parent = blake2b(parent + block.tobytes(), digest_size=_KEY_BYTES).digest()
        keys.append(parent)


class PrefixCache:
    """Finds the block that holds a key.

    Invariant: an entry counts if and only if the pool still says `is_cached` of its block. Taking
    a block thus forgets its content with no look at this index; the stale entry goes when the
    block gets its next key, so there are never more entries than blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_of: dict[bytes, int] = {}
        self._key_of = [b""] * pool.num_blocks

    def find(self, keys: Sequence[bytes]) -> Int32Array:
        """The blocks of the longest cached prefix of `keys`: int32 [n], n <= len(keys)."""
        block_ids = []
        for key in keys:
            block_id = self._find_one(key)
            if not block_id:
                break
            block_ids.append(block_id)
        return np.array(block_ids, dtype=np.int32)

    def publish(self, keys: Sequence[bytes], block_ids: Int32Array) -> None:
        """Make blocks findable whose content is computed; of two equal ones the first stays."""
        for key, block_id in zip(keys, block_ids.tolist(), strict=True):
            if self._find_one(key):
                continue
            stale_key = self._key_of[block_id]
            if self._block_of.get(stale_key) == block_id:
                del self._block_of[stale_key]
            self._block_of[key] = block_id
            self._key_of[block_id] = key
            self._pool.is_cached[block_id] = True

    def _find_one(self, key: bytes) -> int:
        block_id = self._block_of.get(key, 0)
        return block_id if self._pool.is_cached[block_id] else 0
