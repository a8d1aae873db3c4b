"""gelu as a model means it: torch_npu's own is the tanh approximation whatever is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExactGelu:
    """Puts `npu_gelu`, which obeys `approximate`, in the place of an NPU's gelu while it lives.

    For every caller, since most are models of transformers. torch_npu has a switch for it too
    (`use_compatible_impl`), which changes other operators and the host's allocator as well.
    """

    def __init__(self) -> None:
        library: Any = torch.library
        self._registered = library.Library("aten", "IMPL")
        self._registered.impl("gelu", _gelu, "PrivateUse1", allow_override=True)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate=approximate)
    return out
