"""`headrace check-model`: what a device does with a model, and the devices that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor_svc.accelerator.device import DeviceUnavailable
from executor_svc.accelerator.npu import NpuDevice
from executor_svc.check_model import check_model
from executor_svc.make_model import make_model
from executor_svc.ops.fallback import Fallback, Fallbacks
from stages.cli import main
from stages.errors import ConfigError, HeadraceError
from stages.settings import build_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    make_model("tiny-qwen3", str(out), dtype="bfloat16", vocab_size=512, seed=0)
    return out


def report(folder: Path, **settings: Any) -> dict[str, str]:
    config = build_config({"model": str(folder), **settings}, {})
    return dict(line.split(maxsplit=1) for line in check_model(config) if line[0] != " ")


def test_npu_fuses_all_of_qwen3(folder: Path) -> None:
    lines = report(folder, device="npu")
    assert lines["attention"] == "npu_fused_infer_attention_score, heads of 32 padded to 128"
    assert lines["add_rms_norm"] == "npu_add_rms_norm"
    assert not any("falls back" in value for value in lines.values())
    assert lines["decode"].endswith("one a batch bucket")


def test_weights_that_cannot_be_tiled_are_told(folder: Path) -> None:
    assert report(folder, device="npu")["linear"] == "torch"
    lines = report(folder, device="npu", weight_format="nz")
    assert lines["linear"] == "torch, weights in tiles (FRACTAL_NZ)"
    lines = report(folder, device="npu", weight_format="nz", dtype="float32")
    assert lines["linear"].endswith("; falls back: float32 weights")


def test_npu_falls_back_from_float32_and_says_so(folder: Path) -> None:
    lines = report(folder, device="npu", dtype="float32")
    assert lines["attention"] == "torch; falls back: float32 keys and values (2 of 2 layers)"
    assert "none: attention falls back" in lines["decode"]


def test_no_fusion_and_no_graphs(folder: Path) -> None:
    assert (
        "--operator-fusion off" in report(folder, device="npu", operator_fusion="off")["operators"]
    )
    assert "--enforce-eager" in report(folder, device="cuda", enforce_eager=True)["decode"]


def test_a_model_that_cannot_be_served_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["check-model", str(broken)]) == 1
    assert "download it again" in capsys.readouterr().err


def test_npu_block_size_is_its_own_and_no_other(folder: Path) -> None:
    arguments = {"model": str(folder), "device": "npu"}
    assert build_config(arguments, {}).block_size == 128
    with pytest.raises(ConfigError, match=r"--block-size 16 .* pass 128"):
        build_config(arguments | {"block_size": 16}, {})


def test_side_streams_are_at_most_two(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--parallel-streams is at most 2, not 3"):
        build_config({"model": str(folder), "parallel_streams": 3}, {})


def test_npu_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor_svc.accelerator.npu.find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailable, match=r"pip install 'headrace\[npu\]'"):
        NpuDevice()


def test_npu_without_cann(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(DeviceUnavailable, match=r"no CANN \(libhccl.so.*set_env.sh"):
        NpuDevice()


def test_nothing_of_a_device_is_imported_before_it_is_asked_for() -> None:
    """Not by whatever serves all devices, and not by the command line."""
    modules = "executor_svc.accelerator.loading, executor_svc.check_model, stages.cli"
    code = f"import sys, {modules}; print(sorted({{'torch_npu', 'triton'}} & set(sys.modules)))"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


def test_fallbacks_are_counted_by_operator_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    fallbacks = Fallbacks()
    for _ in range(3):
        fallbacks.note("attention", "heads of 256")
    fallbacks.note("geglu", "no kernel")
    assert fallbacks.counts()[Fallback("attention", "heads of 256")] == 3
    assert fallbacks.stats()["executor_fallback_attention_heads_of_256_total"] == 3
    assert len(caplog.records) == 2  # once each


def test_device_errors_are_headrace_errors() -> None:
    assert issubclass(DeviceUnavailable, HeadraceError)
