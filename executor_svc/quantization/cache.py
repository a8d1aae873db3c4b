"""Packed quantized weights on disk, so that a model is quantized and packed only once.

One safetensors file a model, scheme and build in `~/.cache/headrace`. It is believed only if it
names the very files (name, size, time of change) that the model folder holds, and each tensor only
if its CRC-32 is right; what is damaged is made again, with one warning. A cache that cannot be
written costs a warning too, never the start.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from executor_svc.ops.interface import LinearWeight, QuantizationGrid
from executor_svc.ops.native.packing import allocate_pages

# Count up whenever a kernel reads another layout, or quantizing gives other codes.
LAYOUT_VERSION = 3
# Quantizing less than this takes a moment, and would litter the folder with small models.
MIN_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 2**26
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "I32": torch.int32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PARTS = ("packed", "bias", "scales", "offsets", "order")

logger = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/headrace`, or `~/.cache/headrace`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "headrace"


class _DamagedError(Exception):
    """What the file says cannot be what was written."""


class PackedCache:
    """The packed projections of one model, by name; a context manager that keeps the file open.

    What was found is remembered beside what is new, so that a file is always written whole.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key
        self._file: BufferedReader | None = None
        self._header: dict[str, Any] = {}
        self._grids: dict[str, list[int]] = {}
        self._checksums: dict[str, int] = {}
        self._data_start = 0
        self._weights: dict[str, LinearWeight] = {}
        self._has_new = False
        self._is_damaged = False

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("rb")
            self._read_header(self._file)
        except FileNotFoundError:
            pass
        except (_DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._grids = {}
            self._warn(error)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is None and self._has_new:
            self._write()

    def find(self, name: str) -> LinearWeight | None:
        """The projection that was kept under `name`, in memory of its own."""
        if name not in self._grids:
            return None
        out_size, in_size, code, group_size = self._grids[name]
        try:
            parts = {part: self._read(f"{name}.{part}") for part in PARTS}
        except (_DamagedError, OSError) as error:
            self._warn(error)
            return None
        assert parts["packed"] is not None and parts["scales"] is not None
        grid = QuantizationGrid(code, parts["scales"], parts["offsets"], parts["order"], group_size)
        stand_in = torch.empty(()).expand(out_size, in_size)
        self._weights[name] = LinearWeight(stand_in, parts["bias"], parts["packed"], grid)
        return self._weights[name]

    def keep(self, name: str, weight: LinearWeight) -> None:
        """Remember a new projection, to be written at the end."""
        if weight.grid is not None:
            self._weights[name] = weight
            self._has_new = True

    def _warn(self, reason: Exception) -> None:
        if not self._is_damaged:
            logger.warning(
                "Damaged weights are made again and cached anew: %s, %s", self._path, reason
            )
        self._is_damaged = True

    def _read_header(self, file: BufferedReader) -> None:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise _DamagedError("its header has no end")
        self._header = json.loads(file.read(size))
        metadata = self._header.pop("__metadata__")
        if metadata["key"] != self._key:
            logger.info("The cached weights %s were made of other files", self._path)
            return
        self._checksums = json.loads(metadata["checksums"])
        if metadata["header"] != _header_checksum(self._header, metadata):
            raise _DamagedError("the checksum of its header is wrong")
        self._data_start = 8 + size
        end = max(tensor["data_offsets"][1] for tensor in self._header.values())
        if self._data_start + end != os.fstat(file.fileno()).st_size:
            raise _DamagedError("it has been cut off")
        self._grids = json.loads(metadata["grids"])

    def _read(self, name: str) -> Tensor | None:
        described = self._header.get(name)
        if described is None or self._file is None:
            return None
        dtype = DTYPES[described["dtype"]]
        begin, end = described["data_offsets"]
        tensor = allocate_pages((end - begin) // dtype.itemsize, dtype)
        self._file.seek(self._data_start + begin)
        self._file.readinto(tensor.numpy().data.cast("B"))
        if _checksum(tensor) != self._checksums[name]:
            raise _DamagedError(f"the checksum of {name} is wrong")
        return tensor.view(described["shape"])

    def _write(self) -> None:
        if sum(weight.num_bytes for weight in self._weights.values()) < MIN_BYTES:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                try:
                    _write_file(file, self._weights, self._key)
                    os.replace(file.name, self._path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            logger.warning(
                "The quantized weights are not cached (%s), so the next start quantizes again; "
                "make %s writable or set XDG_CACHE_HOME",
                error,
                self._path.parent,
            )
            return
        logger.info("Cached the quantized weights in %s", self._path)


def cache_key(folder: Path, scheme: str, build: str, dtype: torch.dtype) -> str:
    """What must be equal for a cache to be believed."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([LAYOUT_VERSION, scheme, build, str(dtype), stats])


def cache_path(cache_folder: Path, folder: Path, scheme: str, build: str) -> Path:
    """One file for each model folder, scheme and build: a new cache replaces its old one."""
    words = "\0".join((str(folder.resolve()), scheme, build))
    digest = blake2b(words.encode(), digest_size=8).hexdigest()
    return cache_folder / f"{folder.resolve().name}-{scheme}-{digest}.safetensors"


def _write_file(file: IO[bytes], weights: dict[str, LinearWeight], key: str) -> None:
    """The safetensors format by hand: its library would hold a second copy of all tensors."""
    tensors = dict(_named_tensors(weights))
    header: dict[str, Any] = {}
    metadata = {
        "key": key,
        "grids": json.dumps(_describe_grids(weights)),
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()}),
    }
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    metadata["header"] = _header_checksum(header, metadata)
    encoded = json.dumps(header | {"__metadata__": metadata}).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        file.write(tensor.numpy().data.cast("B"))


def _checksum(tensor: Tensor) -> int:
    """At 4 GB/s a core, faster than most disks read."""
    return zlib.crc32(tensor.numpy().data.cast("B"))


def _header_checksum(header: dict[str, Any], metadata: dict[str, str]) -> str:
    words = [header, metadata["grids"], metadata["checksums"]]
    return f"{zlib.crc32(json.dumps(words).encode()):08x}"


def _named_tensors(weights: dict[str, LinearWeight]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        grid = weight.grid
        assert grid is not None
        parts = (weight.packed, weight.bias, grid.scales, grid.offsets, grid.order)
        for part, tensor in zip(PARTS, parts, strict=True):
            if tensor is not None:
                yield f"{name}.{part}", tensor


def _describe_grids(weights: dict[str, LinearWeight]) -> dict[str, list[int]]:
    return {
        name: [*weight.weight.shape, weight.grid.code, weight.grid.group_size]
        for name, weight in weights.items()
        if weight.grid is not None
    }
