"""The operators one by one on the compiled kernels: what tests and benchmarks take apart.

A server runs the native families through `FusedDecoder`, a whole step in one call.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.interface import AttentionParams, AttentionPlan, LinearWeight
from executor_svc.ops.native import abi
from executor_svc.ops.native.describe import describe_batch, describe_cache, describe_linear
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.packing import Packer
from executor_svc.ops.reference import ReferencePlan


class NativeOps:
    """Inputs of any dtype are widened to float32, results narrowed to the first input's."""

    def __init__(self, library: Library, num_threads: int = 1) -> None:
        self.functions = library.functions
        self._packer = Packer(library)
        self.pool = library.functions.headrace_engine_pool(library.start_engine(self, num_threads))

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        return self._packer.prepare_linear(weight, bias)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        (num_tokens, in_size), wide = x.shape, _float32(x)
        out = torch.empty(num_tokens, weight.weight.shape[0])
        space = torch.empty(self.functions.headrace_linear_workspace(num_tokens, in_size))
        self.functions.headrace_linear(
            self.pool,
            byref(describe_linear(weight)),
            wide.data_ptr(),
            num_tokens,
            out.data_ptr(),
            space.data_ptr(),
        )
        return out.to(x.dtype)

    def choose_tokens(
        self, x: Tensor, head: LinearWeight, screen: Tensor | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        """The argmax of the soft-capped (0: not) logits of each row, int64 [rows], and never the
        logits; with a `screen` (see `make_screen`) or without it is the same.
        """
        wide, linear, num_rows = _float32(x), byref(describe_linear(head)), len(x)
        tokens = torch.empty(num_rows, dtype=torch.int64)
        space = torch.empty(self.functions.headrace_greedy_workspace(linear, num_rows))
        self.functions.headrace_choose_tokens(
            self.pool,
            linear,
            None if screen is None else screen.data_ptr(),
            soft_cap,
            wide.data_ptr(),
            num_rows,
            tokens.data_ptr(),
            space.data_ptr(),
        )
        return tokens

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, scale = _float32(x), _float32(weight)
        out, size = torch.empty_like(wide), x.shape[-1]
        self.functions.headrace_rms_norm(
            wide.data_ptr(), scale.data_ptr(), eps, x.numel() // size, size, out.data_ptr()
        )
        return out.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self._gated(0, gate_up)

    def geglu(self, gate_up: Tensor) -> Tensor:
        return self._gated(1, gate_up)

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> ReferencePlan:
        return ReferencePlan(batch)

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        shape = abi.Attention(num_kv_heads=key.shape[1], head_dim=key.shape[2])
        wide_key, wide_value = _float32(key), _float32(value)
        self.functions.headrace_write_kv(
            byref(describe_cache([cache])),
            byref(shape),
            plan.batch.slot_mapping.data_ptr(),
            key.shape[0],
            wide_key.data_ptr(),
            wide_value.data_ptr(),
        )

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        wide, batch = _float32(query), abi.Batch()
        describe_batch(plan.batch, batch)
        shape = abi.Attention(
            query.shape[1],
            cache.key.shape[1],
            query.shape[2],
            params.sliding_window or 0,
            params.scale,
            params.soft_cap or 0.0,
        )
        functions, out = self.functions, torch.empty_like(wide)
        size = functions.headrace_attention_workspace(self.pool, byref(shape), byref(batch))
        space = torch.empty(size)
        functions.headrace_attention(
            self.pool,
            byref(shape),
            byref(describe_cache([cache])),
            byref(batch),
            wide.data_ptr(),
            out.data_ptr(),
            space.data_ptr(),
        )
        return out.to(query.dtype)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = heads.float().clone(memory_format=torch.contiguous_format)
        num_tokens, num_heads, head_dim = heads.shape
        angles = torch.cat([cos, sin], dim=-1)
        self.functions.headrace_rotary(
            angles.data_ptr(), cos.shape[-1], num_tokens, num_heads, head_dim, out.data_ptr()
        )
        return out.to(heads.dtype)

    def _gated(self, activation: int, gate_up: Tensor) -> Tensor:
        wide, size = _float32(gate_up), gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size)
        self.functions.headrace_gated_activation(
            activation, wide.data_ptr(), out.numel() // size, size, out.data_ptr()
        )
        return out.to(gate_up.dtype)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
