"""Makes torch say that this processor has AVX512, but no BF16, VNNI or AMX, as most have not.

Python imports a module of this name by itself wherever its folder is on PYTHONPATH, in child
processes too. torch is not imported for it: the answer is changed once somebody does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

MODULE = "torch.cpu"
HIDDEN = (
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_fp16",
)


class CappedLoader(Loader):
    """Loads the module as its own loader would, then wraps the one function that all others ask."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        capabilities = module.get_capabilities

        def capped() -> Mapping[str, Any]:
            return MappingProxyType(dict(capabilities()) | dict.fromkeys(HIDDEN, False))

        module.get_capabilities = capped  # type: ignore[attr-defined]


class CappedFinder(MetaPathFinder):
    """Finds `torch.cpu` once, as the others do, with a `CappedLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = CappedLoader(spec.loader)
        return spec


sys.meta_path.insert(0, CappedFinder())
