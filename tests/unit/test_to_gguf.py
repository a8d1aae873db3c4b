"""A folder as GGUF, read back with the package's own reader: shapes, values, tokens, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks.checkpoint import CheckpointError, tensors
from benchmarks.prompts import Prompts
from benchmarks.to_gguf import TYPES, convert
from executor_svc.make_model import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model("tiny-qwen3", path, dtype="bfloat16", vocab_size=300)
    return path


def with_config(folder: Path, to: Path, **changes: object) -> Path:
    """A copy of a folder with another config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_arrays_are_those_of_safetensors(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    found = {tensor.name: tensor.load() for tensor in tensors(folder)}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.float().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.linspace(-3, 3, 12).view(3, 4).to(dtype)
    save_file({"w": values}, tmp_path / "model.safetensors")
    (tensor,) = tensors(tmp_path)
    np.testing.assert_array_equal(tensor.load(), values.float().numpy())


def test_a_quantized_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    (tensor,) = tensors(tmp_path)
    with pytest.raises(CheckpointError, match="w has dtype I8"):
        tensor.load()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        list(tensors(tmp_path))


@pytest.mark.parametrize("type_name", TYPES)
def test_weights_survive_as_well_as_the_type_can(
    type_name: str, folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "m.gguf", type_name)
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = {tensor.name: tensor.load() for tensor in tensors(folder)}
    assert len(stored) == len(expected)
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
    ):
        one, values = stored[name], expected[ours]
        is_vector = values.ndim == 1
        assert one.tensor_type.name == ("F32" if is_vector else type_name)
        found = gguf.quants.dequantize(one.data, one.tensor_type).reshape(values.shape)
        is_exact = is_vector or type_name in ("F32", "BF16")
        # Weights of deviation 0.02: a step of Q8_0 is about 0.08 / 127.
        np.testing.assert_allclose(found, values, rtol=0, atol=0 if is_exact else 5e-4)


def test_tokens_keep_their_ids_and_kinds(folder: Path, tmp_path: Path) -> None:
    wider = with_config(folder, tmp_path / "wider", vocab_size=310)
    convert(wider, tmp_path / "m.gguf", "BF16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert tokens[:size] == [tokenizer.id_to_token(index) for index in range(size)]
    assert tokens[size:] == [f"[PAD{index}]" for index in range(size, 310)]
    assert kinds[:3] == [gguf.TokenType.CONTROL] * 3
    assert set(kinds[3:size]) == {gguf.TokenType.NORMAL}
    assert set(kinds[size:]) == {gguf.TokenType.UNUSED}
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type gemma is not converted"),
        ({"rope_scaling": {"factor": 2}}, "config.json has rope_scaling"),
        ({"use_sliding_window": True}, "config.json has use_sliding_window"),
    ],
)
def test_what_it_does_not_convert_is_refused(
    changes: dict[str, object], message: str, folder: Path, tmp_path: Path
) -> None:
    other = with_config(folder, tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(other, tmp_path / "m.gguf", "BF16")
    assert not (tmp_path / "m.gguf").exists()


def test_prompts_have_the_asked_number_of_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "words"
    make_model("tiny-qwen3", folder, dtype="bfloat16", vocab_size=800)
    prompts = Prompts(folder)
    texts = prompts.draw(3, 50, seed=0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [len(tokenizer.encode(text).ids) for text in texts] == [50] * 3
    assert len(set(texts)) == 3
    assert texts == prompts.draw(3, 50, seed=0)
    assert texts != prompts.draw(3, 50, seed=1)
