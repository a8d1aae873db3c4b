"""Reads `quantization_config` of config.json: the format of a checkpoint, if it is one we serve.

Every refusal names the field, what is served, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from executor_svc.model_config import ConfigFields, ModelLoadError
from executor_svc.quantization.awq import AwqReader
from executor_svc.quantization.compressed_tensors import CompressedTensorsReader
from executor_svc.quantization.gptq import GptqReader
from executor_svc.quantization.reader import ProjectionReader

SERVED = "gptq, awq and compressed-tensors with int4 or int8 weights"
PACKED, UNPACKED = "pack-quantized", "int-quantized"


def make_reader(config: ConfigFields) -> ProjectionReader:
    """The reader of a checkpoint with this `quantization_config`.

    Raises:
        ModelLoadError: the format, or a setting of it, is not served.
    """
    method = config.string("quant_method", default="")
    parse = _METHODS.get(method)
    if parse is None:
        raise _refusal(config, "quant_method", f"{method!r}", SERVED)
    return parse(config)


def _gptq(config: ConfigFields) -> ProjectionReader:
    stored = config.string("checkpoint_format", default="gptq")
    if stored not in ("gptq", "gptq_v2") or config.boolean("is_marlin_format", False):
        raise _refusal(config, "checkpoint_format", f"{stored!r}", "gptq and gptq_v2")
    if config.find("dynamic"):
        raise _refusal(config, "dynamic", "set", "checkpoints with one setting for all layers")
    bits = _bits(config, "bits", (4, 8))
    return GptqReader(bits, _group_size(config, bits), 1 if stored == "gptq" else 0)


def _awq(config: ConfigFields) -> ProjectionReader:
    version = config.string("version", default="gemm").lower()
    if version != "gemm":
        raise _refusal(config, "version", f"{version!r}", "gemm")
    if not config.boolean("zero_point", True):
        raise _refusal(config, "zero_point", "false", "checkpoints with zero points")
    bits = _bits(config, "bits", (4,), "w_bit")
    return AwqReader(_group_size(config, bits, "q_group_size"))


def _compressed_tensors(config: ConfigFields) -> ProjectionReader:
    stored = config.string("format", default=PACKED)
    if stored not in (PACKED, UNPACKED):
        raise _refusal(config, "format", f"{stored!r}", f"{PACKED} and {UNPACKED}")
    groups = config.nested("config_groups")
    if groups is None:
        raise config.error("config_groups", "is missing: it must say how weights are quantized")
    bits, int8_activations = set(), set()
    for name in groups.values:
        group = groups.nested(name)
        weights = None if group is None else group.nested("weights")
        if group is None or weights is None:
            raise groups.error(name, "must have 'weights' that are quantized")
        bits.add(_weight_bits(weights, stored))
        int8_activations.add(_has_int8_activations(group))
    if len(bits) != 1 or len(int8_activations) != 1:
        raise _refusal(config, "config_groups", "of several kinds", "one kind for all layers")
    return CompressedTensorsReader(bits.pop(), int8_activations.pop())


def _weight_bits(weights: ConfigFields, stored: str) -> int:
    kind = weights.string("type", default="int")
    if kind != "int":
        raise _refusal(weights, "type", f"{kind!r}", "int")
    strategy = weights.string("strategy", default="channel")
    if strategy not in ("tensor", "channel", "group"):
        raise _refusal(weights, "strategy", f"{strategy!r}", "tensor, channel and group")
    if stored == UNPACKED and not weights.boolean("symmetric", True):
        raise _refusal(weights, "symmetric", "false", f"symmetric weights in {UNPACKED}")
    return _bits(weights, "num_bits", (4, 8) if stored == PACKED else (8,))


def _has_int8_activations(group: ConfigFields) -> bool:
    """Whether the input of these layers is rounded too, in the one way that we do it."""
    inputs = group.nested("input_activations")
    if inputs is None:
        return False
    _bits(inputs, "num_bits", (8,))
    if inputs.string("type", default="int") != "int":
        raise _refusal(inputs, "type", "not int", "int")
    if inputs.find("dynamic") is not True or not inputs.boolean("symmetric", True):
        raise _refusal(inputs, "dynamic", "false or asymmetric", "dynamic, symmetric activations")
    return True


def _bits(config: ConfigFields, name: str, served: tuple[int, ...], alias: str = "") -> int:
    found = config.integer(name, *([alias] if alias else []))
    if found not in served:
        raise _refusal(config, name, str(found), " and ".join(map(str, served)))
    return found


def _group_size(config: ConfigFields, bits: int, alias: str = "") -> int:
    size = config.integer("group_size", *([alias] if alias else []), default=128)
    if size == 0 or size < -1 or (bits == 4 and size % 2 and size != -1):
        raise config.error("group_size", f"must be even and positive, or -1, not {size}")
    return size


def _refusal(config: ConfigFields, name: str, found: str, served: str) -> ModelLoadError:
    return ModelLoadError(
        f"{config.source}: '{name}' is {found}, served is {served}; use such a release of the "
        "model, or the unquantized one with --quantization int8"
    )


_METHODS: Mapping[str, Callable[[ConfigFields], ProjectionReader]] = MappingProxyType(
    {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
)
