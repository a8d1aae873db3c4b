"""Reading safetensors: single, sharded, converted, and every way in which a folder is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file

from executor_svc.model_config import ConfigFields, ModelConfig, ModelLoadError
from executor_svc.weights import Checkpoint, find_weight_files, resolve_dtype

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.tensor([0.1, 1000.123, -3.0]),
}


def _never(name: str) -> bool:
    return False


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    weight_map = {}
    for index, (name, tensor) in enumerate(WEIGHTS.items()):
        weight_map[name] = f"model-{index}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_of_every_file_are_found(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    with Checkpoint(folder, torch.float32) as checkpoint:
        assert "a.weight" in checkpoint and "c.weight" not in checkpoint
        taken = {name: checkpoint.take(name, *WEIGHTS[name].shape) for name in WEIGHTS}
        checkpoint.check_all_taken(_never)
    # Still readable after the files are closed: the mapping lives as long as its tensors.
    torch.testing.assert_close(taken, WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_converted(single: Path, dtype: torch.dtype) -> None:
    with Checkpoint(single, dtype) as checkpoint:
        taken = checkpoint.take("b.weight", 3)
    torch.testing.assert_close(taken, WEIGHTS["b.weight"].to(dtype), rtol=0, atol=0)


def test_a_missing_tensor_is_named(single: Path) -> None:
    with (
        Checkpoint(single, torch.float32) as checkpoint,
        pytest.raises(ModelLoadError, match=r"'c\.weight' is missing"),
    ):
        checkpoint.take("c.weight", 3)


def test_a_wrong_shape_is_named(single: Path) -> None:
    with (
        Checkpoint(single, torch.float32) as checkpoint,
        pytest.raises(ModelLoadError, match=r"'a\.weight' has shape \[2, 3\].*implies \[3, 2\]"),
    ):
        checkpoint.take("a.weight", 3, 2)


def test_unexpected_tensors_are_named_unless_ignored(single: Path) -> None:
    with Checkpoint(single, torch.float32) as checkpoint:
        checkpoint.take("a.weight", 2, 3)
        with pytest.raises(ModelLoadError, match=r"unexpected tensors b\.weight;"):
            checkpoint.check_all_taken(_never)
        checkpoint.check_all_taken(lambda name: name == "b.weight")


def test_many_unexpected_tensors_are_shortened(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(8)}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path, torch.float32) as checkpoint,
        pytest.raises(ModelLoadError, match="x0, x1, x2, x3, x4 and 3 more"),
    ):
        checkpoint.check_all_taken(_never)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(ModelLoadError, match=r"pickled.*save_pretrained"):
        find_weight_files(tmp_path)


def test_safetensors_win_over_pickled_weights(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(b"never opened")
    assert find_weight_files(single) == [single / "model.safetensors"]


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        find_weight_files(tmp_path)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"missing files model-1\.safetensors"):
        find_weight_files(sharded)


def test_an_index_cannot_name_a_file_outside_the_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/model-0.safetensors"}}))
    assert find_weight_files(sharded) == [sharded / "model-0.safetensors"]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelLoadError, match="no valid 'weight_map'"):
        find_weight_files(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    with (
        pytest.raises(ModelLoadError, match=re.escape(f"{path} is damaged")),
        Checkpoint(tmp_path, torch.float32),
    ):
        pass


def _config(dtype: str) -> ModelConfig:
    fields = ConfigFields("config.json", MappingProxyType({}))
    return ModelConfig(Path(), "X", "x", 1, 8, 1, 1, 8, 9, 10, (), dtype, fields)


def test_dtype_auto_is_the_checkpoints_own() -> None:
    assert resolve_dtype("auto", _config("bfloat16")) == torch.bfloat16
    assert resolve_dtype("float16", _config("bfloat16")) == torch.float16
    with pytest.raises(ModelLoadError, match="--dtype int8 is not one of auto, float32"):
        resolve_dtype("int8", _config("bfloat16"))
