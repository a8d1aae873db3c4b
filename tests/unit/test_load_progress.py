"""What a load says and what it gives back."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executor_svc import progress as progress_module
from executor_svc.progress import Progress
from executor_svc.weights import Checkpoint

MIB = 2**20


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "QUIET_S", 0.0)


def test_a_log_gets_a_line_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("Loading", 57, io.StringIO())
    with caplog.at_level(logging.INFO):
        for _ in range(57):
            progress.advance()
    assert [record.message for record in caplog.records] == [
        f"Loading: {10 * tenth} %" for tenth in range(1, 11)
    ]


def test_a_terminal_gets_one_line_that_grows() -> None:
    terminal = _Terminal()
    progress = Progress("Loading", 4, terminal)
    for _ in range(4):
        progress.advance()
    *begun, last = terminal.getvalue().split("\r")
    assert len(begun) == 4 and all("\n" not in line for line in begun)
    assert last == f"Loading [{'#' * 30}] 100 %\n"


def test_a_short_load_says_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "QUIET_S", 60.0)
    progress = Progress("Loading", 2, io.StringIO())
    with caplog.at_level(logging.INFO):
        progress.advance()
        progress.advance()
    assert not caplog.records


def _resident_file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))
    return kib * 1024


def test_what_was_read_is_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    weight = torch.arange(16 * MIB // 4, dtype=torch.float32).view(1024, -1)
    save_file({"a": weight}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, torch.float32) as checkpoint:
        taken = checkpoint.take("a", *weight.shape)
        assert torch.equal(taken, weight)
        before = _resident_file_pages()
        checkpoint.release_memory()
        assert before - _resident_file_pages() > 15 * MIB
        assert torch.equal(taken, weight)
