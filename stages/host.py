"""The machine as files, variables and the vendors' tools tell it; a test brings its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOOL_TIMEOUT_S = 20


def tool_output(command: Sequence[str]) -> str | None:
    """What a tool prints, None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Host:
    """Where facts come from. `root`: the folder that holds `sys` and `proc`."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    output_of: Callable[[Sequence[str]], str | None] = tool_output

    def read(self, path: str) -> str:
        """A file's text, '' if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""
