"""Tensors as the structures that the kernels take. Nothing here keeps a tensor alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import LayerKv
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native import abi

DTYPE_CODES: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
)


def describe_linear(weight: LinearWeight) -> abi.Linear:
    """Name a projection that `Packer` packed."""
    assert weight.packed is not None
    out_size, in_size = weight.weight.shape
    linear = abi.Linear(
        panels=weight.packed.data_ptr(),
        bias=_pointer(weight.bias),
        out_size=out_size,
        in_size=in_size,
    )
    if weight.grid is None:
        linear.dtype = DTYPE_CODES[weight.packed.dtype]
        return linear
    linear.dtype = weight.grid.code
    linear.scales = _pointer(weight.grid.scales)
    linear.offsets = _pointer(weight.grid.offsets)
    linear.order = _pointer(weight.grid.order)
    linear.group_size = weight.grid.group_size
    return linear


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def describe_cache(layers: Sequence[LayerKv]) -> abi.Cache:
    """Name the layers of one cache."""
    pairs = [abi.LayerCache(layer.key.data_ptr(), layer.value.data_ptr()) for layer in layers]
    num_blocks, _, block_size, _ = layers[0].key.shape
    dtype = DTYPE_CODES[layers[0].key.dtype]
    return abi.Cache((abi.LayerCache * len(pairs))(*pairs), num_blocks, block_size, dtype)


def describe_batch(batch: ForwardBatch, into: abi.Batch) -> None:
    """Fill `into` in place, all but its logits: this runs once a step."""
    tables = batch.block_tables
    into.token_ids = batch.token_ids.data_ptr()
    into.positions = batch.positions.data_ptr()
    into.slots = batch.slot_mapping.data_ptr()
    into.query_start = batch.query_start.data_ptr()
    into.seq_lens = batch.seq_lens.data_ptr()
    into.block_tables = tables.data_ptr()
    into.logits_indices = batch.logits_indices.data_ptr()
    into.num_tokens = batch.token_ids.shape[0]
    into.num_seqs = tables.shape[0]
    into.table_stride = tables.stride(0)
    into.num_logits = batch.logits_indices.shape[0]
