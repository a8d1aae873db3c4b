"""What `--device cuda` says where it cannot run, and that nobody else meets Triton."""

from __future__ import annotations

import ast
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from executor_svc.accelerator import cuda
from executor_svc.accelerator.device import DeviceUnavailable
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.reference import ReferenceOps

ROOT = Path(__file__).parents[2]
PACKAGES = ("stages", "shm", "executor_svc", "sampler_svc", "scheduler_svc")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has all that is needed, as far as anyone can ask."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(cuda, "find_spec", lambda name: ModuleSpec(name, None))
    return monkeypatch


def refusal(index: int = 0) -> str:
    with pytest.raises(DeviceUnavailable) as caught:
        cuda.check_cuda(index)
    return str(caught.value)


def test_a_machine_that_has_everything_is_taken(card: pytest.MonkeyPatch) -> None:
    cuda.check_cuda(0)


def test_a_build_without_cuda_is_named(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refusal()


def test_a_missing_card_is_named(card: pytest.MonkeyPatch) -> None:
    assert "no card 1" in refusal(index=1)
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in refusal()


def test_an_old_card_is_named(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "Card is too old" in refusal()


def test_a_missing_triton_is_named(card: pytest.MonkeyPatch) -> None:
    card.setattr(cuda, "find_spec", lambda name: None)
    assert "headrace[cuda]" in refusal()


def test_without_fusion_the_operators_are_plain_torch() -> None:
    assert isinstance(cuda.make_ops(Fallbacks(), uses_fusion=False), ReferenceOps)


def top_level_imports(path: Path) -> set[str]:
    """Modules that are imported when `path` is; those within functions are not among them."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_triton_is_imported_by_the_cuda_operators_alone() -> None:
    kernels = ROOT / "executor_svc/ops/cuda"
    offenders = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.is_relative_to(kernels)
        for name in top_level_imports(path)
        if name.split(".")[0] == "triton" or name.startswith("executor_svc.ops.cuda")
    ]
    assert offenders == []
