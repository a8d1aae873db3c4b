"""Recorded decode steps of an NPU: the graph, and the attention calls in it whose bounds change.

Each attention call is a task group of the graph. Its bounds are set by launching it again between
`graph_task_update_begin` and `_end`, in the order of the compute stream: behind the replay before,
ahead of the next ("update tasks and then execute the tasks in the model instance in sequence",
CANN 9.0, Task Update). So no event is needed, and a step whose bounds hold costs the host nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor_svc.accelerator.device import PADDING_LEN, DecodeOutput
from stages.columns import Int32Array

# Steps for which new bounds hold.
HEADROOM = 64
# Keys a row, on average, that a step may read in vain before the bounds are set anew.
MAX_EXCESS = 128


class LengthBounds:
    """Invariant: no row of the last `fit` is longer than its bound; int32 [rows]."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        """`capacity`: the longest context, and what the rows are recorded with."""
        self._capacity = capacity
        self.values: Int32Array = np.full(num_rows, capacity, dtype=np.int32)

    def fit(self, seq_lens: Int32Array) -> bool:
        """Make them hold for the first rows' lengths; whether they had to change."""
        num_rows = len(seq_lens)
        own = self.values[:num_rows]
        excess = int(self.values.sum()) - int(seq_lens.sum())
        if excess <= MAX_EXCESS * num_rows and (seq_lens <= own).all():
            return False
        own[:] = np.minimum(seq_lens + HEADROOM, self._capacity)
        self.values[num_rows:] = PADDING_LEN
        return True


@dataclass(frozen=True)
class AttentionTask:
    """One recorded call: what it was given but for its lengths, none longer than `capacity`.

    The graph owns the memory of its tensors; what is kept here are references that hold none.
    """

    handle: Any
    arguments: dict[str, Any]
    capacity: int

    def set_bounds(self, stream: Any, bounds: Int32Array) -> None:
        """Replace its lengths for the replays that follow on the stream."""
        lengths = np.minimum(bounds, self.capacity).tolist()
        module = torch.get_device_module("npu")
        module.graph_task_update_begin(stream, self.handle)
        _attention().out(**self.arguments, actual_seq_lengths_kv=lengths)
        module.graph_task_update_end(stream)


class TaskRecorder:
    """Implements `AttentionRecorder`: while the stream captures, each call becomes a task."""

    def __init__(self, stream: Any) -> None:
        self.tasks: list[AttentionTask] = []
        self._stream = stream
        self._module: Any = torch.get_device_module("npu")
        self._weak_ref: Any = import_module("torch_npu")._C._weak_ref_tensor

    def attend(self, arguments: dict[str, Any], capacity: int) -> Tensor:
        """See `AttentionRecorder`; ahead of the capture it only calls, with rows of padding."""
        query: Tensor = arguments["query"]
        if not self._module.is_current_stream_capturing():
            own_tokens = [PADDING_LEN] * len(query)
            out: Tensor = _attention()(**arguments, actual_seq_lengths_kv=own_tokens)[0]
            return out
        lengths = [capacity] * len(query)
        outputs = [torch.empty_like(query), query.new_empty(1, dtype=torch.float32)]
        # As large as any lengths need, since the lengths will change.
        workspace = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace(
            **arguments, actual_seq_lengths_kv=lengths
        )
        arguments = {**arguments, "workspace": workspace, "out": outputs}
        self._module.graph_task_group_begin(self._stream)
        _attention().out(**arguments, actual_seq_lengths_kv=lengths)
        handle = self._module.graph_task_group_end(self._stream)
        self.tasks.append(AttentionTask(handle, self._without_memory(arguments), capacity))
        return outputs[0]

    def _without_memory(self, arguments: dict[str, Any]) -> dict[str, Any]:
        def kept(value: Any) -> Any:
            if isinstance(value, list):
                return [self._weak_ref(part) for part in value]
            return self._weak_ref(value) if isinstance(value, Tensor) else value

        return {name: kept(value) for name, value in arguments.items()}


class NpuGraph:
    """Implements `Captured`."""

    def __init__(
        self,
        graph: Any,
        output: DecodeOutput,
        tasks: list[AttentionTask],
        stream: Any,
        bounds: LengthBounds,
    ) -> None:
        self.output = output
        self._graph = graph
        self._tasks = tasks
        self._stream = stream
        self._bounds = bounds

    def set_lengths(self, seq_lens: Int32Array) -> None:
        """See `Captured`."""
        if self._bounds.fit(seq_lens):
            for task in self._tasks:
                task.set_bounds(self._stream, self._bounds.values)

    def replay(self) -> None:
        """See `Captured`."""
        self._graph.replay()


def _attention() -> Any:
    return torch.ops.npu.npu_fused_infer_attention_score
