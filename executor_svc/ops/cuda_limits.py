"""What the CUDA kernels take, known without Triton: for those who only ask."""

from __future__ import annotations

# Wider heads do not fit a processor's shared memory beside a tile of keys and values.
MAX_HEAD_DIM = 256


def attention_obstacle(head_dim: int) -> str | None:
    """Why attention falls back to plain torch, if it does."""
    return f"heads of {head_dim} are beyond {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None
