"""Settings of all tests."""

from __future__ import annotations

import os
from shutil import which

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
