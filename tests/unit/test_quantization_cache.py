"""Quantized weights on disk: believed only while they belong to the model, never in the way."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.make_model import make_model
from executor_svc.model_config import ModelConfig, load_model_config
from executor_svc.models import cpu
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.quantized_packing import QuantizedPacker
from executor_svc.quantization import cache as cache_module
from executor_svc.quantization.cache import PackedCache, default_cache_folder
from tests.unit.native_models import best_build


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny-qwen3", out, vocab_size=512)
    return out


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil; however small, it is cached."""
    monkeypatch.setattr(cache_module, "MIN_BYTES", 0)
    shutil.copytree(tiny, tmp_path / "tiny")
    return tmp_path / "tiny"


def _load(folder: Path, cache_folder: Path, quantization: str = "int8") -> FusedDecoder:
    config = load_model_config(folder)
    return cpu.load_fused_decoder(config, "auto", best_build(), quantization, cache_folder)


def _logits(model: FusedDecoder) -> Tensor:
    batch = ForwardBatch.from_spans([Span(range(20), 0, [1, 2])], 16)
    with torch.inference_mode():
        return model.forward(batch, allocate_kv_cache(model.kv_spec, 3, 16))


def _refuse_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(QuantizedPacker, "quantize_linear", refuse)


@pytest.mark.parametrize("quantization", ["int8", "w8a8"])
def test_the_second_load_takes_the_first_ones_weights(
    folder: Path, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _logits(_load(folder, tmp_path / "cache", quantization))
    _refuse_to_quantize(monkeypatch)
    assert torch.equal(first, _logits(_load(folder, tmp_path / "cache", quantization)))
    with pytest.raises(AssertionError, match="quantized again"):
        other = "w8a8" if quantization == "int8" else "int8"
        _load(folder, tmp_path / "cache", other)


def _touch_weights(folder: Path, file: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def _change_config(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))


def _truncate(folder: Path, file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _overwrite_header(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:8] + b"{" * 100)


def _claim_a_huge_header(folder: Path, file: Path) -> None:
    file.write_bytes(b"\xff" * 64)


def _empty(folder: Path, file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [_touch_weights, _change_config, _truncate, _overwrite_header, _claim_a_huge_header, _empty],
)
def test_a_stale_or_damaged_cache_is_made_anew(
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache_folder = tmp_path / "cache"
    _load(folder, cache_folder)
    (file,) = cache_folder.iterdir()
    spoil(folder, file)
    spoilt = file.read_bytes()
    second = _logits(_load(folder, cache_folder))
    assert [*cache_folder.iterdir()] == [file] and file.read_bytes() != spoilt
    _refuse_to_quantize(monkeypatch)
    assert torch.equal(second, _logits(_load(folder, cache_folder)))


@pytest.mark.parametrize("place", [0.001, 0.2, 0.5, 0.8, 1.0])
def test_a_flipped_bit_is_noticed_and_mended(
    folder: Path, tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    cache_folder = tmp_path / "cache"
    first = _logits(_load(folder, cache_folder))
    (file,) = cache_folder.iterdir()
    written = file.read_bytes()
    start = 8 + int.from_bytes(written[:8], "little")
    spoilt = bytearray(written)
    spoilt[min(start + int(place * (len(written) - start)), len(written) - 1)] ^= 4
    file.write_bytes(spoilt)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first, _logits(_load(folder, cache_folder)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "checksum" in caplog.text and str(file) in caplog.text
    assert file.read_bytes() == written


def test_no_flipped_bit_of_the_header_changes_the_model(folder: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "cache"
    first = _logits(_load(folder, cache_folder))
    (file,) = cache_folder.iterdir()
    written = file.read_bytes()
    places = random.Random(0)
    for _ in range(40):
        spoilt = bytearray(written)
        spoilt[places.randrange(8 + int.from_bytes(written[:8], "little"))] ^= (
            1 << places.randrange(8)
        )
        file.write_bytes(spoilt)
        assert torch.equal(first, _logits(_load(folder, cache_folder)))


def test_only_what_is_damaged_is_quantized_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder = tmp_path / "cache"
    _load(folder, cache_folder)
    (file,) = cache_folder.iterdir()
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1
    file.write_bytes(spoilt)
    quantize, calls = QuantizedPacker.quantize_linear, []

    def count(*arguments: Any, **named: Any) -> LinearWeight:
        calls.append(arguments)
        return quantize(*arguments, **named)

    monkeypatch.setattr(QuantizedPacker, "quantize_linear", count)
    _load(folder, cache_folder)
    assert len(calls) == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        model = _load(folder, tmp_path / "file" / "cache")
    assert "not cached" in caplog.text and "XDG_CACHE_HOME" in caplog.text
    assert _logits(model).isfinite().all()


def test_a_write_that_fails_leaves_nothing_behind(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_file", full)
    with caplog.at_level(logging.WARNING):
        _load(folder, tmp_path / "cache")
    assert "No space left" in caplog.text
    assert [*(tmp_path / "cache").iterdir()] == []


def test_a_failed_load_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MIN_BYTES", 0)
    weight = QuantizedPacker(best_build()).quantize_linear(torch.ones(3, 4), int8_activations=False)
    with pytest.raises(RuntimeError), PackedCache(tmp_path / "c", "key") as cache:
        cache.keep("a", weight)
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []


def test_small_models_are_not_cached(tiny: Path, tmp_path: Path) -> None:
    _load(tiny, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_float_weights_are_not_cached(folder: Path, tmp_path: Path) -> None:
    _load(folder, tmp_path / "cache", "none")
    assert not (tmp_path / "cache").exists()


def test_each_model_scheme_and_build_has_a_file(tmp_path: Path) -> None:
    names = [
        cache_module.cache_path(tmp_path, folder, scheme, build)
        for folder in (tmp_path / "a", tmp_path / "b" / "a")
        for scheme in ("int8", "w8a8")
        for build in ("avx2", "avx512")
    ]
    assert len(set(names)) == 8


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_cache_folder() == Path("/some/where/headrace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "headrace"


def test_a_servers_load_uses_that_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config: ModelConfig = load_model_config(folder)
    best_build()
    cpu.load_cpu_model(folder, config, "auto", "int8")
    assert len([*(tmp_path / "home" / "headrace").iterdir()]) == 1
