"""The processes of a real group run on the processors that they were given."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from stages.model_folder import embedded_model
from stages.run_dir import create_run_dir
from stages.supervisor import Supervisor
from stages.topology import EXECUTOR, stage_names
from tests.pipeline import make_config


def test_each_stage_runs_where_it_is_told(tmp_path: Path) -> None:
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        pytest.skip("one processor: there is nothing to divide")
    cpus = {stage: available[:1] for stage in stage_names(1)} | {EXECUTOR: available[1:2]}
    run_dir = tmp_path / "run"
    create_run_dir(run_dir)
    config = make_config(embedded_model(), device="emulated", run_dir=str(run_dir))
    found: dict[str, list[int]] = {}

    def look(seconds: float) -> None:
        for stage in supervisor.state().stages:
            found[stage.stage] = sorted(os.sched_getaffinity(stage.pid))
        os.kill(os.getpid(), signal.SIGTERM)  # the supervisor drains and ends

    with socket.create_server(("127.0.0.1", 0)) as listener:
        supervisor = Supervisor(config, [listener], look, cpus)
        asyncio.run(supervisor.run())
    assert found == cpus
