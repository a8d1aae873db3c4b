"""Columns of numbers as little-endian bytes, the form in which they cross a process border."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]


def i32(column: bytes) -> Int32Array:
    """View int32 bytes as a read-only array."""
    return np.frombuffer(column, dtype="<i4")


def f32(column: bytes) -> FloatArray:
    """View float32 bytes as a read-only array."""
    return np.frombuffer(column, dtype="<f4")


def i8(column: bytes) -> NDArray[np.int8]:
    """View int8 bytes as a read-only array."""
    return np.frombuffer(column, dtype="i1")


def u64(column: bytes) -> NDArray[np.uint64]:
    """View uint64 bytes as a read-only array."""
    return np.frombuffer(column, dtype="<u8")


def i32_bytes(values: Iterable[int] | NDArray[np.integer]) -> bytes:
    """Pack integers as int32 bytes."""
    return _pack(values, "<i4")


def f32_bytes(values: Iterable[float] | NDArray[np.floating]) -> bytes:
    """Pack numbers as float32 bytes."""
    return _pack(values, "<f4")


def i8_bytes(values: Iterable[int] | NDArray[np.integer]) -> bytes:
    """Pack small integers as int8 bytes."""
    return _pack(values, "i1")


def u64_bytes(values: Iterable[int] | NDArray[np.integer]) -> bytes:
    """Pack integers as uint64 bytes."""
    return _pack(values, "<u8")


def _pack(values: Iterable[float] | NDArray[np.generic], dtype: str) -> bytes:
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=dtype)
    return array.astype(dtype, copy=False).tobytes()
