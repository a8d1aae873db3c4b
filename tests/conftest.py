"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says more about the neighbours of this machine than about the code.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")
