"""What the adapter refuses and how it says so, and that nobody else pays for transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.model_config import ModelLoadError
from executor_svc.models import adapter_attention
from executor_svc.models.transformers_adapter import load_with_transformers
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.interface import AttentionParams
from tests.golden.tiny_models import SHAPE, build_tiny_model

DEEPSEEK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _save(folder: Path, model_type: str, own: dict[str, Any]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SHAPE, **own})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "own", "message"),
    [
        ("bloom", {}, "BloomForCausalLM does not route its attention through"),
        ("mamba", {}, "MambaForCausalLM keeps recurrent state"),
        ("deepseek_v3", DEEPSEEK, "keys of 24 and values of 12"),
        ("llama4_text", {"num_local_experts": 2}, "layers of type chunked_attention"),
        # Attention sinks reach the attention function as an option that paging knows nothing of.
        ("gpt_oss", {"num_local_experts": 4}, "GptOssForCausalLM computes something else"),
        ("nemotron", {}, "NemotronAttention passes no layer index or options"),
    ],
)
def test_a_model_that_cannot_page_is_refused_by_name(
    tmp_path: Path, model_type: str, own: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_with_transformers(_save(tmp_path, model_type, own), torch.float32, CpuOps())


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="cannot load it as a causal language model"):
        load_with_transformers(tmp_path, torch.float32, CpuOps())


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(ModelLoadError, match="without code of its own"):
        load_with_transformers(tmp_path, torch.float32, CpuOps())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = build_tiny_model("olmo2", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="from safetensors"):
        load_with_transformers(folder, torch.float32, CpuOps())


def test_a_window_that_only_a_mask_knows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = adapter_attention.LayerRecorder.attend

    def without_window(
        self: adapter_attention.LayerRecorder,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        return attend(self, layer, query, key, value, AttentionParams(params.scale))

    monkeypatch.setattr(adapter_attention.LayerRecorder, "attend", without_window)
    with pytest.raises(ModelLoadError, match="does not hand its sliding window of 33"):
        load_with_transformers(build_tiny_model("phi3", tmp_path), torch.float32, CpuOps())


def test_wrong_attention_is_caught_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = adapter_attention.PagedStep.attend

    def with_wrong_scale(
        self: adapter_attention.PagedStep,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        return attend(self, layer, query, key, value, AttentionParams(params.scale * 1.1))

    monkeypatch.setattr(adapter_attention.PagedStep, "attend", with_wrong_scale)
    with pytest.raises(ModelLoadError, match="Olmo2ForCausalLM computes something else"):
        load_with_transformers(build_tiny_model("olmo2", tmp_path), torch.float32, CpuOps())


def test_a_native_model_does_not_import_transformers(tmp_path: Path) -> None:
    folder = build_tiny_model("qwen3", tmp_path)
    script = (
        "import sys; from pathlib import Path\n"
        "from executor_svc.model_config import load_model_config\n"
        "from executor_svc.models.registry import load_model\n"
        "from executor_svc.ops.cpu import CpuOps\n"
        "folder = Path(sys.argv[1])\n"
        "load_model(folder, load_model_config(folder), 'auto', CpuOps())\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=60)
