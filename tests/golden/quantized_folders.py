"""Quantizes a tiny float folder into the published checkpoint formats, one code at a time.

Written from the formats' definitions and sharing nothing with the loaders. Codes, scales and zeros
are drawn; beside each quantized folder stands a float one with the values that they mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Drawn:
    """A projection: codes [out, in] unsigned, scales and zeros [out, groups], group [in]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray

    def values(self) -> Tensor:
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        codes = self.codes.astype(np.float32)
        return torch.from_numpy((codes - zeros) * scales.astype(np.float32))


@dataclass(frozen=True)
class Format:
    """`write` gives a projection's tensors; `seed_of` what its column order depends on."""

    config: Mapping[str, Any]
    bits: int
    write: Callable[[Drawn], Tensors]
    group_size: int = GROUP
    is_symmetric: bool = True
    order: str = ""  # "" in order, "input": one order an input, "own": each projection its own
    int8_activations: bool = False


def write_folders(source: Path, out: Path, kind: str) -> tuple[Path, Path]:
    """The quantized folder and the float one that must compute the same."""
    form = FORMATS[kind]
    quantized, plain = out / kind, out / f"{kind}-float"
    tensors = load_file(source / "model.safetensors")
    written, expanded = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        prefix = name.removesuffix(".weight")
        drawn = _draw(form, prefix, *tensors[name].shape)
        del written[name]
        written |= {f"{prefix}.{part}": value for part, value in form.write(drawn).items()}
        expanded[name] = drawn.values()
    for folder, content in ((quantized, written), (plain, expanded)):
        shutil.copytree(source, folder)
        content = {name: value.contiguous() for name, value in content.items()}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config_file = quantized / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": {**form.config}}))
    return quantized, plain


def _draw(form: Format, prefix: str, out_size: int, in_size: int) -> Drawn:
    shared = prefix.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
    shared = shared.replace("up_proj", "gate_proj")
    numbers = np.random.default_rng([*prefix.encode()])
    ordered = np.random.default_rng([*(shared if form.order == "input" else prefix).encode()])
    size = form.group_size if form.group_size > 0 else in_size
    groups, middle = in_size // size, 1 << (form.bits - 1)
    group_of = np.arange(in_size) // size
    if form.order:
        group_of = ordered.permutation(group_of)
    # Codes around the middle, so that the model's values stay near those it was made with.
    spread = numbers.normal(0, middle / 2.5, (out_size, in_size)).round() + middle
    drift = 0 if form.is_symmetric else numbers.integers(-2, 3, (out_size, groups))
    return Drawn(
        codes=spread.clip(0, 2 * middle - 1).astype(np.int64),
        scales=(numbers.uniform(0.5, 1.5, (out_size, groups)) / middle / 3).astype(np.float16),
        zeros=np.full((out_size, groups), middle) + drift,
        group_of=group_of,
    )


def _pack_along(codes: np.ndarray, axis: int, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Codes into int32 words along an axis; place p of a word takes code order[p]."""
    lines, per_word = np.moveaxis(codes, axis, -1), 32 // bits
    width = -(-lines.shape[-1] // per_word) * per_word
    words = np.zeros((*lines.shape[:-1], width // per_word), np.uint32)
    for index in np.ndindex(lines.shape):
        *line, k = index
        place = order.index(k % per_word) if order else k % per_word
        words[(*line, k // per_word)] |= np.uint32(lines[index] << (place * bits))
    return torch.from_numpy(np.moveaxis(words.view(np.int32), -1, axis).copy())


def _gptq(bits: int, stored_zero_offset: int) -> Callable[[Drawn], Tensors]:
    def write(drawn: Drawn) -> Tensors:
        return {
            "qweight": _pack_along(drawn.codes.T, 0, bits),
            "qzeros": _pack_along((drawn.zeros - stored_zero_offset).T, 1, bits),
            "scales": torch.from_numpy(drawn.scales.T.copy()),
            "g_idx": torch.from_numpy(drawn.group_of.astype(np.int32)),
        }

    return write


def _gptq_with_bias(drawn: Drawn) -> Tensors:
    """AutoGPTQ wrote a bias of zeros to projections that have none."""
    return _gptq(4, 1)(drawn) | {"bias": torch.zeros(len(drawn.codes), dtype=torch.float16)}


def _awq(drawn: Drawn) -> Tensors:
    return {
        "qweight": _pack_along(drawn.codes.T, 1, 4, AWQ_ORDER),
        "qzeros": _pack_along(drawn.zeros.T, 1, 4, AWQ_ORDER),
        "scales": torch.from_numpy(drawn.scales.T.copy()),
    }


def _packed(bits: int, has_zeros: bool, has_order: bool) -> Callable[[Drawn], Tensors]:
    def write(drawn: Drawn) -> Tensors:
        tensors = {
            "weight_packed": _pack_along(drawn.codes, 1, bits),
            "weight_scale": torch.from_numpy(drawn.scales),
            "weight_shape": torch.tensor(drawn.codes.shape),
        }
        if has_zeros:
            tensors["weight_zero_point"] = _pack_along(drawn.zeros, 0, bits)
        if has_order:
            tensors["weight_g_idx"] = torch.from_numpy(drawn.group_of.astype(np.int32))
        return tensors

    return write


def _int_quantized(drawn: Drawn) -> Tensors:
    return {
        "weight": torch.from_numpy((drawn.codes - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(drawn.scales),
    }


def _gptq_config(bits: int, group_size: int, **changes: object) -> Mapping[str, Any]:
    common = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True}
    return {**common, "desc_act": False, "damp_percent": 0.01, **changes}


def _tensors_config(weights: dict[str, Any], *, is_packed: bool = True) -> Mapping[str, Any]:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights},
        "input_activations": None if is_packed else inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if is_packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


_GROUPED = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "gptq": Format(_gptq_config(4, GROUP), 4, _gptq(4, 1)),
        "gptq_bias": Format(_gptq_config(4, GROUP), 4, _gptq_with_bias),
        "gptq_one_group": Format(_gptq_config(4, -1), 4, _gptq(4, 1), group_size=-1),
        "gptq_act_order": Format(
            _gptq_config(4, GROUP, desc_act=True, sym=False),
            *(4, _gptq(4, 1)),
            is_symmetric=False,
            order="input",
        ),
        "gptq_own_orders": Format(
            _gptq_config(4, GROUP, desc_act=True), 4, _gptq(4, 1), order="own"
        ),
        "gptq_v2": Format(
            _gptq_config(4, GROUP, sym=False, checkpoint_format="gptq_v2"),
            *(4, _gptq(4, 0)),
            is_symmetric=False,
        ),
        "gptq_8_bits": Format(
            _gptq_config(8, GROUP, sym=False), 8, _gptq(8, 1), is_symmetric=False
        ),
        "awq": Format(
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": GROUP,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            },
            *(4, _awq),
            is_symmetric=False,
        ),
        "packed_4_bits": Format(_tensors_config(_GROUPED), 4, _packed(4, False, False)),
        "packed_zeros": Format(
            _tensors_config({**_GROUPED, "symmetric": False}),
            *(4, _packed(4, True, False)),
            is_symmetric=False,
        ),
        "packed_act_order": Format(
            _tensors_config({**_GROUPED, "actorder": "group"}),
            *(4, _packed(4, False, True)),
            order="input",
        ),
        "packed_8_bits": Format(
            _tensors_config({"num_bits": 8, "strategy": "channel"}),
            *(8, _packed(8, False, False)),
            group_size=-1,
        ),
        "w8a8": Format(
            _tensors_config({"num_bits": 8, "strategy": "channel"}, is_packed=False),
            *(8, _int_quantized),
            group_size=-1,
            int8_activations=True,
        ),
    }
)
