"""Keeps a torch_npu wheel out of the way of processes that compute on another device.

Imported before torch; knows neither.
"""

from __future__ import annotations

import os
import sys


def forbid_autoload() -> None:
    """Leave it to the device that is asked for to import its package and say what is missing."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def hide_torch_npu() -> None:
    """Make torch_npu look absent in this process.

    Where the wheel is installed, torch would load it by itself, and transformers whenever it asks
    which devices there are; both fail on a machine without the driver. A module of None is
    Python's own way to say that an import is to find nothing.
    """
    forbid_autoload()
    sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]
