"""Sizing of the KV cache from numbers, measuring memory from a fake tree, the tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor_svc.kv_cache import (
    DEFAULT_CPU_KV_BYTES,
    GIB,
    HostMemory,
    KvCacheLimits,
    KvCacheSizeError,
    KvSpec,
    allocate_kv_cache,
    measure_host_memory,
    size_kv_cache,
)

SPEC = KvSpec(num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
BLOCK_BYTES = 2 * 4 * 2 * 64 * 16 * 2
# Wide enough that no default below is capped by it.
WIDE = KvCacheLimits(block_size=16, max_model_len=1 << 20, max_num_seqs=256)
MEMORY = HostMemory(total=32 * GIB, available=16 * GIB)


def test_block_bytes_count_both_parts_of_every_layer() -> None:
    assert SPEC.block_bytes(16) == BLOCK_BYTES


def test_an_explicit_number_of_blocks_wins() -> None:
    limits = replace(WIDE, num_blocks=77, kv_cache_memory_bytes=GIB, gpu_memory_utilization=0.5)
    assert size_kv_cache(SPEC, limits, MEMORY) == (77, 77 * BLOCK_BYTES, 76 * 16)


def test_explicit_bytes_win_over_a_share() -> None:
    limits = replace(WIDE, kv_cache_memory_bytes=GIB, gpu_memory_utilization=0.5)
    assert size_kv_cache(SPEC, limits, MEMORY).num_blocks == GIB // BLOCK_BYTES


def test_a_share_is_of_the_available_memory() -> None:
    limits = replace(WIDE, gpu_memory_utilization=0.5)
    assert size_kv_cache(SPEC, limits, MEMORY).num_blocks == 8 * GIB // BLOCK_BYTES


def test_the_default_is_modest() -> None:
    assert size_kv_cache(SPEC, WIDE, MEMORY).num_bytes == DEFAULT_CPU_KV_BYTES
    scarce = HostMemory(total=32 * GIB, available=GIB)
    assert size_kv_cache(SPEC, WIDE, scarce).num_bytes <= 0.9 * GIB


@pytest.mark.parametrize("utilization", [None, 0.9])
def test_a_share_is_never_more_than_all_sequences_can_fill(utilization: float | None) -> None:
    limits = KvCacheLimits(
        block_size=16, max_model_len=100, max_num_seqs=3, gpu_memory_utilization=utilization
    )
    assert size_kv_cache(SPEC, limits, MEMORY).num_blocks == 1 + 3 * 7


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"num_blocks": 1}, "--num-blocks"),
        ({"kv_cache_memory_bytes": 2 * BLOCK_BYTES - 1}, "--kv-cache-memory"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
    ],
)
def test_too_small_a_cache_names_the_option_to_raise(change: dict[str, int], option: str) -> None:
    with pytest.raises(KvCacheSizeError, match=f"raise {option}"):
        size_kv_cache(SPEC, replace(WIDE, **change), MEMORY)


def test_more_than_the_machine_has_names_the_option_to_lower() -> None:
    with pytest.raises(KvCacheSizeError, match="lower --kv-cache-memory"):
        size_kv_cache(SPEC, replace(WIDE, kv_cache_memory_bytes=33 * GIB), MEMORY)


@given(
    available=st.integers(GIB // 4, 1 << 40),
    utilization=st.none() | st.floats(0.01, 1.0),
    block_size=st.sampled_from([1, 16, 128]),
    max_num_seqs=st.integers(1, 512),
)
def test_a_share_always_fits(
    available: int, utilization: float | None, block_size: int, max_num_seqs: int
) -> None:
    limits = KvCacheLimits(block_size, 8192, max_num_seqs, gpu_memory_utilization=utilization)
    size = size_kv_cache(SPEC, limits, HostMemory(available, available))
    assert size.num_blocks >= 2
    assert size.num_bytes == size.num_blocks * SPEC.block_bytes(block_size) <= available
    assert size.num_tokens == (size.num_blocks - 1) * block_size


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:   600 kB\nHugePages_Total: 0\n"


def test_memory_without_control_groups(tmp_path: Path) -> None:
    _write(tmp_path, {"proc/meminfo": MEMINFO})
    assert measure_host_memory(tmp_path) == (1000 * 1024, 600 * 1024)


def test_memory_under_cgroup_v2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/kube/pod"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/kube/pod\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "5\n",
        "sys/fs/cgroup/kube/memory.max": "500000\n",
        "sys/fs/cgroup/kube/memory.current": "450000\n",
        "sys/fs/cgroup/kube/memory.stat": "anon 7\ninactive_file 100000\n",
    }
    _write(tmp_path, files)
    assert measure_host_memory(tmp_path) == (500_000, 150_000)


def test_memory_under_cgroup_v1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/abc"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
        f"{group}/memory.limit_in_bytes": "400000\n",
        f"{group}/memory.usage_in_bytes": "100000\n",
        f"{group}/memory.stat": "total_inactive_file 1000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
    }
    _write(tmp_path, files)
    assert measure_host_memory(tmp_path) == (400_000, 301_000)


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.current": "2000\n",
    }
    _write(tmp_path, files)
    assert measure_host_memory(tmp_path) == (1000, 0)


def test_this_machine_can_be_measured() -> None:
    memory = measure_host_memory()
    assert 0 < memory.available <= memory.total


def test_layers_do_not_overlap_and_start_at_zero() -> None:
    spec = KvSpec(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float16)
    cache = allocate_kv_cache(spec, num_blocks=5, block_size=4)
    parts = [part for layer in cache.layers for part in layer]
    assert len(parts) == 6
    for number, part in enumerate(parts):
        assert part.shape == (5, 2, 4, 8) and part.is_contiguous()
        assert not part.any()
        part.fill_(number + 1)
    assert [{*part.flatten().tolist()} for part in parts] == [{n + 1.0} for n in range(6)]


def test_memory_is_taken_only_when_it_is_written() -> None:
    before = _resident_bytes()
    spec = KvSpec(num_layers=1, num_kv_heads=8, head_dim=128, dtype=torch.float32)
    cache = allocate_kv_cache(spec, num_blocks=2 * GIB // spec.block_bytes(16), block_size=16)
    assert _resident_bytes() - before < GIB // 4
    cache.layers[0].key[7] = 1.0
    assert _resident_bytes() - before < GIB // 4


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
