"""Reads tensors from a folder's safetensors files: memory-mapped, checked, converted.

Never unpickles: a `.bin` checkpoint is refused with the way to convert it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor_svc.memory_advice import advise_unneeded, trim_heap
from executor_svc.model_config import DTYPES, ModelConfig, ModelLoadError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in DTYPES}
)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")


def resolve_dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    """The dtype that `--dtype` asks for; `auto` is the checkpoint's own."""
    name = config.dtype if dtype == "auto" else dtype
    if name not in TORCH_DTYPES:
        raise ModelLoadError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    return TORCH_DTYPES[name]


class _OpenFile(Protocol):
    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


class Checkpoint:
    """The tensors of one model folder; remembers which of them were taken.

    Use it as a context manager: the files are mapped from entry to exit, and a tensor that
    needed no conversion keeps its own mapping alive.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = folder
        self._dtype = dtype
        self._device = device
        self._files = ExitStack()
        self._owner: dict[str, _OpenFile] = {}
        self._taken: set[str] = set()
        self._mapped: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        with ExitStack() as files:
            for path in find_weight_files(self.folder):
                file = files.enter_context(_open(path))
                self._owner.update(dict.fromkeys(file.keys(), file))
            self._files = files.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._owner.clear()
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` in the model's dtype, on its device.

        Raises:
            ModelLoadError: there is none, or it is not of that shape.
        """
        return self.convert(self.stored(name, *shape))

    def convert(self, tensor: Tensor) -> Tensor:
        """The tensor in the model's dtype, on its device."""
        return tensor.to(self._device, self._dtype)

    def stored(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` as the file has it; without a `shape`, whatever shape that is.

        Raises:
            ModelLoadError: there is none, or it is not of that shape.
        """
        if name not in self._owner:
            raise ModelLoadError(
                f"{self.folder}: tensor '{name}' is missing; the download is incomplete or "
                "config.json belongs to another model"
            )
        self._taken.add(name)
        tensor = self._owner[name].get_tensor(name)
        if shape and tensor.shape != shape:
            raise ModelLoadError(
                f"{self.folder}: tensor '{name}' has shape {[*tensor.shape]} where config.json "
                f"implies {[*shape]}; both must come from the same release of the model"
            )
        self._mapped.append((tensor.data_ptr(), tensor.nbytes))
        return tensor

    def release_memory(self) -> None:
        """Give back what was read and no longer needed: the files' pages can be read again.

        Without it the whole checkpoint would be resident beside its packed form.
        """
        for address, num_bytes in self._mapped:
            advise_unneeded(address, num_bytes)
        self._mapped.clear()
        trim_heap()

    def skip(self, is_skipped: Callable[[str], bool]) -> None:
        """Count tensors as taken: what they hold came from elsewhere."""
        self._taken.update(name for name in self._owner if is_skipped(name))

    def check_all_taken(self, is_ignored: Callable[[str], bool]) -> None:
        """Raise if the files hold a tensor that the model has no place for."""
        left = sorted(name for name in self._owner.keys() - self._taken if not is_ignored(name))
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ModelLoadError(
                f"{self.folder}: unexpected tensors {shown}; config.json names an architecture "
                "without them, use the one that the weights were saved with"
            )


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, sharded or single.

    Raises:
        ModelLoadError: there are none, or the index names files that do not exist.
    """
    index = folder / INDEX_FILE
    if index.exists():
        return _shards(index)
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        raise ModelLoadError(
            f"{folder} holds pickled weights, which can run code when loaded; convert them once "
            "with transformers: from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelLoadError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; download it again")


def _shards(index: Path) -> list[Path]:
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
        # A name is used as a path: keep it inside the folder.
        shards = sorted(index.parent / Path(name).name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} has no valid 'weight_map'; download it again") from error
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise ModelLoadError(f"{index} names missing files {', '.join(missing)}; download them")
    return shards


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ModelLoadError(f"{path} is damaged ({error}); download it again") from error
