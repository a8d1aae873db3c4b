"""The operators that a backend provides; models are written over this and nothing else.

T is the number of tokens of a step, H and K the query and key/value heads, D the head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv


@dataclass(frozen=True)
class QuantizationGrid:
    """What gives the packed codes of a quantized projection their values, in a backend's layout.

    `code` is the backend's name of the codes' type; `group_size` columns share a scale (0: all);
    column k works on column `order[k]` of the input.
    """

    code: int
    scales: Tensor
    offsets: Tensor | None = None
    order: Tensor | None = None
    group_size: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [part for part in (self.scales, self.offsets, self.order) if part is not None]


@dataclass(frozen=True)
class LinearWeight:
    """A projection as its backend wants it.

    `weight` [out, in] has the true shape always; a backend that packs keeps the values in
    `packed` and may leave a stand-in without storage here. `grid`: they are quantized.
    """

    weight: Tensor
    bias: Tensor | None = None
    packed: Tensor | None = None
    grid: QuantizationGrid | None = None

    @property
    def num_bytes(self) -> int:
        """What a step reads of it; a packed form of torch's own says nothing about itself."""
        values = self.weight if self.packed is None or self.packed.is_mkldnn else self.packed
        others = [self.bias] if self.bias is not None else []
        others += self.grid.tensors if self.grid is not None else []
        return values.numel() * values.itemsize + sum(other.nbytes for other in others)


@dataclass(frozen=True)
class AttentionParams:
    """How one layer attends.

    A token at position i sees the positions j <= i, and with a `sliding_window` w only
    j > i - w. Scores are `scale * q.k`, then `soft_cap * tanh(score / soft_cap)` if it is set.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None


class AttentionPlan(Protocol):
    """What all layers of one step share; each backend has its own kind."""

    @property
    def batch(self) -> ForwardBatch: ...


class Ops(Protocol):
    """Norms and softmax accumulate in float32; results have the dtype of the first input."""

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """Take weight [out, in] and bias [out] of a layer once, at load."""
        ...

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [T, in] -> [T, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise the last dimension of x, then scale by weight of that size."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return rms_norm(x + residual) and the sum itself."""
        ...

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first R of D dimensions, in the half-split layout of GPT-NeoX and Llama.

        query [T, H, D], key [T, K, D], cos and sin [T, R / 2] float32.
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> silu(first half) * second half, [T, I]."""
        ...

    def geglu(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> gelu(first half, tanh approximation) * second half, [T, I]."""
        ...

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> AttentionPlan:
        """Prepare, once a step, what `write_kv` and `paged_attention` need in every layer."""
        ...

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        """Store key and value [T, K, D] in the slots of the batch."""
        ...

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        """query [T, H, D] over each sequence's cached context -> [T, H, D].

        Gives no weight to a slot beyond a sequence's context length, whatever number it holds; only
        a recorded step on an NPU, which may read a few of them, minds NaN and infinity there.
        """
        ...


class QkNorms(NamedTuple):
    """Weights of the norms over each query and each key head: [D] both."""

    query: Tensor
    key: Tensor
    eps: float


@runtime_checkable
class RotaryAndWrite(Ops, Protocol):
    """Operators of a backend that rotates and stores in one kernel."""

    def rotary_and_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerKv,
        plan: AttentionPlan,
        norms: QkNorms | None,
    ) -> Tensor:
        """`rms_norm` of each head where there are `norms`, `rotary`, then `write_kv` of the key.

        Returns the rotated query.
        """
        ...
