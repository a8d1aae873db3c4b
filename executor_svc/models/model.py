"""What the executor's runner knows of a model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, KvSpec


class Model(Protocol):
    """A loaded decoder. It keeps no state between steps: the KV cache holds all of it."""

    @property
    def kv_spec(self) -> KvSpec: ...

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """Write the batch's keys and values, return logits [m, vocab_size] float32."""
        ...


@runtime_checkable
class GreedyModel(Model, Protocol):
    """A model that can name the likeliest tokens without its logits ever lying in memory."""

    def forward_greedy(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """As `forward`, but return the argmax of each row of logits, int64 [m].

        The first of equals, and a NaN before all else: numpy's rule, which the sampler has too.
        """
        ...
