"""What the executor's runner knows of a model."""

from __future__ import annotations

from typing import Protocol

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
