"""Reads the projections of a checkpoint: joined where they share an input, quantized where the
checkpoint or the user says so, packed as the backend wants them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from executor_svc.ops.interface import LinearWeight
from executor_svc.quantization.cache import PackedCache
from executor_svc.quantization.reader import ProjectionReader
from executor_svc.quantization.schemes import Scheme
from executor_svc.quantization.weight import QuantizedWeight, join_quantized
from executor_svc.weights import Checkpoint

logger = logging.getLogger(__name__)


class LinearPacker(Protocol):
    """The part of `Ops` that loading needs."""

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """See `Ops.prepare_linear`."""
        ...


@runtime_checkable
class QuantizingPacker(LinearPacker, Protocol):
    """A packer whose backend computes with quantized weights."""

    def prepare_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None = None
    ) -> LinearWeight:
        """Take a quantized projection [out, in] and bias [out] once, at load."""
        ...

    def quantize_linear(
        self, weight: Tensor, bias: Tensor | None = None, *, int8_activations: bool
    ) -> LinearWeight:
        """Round weight [out, in] to int8, with a scale for each output."""
        ...


@dataclass(frozen=True)
class Quantization:
    """How projections become quantized: `reader` knows a quantized checkpoint's format, `scheme`
    quantizes a float one at load; a `cache` saves doing either again.
    """

    reader: ProjectionReader | None = None
    scheme: Scheme | None = None
    cache: PackedCache | None = None


NO_QUANTIZATION = Quantization()


class ProjectionLoader:
    """One checkpoint's projections; a backend without quantized kernels gets them expanded."""

    def __init__(
        self, checkpoint: Checkpoint, packer: LinearPacker, quantization: Quantization
    ) -> None:
        self._checkpoint = checkpoint
        self._packer = packer
        self._quantizer = packer if isinstance(packer, QuantizingPacker) else None
        self._reader = quantization.reader
        self._scheme = quantization.scheme
        self._cache = quantization.cache

    def load(
        self,
        out_sizes: Mapping[str, int],
        in_size: int,
        *,
        has_bias: bool = False,
        is_head: bool = False,
    ) -> LinearWeight:
        """One projection out of those named in `out_sizes`, which read the same input."""
        key = "+".join(out_sizes)
        found = None if self._cache is None else self._cache.find(key)
        if found is not None:
            owned = tuple(f"{name}." for name in out_sizes)
            self._checkpoint.skip(lambda name: name.startswith(owned))
            return found
        parts = [self._read(name, size, in_size) for name, size in out_sizes.items()]
        bias = None
        if has_bias or self._has_stored_bias(out_sizes):
            stored = [self._checkpoint.take(f"{name}.bias", n) for name, n in out_sizes.items()]
            bias = torch.cat(stored)
        return self._prepare(key, parts, bias, is_head)

    def load_tied_head(self, embedding: Tensor) -> LinearWeight:
        """The embedding [vocab, hidden] as the output head."""
        key = "tied_head"
        found = None if self._cache is None else self._cache.find(key)
        return self._prepare(key, [embedding], None, is_head=True) if found is None else found

    def _read(self, name: str, out_size: int, in_size: int) -> Tensor | QuantizedWeight:
        if self._reader is not None:
            found = self._reader.read(self._checkpoint, name, out_size, in_size)
            if found is not None:
                return found
        return self._checkpoint.take(f"{name}.weight", out_size, in_size)

    def _has_stored_bias(self, out_sizes: Mapping[str, int]) -> bool:
        """Whether a quantizer gave biases, of zeros, to projections that have none."""
        return self._reader is not None and all(f"{n}.bias" in self._checkpoint for n in out_sizes)

    def _prepare(
        self, key: str, parts: list[Tensor | QuantizedWeight], bias: Tensor | None, is_head: bool
    ) -> LinearWeight:
        made = self._pack(key, parts, bias, is_head)
        if made.grid is not None and self._cache is not None:
            self._cache.keep(key, made)
        self._checkpoint.release_memory()
        return made

    def _pack(
        self, key: str, parts: list[Tensor | QuantizedWeight], bias: Tensor | None, is_head: bool
    ) -> LinearWeight:
        """The parts as one projection, quantized where they and the backend allow it."""
        quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
        if self._quantizer is None:
            return self._packer.prepare_linear(self._float(parts), bias)
        if self._scheme is not None and not quantized:
            # The head may be the embedding too, and decides the token: float activations.
            int8_activations = self._scheme.int8_activations and not is_head
            weight = self._float(parts)
            return self._quantizer.quantize_linear(weight, bias, int8_activations=int8_activations)
        joined = join_quantized(quantized) if len(quantized) == len(parts) else None
        if joined is not None:
            return self._quantizer.prepare_quantized(joined, bias)
        if quantized:
            logger.warning("%s differ in their quantization: expanded to float weights", key)
        return self._packer.prepare_linear(self._float(parts), bias)

    def _float(self, parts: list[Tensor | QuantizedWeight]) -> Tensor:
        tensors = [
            self._checkpoint.convert(part.dequantize())
            if isinstance(part, QuantizedWeight)
            else part
            for part in parts
        ]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
