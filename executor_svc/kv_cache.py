"""Owns the memory of the paged KV cache: how many blocks, and the tensors themselves.

Which request owns which block is the scheduler's business, never decided here.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

GIB = 1 << 30
# Without a wish, the cache stays modest: a CPU's memory is shared with everything else.
DEFAULT_CPU_KV_BYTES = 4 * GIB
DEFAULT_UTILIZATION = 0.9
# The null block and one for a sequence.
MIN_BLOCKS = 2


class KvCacheSizeError(Exception):
    """The requested cache does not fit; the text names the option to change."""


@dataclass(frozen=True)
class KvSpec:
    """Shape of one token's keys and values in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_bytes(self, block_size: int) -> int:
        """Bytes that one block of `block_size` tokens takes over all layers, K and V."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim * block_size
        return values * self.dtype.itemsize


class LayerKv(NamedTuple):
    """One layer's cache: both [num_blocks, num_kv_heads, block_size, head_dim]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class KvCache:
    """All layers' blocks. Block 0 is the null block: written by padding, never read as data.

    Slots that no token has written yet hold anything, NaN of a former request included: a
    kernel must keep them out of its sums, not only give them weight zero (0 * NaN is NaN).
    """

    spec: KvSpec
    block_size: int
    num_blocks: int
    layers: tuple[LayerKv, ...]


@dataclass(frozen=True)
class KvCacheLimits:
    """What the configuration says; of the three wishes the first that is set decides."""

    block_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None


class KvCacheSize(NamedTuple):
    """`num_blocks` counts the null block; `num_tokens` does not."""

    num_blocks: int
    num_bytes: int
    num_tokens: int


class HostMemory(NamedTuple):
    """Bytes that this process may use at most, and how many of them are free now."""

    total: int
    available: int


def size_kv_cache(spec: KvSpec, limits: KvCacheLimits, memory: HostMemory) -> KvCacheSize:
    """Decide the number of blocks, from numbers alone.

    An explicit `num_blocks` or `kv_cache_memory_bytes` is taken as it is; a share of the memory
    is also capped at what `max_num_seqs` sequences of `max_model_len` tokens can fill.

    Raises:
        KvCacheSizeError: fewer than two blocks, or more bytes than the machine has.
    """
    block_bytes = spec.block_bytes(limits.block_size)
    num_blocks, option = _wished_blocks(limits, block_bytes, memory)
    if num_blocks < MIN_BLOCKS:
        raise KvCacheSizeError(
            f"the KV cache would have {num_blocks} blocks of {block_bytes} bytes, it needs at "
            f"least {MIN_BLOCKS}; raise {option}"
        )
    num_bytes = num_blocks * block_bytes
    if num_bytes > memory.total:
        raise KvCacheSizeError(
            f"the KV cache would take {num_bytes} bytes of {memory.total}; lower {option}"
        )
    return KvCacheSize(num_blocks, num_bytes, (num_blocks - 1) * limits.block_size)


def _wished_blocks(limits: KvCacheLimits, block_bytes: int, memory: HostMemory) -> tuple[int, str]:
    """Blocks, and the command line option that decided them."""
    if limits.num_blocks is not None:
        return limits.num_blocks, "--num-blocks"
    if limits.kv_cache_memory_bytes is not None:
        return limits.kv_cache_memory_bytes // block_bytes, "--kv-cache-memory"
    blocks_per_seq = -(-limits.max_model_len // limits.block_size)
    useful = 1 + limits.max_num_seqs * blocks_per_seq
    if limits.gpu_memory_utilization is not None:
        num_bytes = int(memory.available * limits.gpu_memory_utilization)
        return min(useful, num_bytes // block_bytes), "--gpu-memory-utilization"
    num_bytes = min(DEFAULT_CPU_KV_BYTES, int(memory.available * DEFAULT_UTILIZATION))
    return min(useful, num_bytes // block_bytes), "--kv-cache-memory"


def allocate_kv_cache(
    spec: KvSpec, num_blocks: int, block_size: int, device: str = "cpu"
) -> KvCache:
    """Allocate every layer's blocks; on the CPU a page costs nothing until it is written."""
    shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
    num_bytes = num_blocks * spec.block_bytes(block_size)
    if device == "cpu":
        storage = _map_pages(num_bytes, spec.dtype)
    else:
        storage = torch.zeros(num_bytes // spec.dtype.itemsize, dtype=spec.dtype, device=device)
    layers = tuple(LayerKv(*pair.unbind(0)) for pair in storage.view(shape).unbind(0))
    return KvCache(spec, block_size, num_blocks, layers)


def _map_pages(num_bytes: int, dtype: torch.dtype) -> Tensor:
    """Private anonymous memory: lazily backed, in huge pages where the kernel gives them.

    `torch.empty` would fault nothing in either, but hides the mapping that madvise needs.
    """
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without transparent huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def measure_host_memory(root: Path = Path("/")) -> HostMemory:
    """The tighter of the machine's memory and every enclosing control group's.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    facts = _key_values(root / "proc/meminfo")
    # /proc/meminfo counts in KiB.
    total, available = facts["MemTotal:"] * 1024, facts["MemAvailable:"] * 1024
    for group_total, group_used in _control_groups(root):
        total = min(total, group_total)
        available = min(available, max(0, group_total - group_used))
    return HostMemory(total, available)


class _GroupFiles(NamedTuple):
    """Where one version of control groups keeps what this module reads."""

    mount: str
    limit: str
    used: str
    cache_key: str


_V1 = _GroupFiles(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _GroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) bytes of this process's memory groups and their ancestors."""
    found: list[tuple[int, int]] = []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _group_limits(root, _V2, path)
        elif "memory" in controllers.split(","):
            found += _group_limits(root, _V1, path)
    return found


def _group_limits(root: Path, files: _GroupFiles, path: str) -> list[tuple[int, int]]:
    """The limits from the group at `path` up to the mount; unlimited groups are left out."""
    found: list[tuple[int, int]] = []
    group = root / files.mount / path.lstrip("/")
    while group.is_relative_to(root / files.mount):
        limit, used = _read_text(group / files.limit), _read_text(group / files.used)
        if limit.isdigit() and used.isdigit():
            # The kernel drops inactive page cache before it refuses memory.
            cache = _key_values(group / "memory.stat").get(files.cache_key, 0)
            found.append((int(limit), int(used) - cache))
        group = group.parent
    return found


def _read_text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _key_values(path: Path) -> dict[str, int]:
    """Lines of `name number [unit]`."""
    lines = (line.split() for line in _read_text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}
