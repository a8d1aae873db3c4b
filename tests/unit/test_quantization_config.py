"""Which quantized checkpoints are served, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from executor_svc.make_model import make_model
from executor_svc.model_config import ConfigFields, ModelLoadError, load_model_config
from executor_svc.models import cpu
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from executor_svc.quantization.awq import AwqReader
from executor_svc.quantization.checkpoint_config import make_reader
from executor_svc.quantization.compressed_tensors import CompressedTensorsReader
from executor_svc.quantization.gptq import GptqReader
from executor_svc.quantization.reader import group_order

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}


def _tensors(
    weights: Mapping[str, Any] | None = INT4, inputs: object = None, **changes: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    common = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**common, "config_groups": {"group_0": group}, **changes}


def _fields(values: Mapping[str, Any]) -> ConfigFields:
    return ConfigFields("config.json: quantization_config", MappingProxyType(values))


@pytest.mark.parametrize(
    ("values", "reader"),
    [
        (GPTQ, GptqReader(4, 128, 1)),
        ({**GPTQ, "bits": 8, "group_size": -1}, GptqReader(8, -1, 1)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True}, GptqReader(4, 128, 0)),
        (AWQ, AwqReader(64)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, AwqReader(128)),
        (_tensors(), CompressedTensorsReader(4, False)),
        (_tensors({**INT8, "symmetric": False}), CompressedTensorsReader(8, False)),
        (_tensors(INT8, DYNAMIC, format="int-quantized"), CompressedTensorsReader(8, True)),
        (_tensors(INT8, format="int-quantized"), CompressedTensorsReader(8, False)),
    ],
)
def test_a_served_format_is_recognized(values: Mapping[str, Any], reader: object) -> None:
    assert make_reader(_fields(values)) == reader


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "fp8"}, "'quant_method' is 'fp8', served is gptq, awq and compressed"),
        ({"bits": 4}, "'quant_method' is ''"),
        ({**GPTQ, "bits": 3}, "'bits' is 3, served is 4 and 8"),
        ({"quant_method": "gptq"}, "'bits' must be an integer"),
        ({**GPTQ, "group_size": 33}, "'group_size' must be even and positive, or -1, not 33"),
        ({**GPTQ, "group_size": 0}, "'group_size' must be even and positive"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "'checkpoint_format'"),
        ({**GPTQ, "dynamic": {"-:.*down": {}}}, "'dynamic' is set"),
        ({**AWQ, "version": "gemv"}, "'version' is 'gemv', served is gemm"),
        ({**AWQ, "zero_point": False}, "'zero_point' is false"),
        ({**AWQ, "bits": 3}, "'bits' is 3, served is 4;"),
        (_tensors(format="marlin-24"), "'format' is 'marlin-24'"),
        (_tensors(format="float-quantized"), "'format' is 'float-quantized'"),
        (_tensors({**INT4, "type": "float"}), "'type' is 'float', served is int"),
        (_tensors({**INT4, "num_bits": 2}), "'num_bits' is 2, served is 4 and 8"),
        (_tensors({**INT4, "strategy": "block"}), "'strategy' is 'block'"),
        (_tensors(None), "'group_0' must have 'weights'"),
        (_tensors(config_groups=None), "'config_groups' is missing"),
        (_tensors(INT4, format="int-quantized"), "'num_bits' is 4, served is 8"),
        (_tensors(INT8, {**DYNAMIC, "dynamic": False}), "'dynamic' is false or asymmetric"),
        (_tensors(INT8, {**DYNAMIC, "num_bits": 4}), "'num_bits' is 4, served is 8"),
        (_tensors(INT8, {**DYNAMIC, "type": "float"}), "'type' is not int"),
        (
            _tensors(config_groups={"a": {"weights": INT4}, "b": {"weights": INT8}}),
            "'config_groups' is of several kinds",
        ),
    ],
)
def test_what_is_not_served_is_named(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as error:
        make_reader(_fields(values))
    assert "config.json" in str(error.value)


def test_columns_that_form_no_groups_are_refused() -> None:
    assert group_order(torch.tensor([0, 0, 1, 1]), 2, "a") is None
    order = group_order(torch.tensor([1, 0, 1, 0], dtype=torch.int32), 2, "a")
    assert order is not None and order.tolist() == [1, 3, 0, 2]
    with pytest.raises(ModelLoadError, match="'a' does not deal the columns to groups of 2"):
        group_order(torch.tensor([0, 0, 0, 1]), 2, "a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("tiny-qwen3", tmp_path / "tiny", vocab_size=512)
    return tmp_path / "tiny"


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_quantized_checkpoint_is_not_quantized_again(folder: Path) -> None:
    _change_config(folder, quantization_config=GPTQ)
    with pytest.raises(ModelLoadError, match="--quantization int8 is for float checkpoints"):
        cpu.load_cpu_model(folder, load_model_config(folder), "auto", "int8")


def test_other_families_are_refused_by_name(folder: Path) -> None:
    _change_config(folder, architectures=["GPTNeoXForCausalLM"])
    with pytest.raises(ModelLoadError, match="not served for GPTNeoXForCausalLM"):
        cpu.load_cpu_model(folder, load_model_config(folder), "auto", "w8a8")
    _change_config(folder, quantization_config=AWQ)
    with pytest.raises(ModelLoadError, match="of GPTNeoXForCausalLM only the float32"):
        load_model(folder, load_model_config(folder), "float32", CpuOps())
