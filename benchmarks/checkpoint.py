"""A model folder's weights without torch: names, shapes and arrays of its safetensors files.

Runs in the environment of any peer, so it needs numpy only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
HEADER_LENGTH_BYTES = 8
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class CheckpointError(Exception):
    """The folder holds something that cannot be read here; the text says what."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not yet read: `dtype` is F32, F16 or BF16, `offset` is in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self) -> Floats:
        """Give the values in float32, exact for all three types."""
        if self.dtype not in _STORED:
            raise CheckpointError(
                f"{self.file.name}: {self.name} has dtype {self.dtype}; "
                f"known are {', '.join(_STORED)}: use a checkpoint that is not quantized"
            )
        stored = np.memmap(self.file, _STORED[self.dtype], "r", self.offset, (self.size,))
        if self.dtype == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return stored.astype(np.float32).reshape(self.shape)


def load_config(folder: Path) -> dict[str, Any]:
    """Read config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors(folder: Path) -> Iterator[Tensor]:
    """Yield every tensor of the folder's safetensors files, in the order of files and headers."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors in this folder")
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = HEADER_LENGTH_BYTES + length + entry["data_offsets"][0]
            yield Tensor(name, file, entry["dtype"], tuple(entry["shape"]), offset)
