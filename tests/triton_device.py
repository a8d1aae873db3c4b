"""Where tests run Triton kernels: on the GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch


def triton_device() -> str:
    """Choose torch's device for kernels; skips the calling module where they cannot run."""
    if find_spec("triton") is None:
        pytest.skip("no triton: pip install headrace[cuda]", allow_module_level=True)
    if torch.cuda.is_available():
        return "cuda"
    if not import_module("triton").knobs.runtime.interpret:
        pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)
    return "cpu"
