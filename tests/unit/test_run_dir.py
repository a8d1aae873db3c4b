"""The run directory: private, exclusive, gone afterwards."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from stages.errors import ConfigError, HeadraceError
from stages.messages import GroupState, StageState
from stages.run_dir import create_run_dir, remove_run_dir
from stages.status import ask_status, format_status, report, serve_status

STATE = GroupState(3, [StageState("scheduler", 42, 2, True, 10**9, 7, 1, {"steps_total": 7})])


def test_it_is_private_and_cleared_of_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    create_run_dir(folder)
    (folder / "tokenizer.in").touch()
    folder.chmod(0o755)
    create_run_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    remove_run_dir(folder)
    assert not folder.exists()


def test_a_long_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--run-dir"):
        create_run_dir(tmp_path / ("x" * 100))


async def answered() -> None:
    """Let the server end what it has begun."""
    current = asyncio.current_task()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not current))


async def test_a_live_group_is_not_disturbed(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    async with await serve_status(str(tmp_path), lambda: STATE):
        with pytest.raises(ConfigError, match="running"):
            await asyncio.to_thread(create_run_dir, tmp_path)
        await answered()


async def test_status_tells_the_state(tmp_path: Path) -> None:
    async with await serve_status(str(tmp_path), lambda: STATE):
        answer = await asyncio.to_thread(ask_status, tmp_path)
        await answered()
    assert answer == report(STATE)
    table = format_status(answer, now_ns=3 * 10**9)
    assert "epoch 3" in table and "scheduler" in table and "2.0 s" in table


def test_status_of_nobody_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="no group answers"):
        ask_status(tmp_path)
