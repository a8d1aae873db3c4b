"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from shutil import which

import pytest
from hypothesis import settings

from stages.torch_backends import hide_torch_npu

# The wheel needs a card, or the emulated one of the processes that tests start.
hide_torch_npu()

# How long an example takes says more about the neighbours of this machine than about the code.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")

# Where there is no GPU, Triton's kernels are interpreted. It decides at its import, which other
# libraries may cause before the tests of the kernels are read.
if which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch computes on one thread and keeps no gradients."""
    import torch  # takes a second, which most tests need not pay

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
