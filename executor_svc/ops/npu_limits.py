"""What CANN's fused kernels take, as the documentation of torch_npu 2.13 says it; no torch_npu."""

from __future__ import annotations

from typing import NamedTuple

import torch

from executor_svc.ops.interface import AttentionParams

BLOCK_SIZE = 128
HEAD_DIM = 128
MAX_HEADS = 256
MAX_GROUP = 64
# Keys of one query in the layout of recorded steps.
MAX_RECORDED_LEN = 262_144
FUSED_DTYPES = frozenset({torch.float16, torch.bfloat16})


class AttentionShape(NamedTuple):
    """One layer's attention as the kernel sees it; `head_dim` with its padding."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype


def cache_head_dim(head_dim: int) -> int:
    """The head size that the cache stores: the kernel takes 128, smaller heads are padded."""
    return HEAD_DIM if head_dim < HEAD_DIM else head_dim


def attention_obstacle(
    shape: AttentionShape,
    params: AttentionParams,
    fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES,
) -> str | None:
    """Why npu_fused_infer_attention_score (TND, block table) cannot take it, or None."""
    if params.soft_cap is not None:
        return "soft cap on the scores"
    if shape.head_dim != HEAD_DIM:
        return f"heads of {shape.head_dim}"
    if shape.dtype not in fused_dtypes:
        return f"{shape.dtype} keys and values".removeprefix("torch.")
    if shape.block_size != BLOCK_SIZE:
        return f"blocks of {shape.block_size}"
    if shape.num_heads > MAX_HEADS or shape.num_heads > MAX_GROUP * shape.num_kv_heads:
        return f"{shape.num_heads} heads over {shape.num_kv_heads}"
    return None


def norm_obstacle(dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    """Why npu_add_rms_norm cannot take it, or None."""
    return None if dtype == weight_dtype else "weights of another type than the sum's"
