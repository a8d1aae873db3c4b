"""torch_npu warns of its own doings, and pytest makes errors of warnings."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Cannot create tensor with internal format")
