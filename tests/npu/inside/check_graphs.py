"""NPUGraph on the emulator: capture, replay, streams joined by events, task-group update."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.npu.inside.paged import PagedCall


def test_a_replay_reads_its_inputs_anew() -> None:
    x = torch.zeros(4, device="npu")
    weight = torch.eye(4).npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = (x @ weight) * 2 + 1
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.cpu().eq(2 * value + 1).all()


def test_copies_with_pinned_memory_are_captured() -> None:
    host_in, host_out = torch.ones(4, pin_memory=True), torch.zeros(4, pin_memory=True)
    x = torch.zeros(4, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        x.copy_(host_in, non_blocking=True)
        host_out.copy_(x + 1, non_blocking=True)
    host_in.fill_(7)
    graph.replay()
    torch.npu.synchronize()
    assert host_out.eq(8).all()


def test_graphs_share_a_pool() -> None:
    x, pool, graphs, results = (
        torch.ones(1 << 18, device="npu"),
        torch.npu.graph_pool_handle(),
        [],
        [],
    )
    torch.npu.synchronize()
    for factor in (2, 3):
        graphs.append(torch.npu.NPUGraph())
        with torch.npu.graph(graphs[-1], pool=pool):
            results.append((x * factor).sum())
    for graph, result, factor in zip(graphs, results, (2, 3), strict=True):
        graph.replay()
        assert result.item() == factor * (1 << 18)


def test_a_side_stream_joins_the_capture() -> None:
    x, side = torch.ones(4, device="npu"), torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        y = x + 1
        side.wait_stream(main)
        with torch.npu.stream(side):
            z = y * 10
        w = y * 100
        main.wait_stream(side)
        total = z + w
    for value in (1.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert total.cpu().eq(110 * (value + 1)).all()


def test_an_event_behind_a_replay() -> None:
    x = torch.zeros(4, device="npu")
    graph, done = torch.npu.NPUGraph(), torch.npu.Event()
    with torch.npu.graph(graph):
        x += 1
    for _ in range(3):
        graph.replay()
    done.record()
    done.synchronize()
    assert x.cpu().eq(3).all()


class CapturedAttention:
    """One attention call captured as a task group, as vLLM-Ascend captures it."""

    def __init__(self, call: PagedCall) -> None:
        self.arguments = call.arguments()
        names = ("actual_seq_lengths", "actual_seq_lengths_kv")
        self.lengths = {name: self.arguments.pop(name) for name in names}
        lengths = self.lengths
        query = self.arguments["query"]
        self.out = [torch.empty_like(query), torch.empty(1, dtype=torch.float32, device="npu")]
        ask = torch_npu._npu_fused_infer_attention_score_get_max_workspace
        self.workspace = ask(**self.arguments, **lengths)
        self.may_run = torch.npu.ExternalEvent()
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            self.may_run.wait(stream)
            self.may_run.reset(stream)
            torch.npu.graph_task_group_begin(stream)
            self._launch(lengths)
            self.handle = torch.npu.graph_task_group_end(stream)
            self.doubled = self.out[0] * 2
        self.update_stream = torch.npu.Stream()

    def _launch(self, lengths: dict[str, list[int]]) -> None:
        run = torch_npu.npu_fused_infer_attention_score.out
        run(**self.arguments, **lengths, workspace=self.workspace, out=self.out)

    def replay(self, seq_lens: list[int]) -> Tensor:
        self.graph.replay()
        with torch.npu.stream(self.update_stream):
            torch.npu.graph_task_update_begin(self.update_stream, self.handle)
            self._launch(self.lengths | {"actual_seq_lengths_kv": seq_lens})
            torch.npu.graph_task_update_end(self.update_stream)
            self.may_run.record(self.update_stream)
        torch.npu.synchronize()
        return self.doubled.float().cpu()


def test_lengths_are_updated_between_replays() -> None:
    captured = CapturedAttention(PagedCall([1, 1], [140, 9]))
    for seq_lens in ([140, 9], [141, 10], [200, 3], [140, 9]):
        call = PagedCall([1, 1], [256, 256])
        longest = PagedCall([1, 1], [140, 9])
        call.key, call.value, call.query = longest.key, longest.value, longest.query
        call.block_table, call.seq_lens = longest.block_table, seq_lens
        expected = 2 * call.expected()[0]
        torch.testing.assert_close(captured.replay(seq_lens), expected, rtol=2e-2, atol=4e-2)


def test_updates_on_the_stream_of_the_replays_need_no_event() -> None:
    """Each replay sees the lengths that were set between it and the one before."""
    call = PagedCall([1, 1], [200, 90])
    arguments = call.arguments()
    names = ("actual_seq_lengths", "actual_seq_lengths_kv")
    lengths = {name: arguments.pop(name) for name in names}
    out = [torch.empty_like(arguments["query"]), torch.empty(1, device="npu")]
    ask = torch_npu._npu_fused_infer_attention_score_get_max_workspace
    workspace = ask(**arguments, **lengths)
    run, graph = torch_npu.npu_fused_infer_attention_score.out, torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch.npu.graph_task_group_begin(torch.npu.current_stream())
        run(**arguments, **lengths, workspace=workspace, out=out)
        handle = torch.npu.graph_task_group_end(torch.npu.current_stream())
    stream, results = torch.npu.current_stream(), []
    steps = [[200, 90], [201, 3], [7, 90], [256, 128]]
    for seq_lens in steps:
        torch.npu.graph_task_update_begin(stream, handle)
        own = lengths | {"actual_seq_lengths_kv": seq_lens}
        run(**arguments, **own, workspace=workspace, out=out)
        torch.npu.graph_task_update_end(stream)
        graph.replay()
        results.append(out[0].clone())
    for result, seq_lens in zip(results, steps, strict=True):
        call.seq_lens = seq_lens
        expected = call.expected()[0]
        torch.testing.assert_close(result.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_an_update_with_another_operator_is_refused() -> None:
    captured = CapturedAttention(PagedCall([1, 1], [140, 9]))
    stream, x = captured.update_stream, torch.ones(4, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, captured.handle)
        x.add_(1)
        with pytest.raises(
            RuntimeError, match="task group update: aclnnInplaceAdds in the place of"
        ):
            torch.npu.graph_task_update_end(stream)
        torch.npu.graph_task_update_begin(stream, captured.handle)
        with pytest.raises(RuntimeError, match="0 tasks for a group of 1"):
            torch.npu.graph_task_update_end(stream)
