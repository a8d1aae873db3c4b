"""Enqueues one step on the device: rows, forward pass, sampling. Waits for nothing.

A step of decoding rows alone is a recorded graph where there is one for its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from executor_svc.accelerator.device import PADDING_LEN, DecodeOutput, Device
from executor_svc.accelerator.first_step import make_sampler
from executor_svc.accelerator.graphs import DecodeGraphs, GraphCounts, batch_buckets
from executor_svc.accelerator.results import LaunchedStep, StepResult, bring_down
from executor_svc.accelerator.rows import DeviceRows
from executor_svc.accelerator.transfers import Transfers
from executor_svc.kv_cache import KvCache
from executor_svc.models.model import Model
from executor_svc.rows import PromptSpan, RowTable
from sampler_svc.sampling import LogprobColumns, prompt_logprobs
from stages.columns import i32
from stages.config import ServerConfig
from stages.messages import ExecuteStep, StepTokens
from stages.persistent_batch import StepRows


class _Forward(NamedTuple):
    """`logits` float32 [m + p, vocab]: of the rows `sampled_rows` int64 [m], then of `spans`.

    `started`: a timing event before its first kernel. `likeliest`: tokens int64 [m] that the model
    chose itself, and that its next step starts from unless others are sampled.
    """

    started: Any
    logits: Tensor
    sampled_rows: Tensor
    spans: list[PromptSpan]
    likeliest: Tensor | None = None


class StepLauncher:
    """The rows of one device, on the host and there, and its recorded graphs."""

    def __init__(
        self,
        config: ServerConfig,
        device: Device,
        model: Model,
        kv_cache: KvCache,
        no_graphs_because: str | None = None,
        transfers: Transfers | None = None,
    ) -> None:
        """Record the graphs. `no_graphs_because`: run every step eagerly, for this reason.

        `transfers`: the device's streams, if it has them already.
        """
        self.transfers = transfers or Transfers(device, config.parallel_streams)
        self.counts = GraphCounts()
        self._config = config
        self._device = device
        self._model = model
        self._kv_cache = kv_cache
        self._samples_here = config.sampling_placement == "device"
        self._rows = DeviceRows(
            config.max_num_seqs, config.max_model_len, kv_cache.block_size, self.transfers
        )
        self._no_graphs_because = no_graphs_because
        self._graphs = None if no_graphs_because else self._record_graphs()
        self.forget()

    def forget(self) -> None:
        """Free every row; called when nothing is being computed."""
        config = self._config
        self._table = RowTable(config.max_num_seqs, config.max_model_len, self._kv_cache.block_size)
        self._sampler = make_sampler(config, self._device, self.transfers)
        with self.transfers.on_compute():
            self._rows.set_decoding(np.zeros(0, dtype=np.int32))

    def has_inputs(self, step: ExecuteStep) -> bool:
        """Whether the tokens that `step` starts from have come."""
        return self._table.has_inputs(step)

    def receive_tokens(self, message: StepTokens) -> None:
        """Take tokens that were sampled elsewhere."""
        self._table.receive_tokens(message)

    def note_tokens(self, result: StepResult) -> None:
        """Know the tokens of a step that have come down: what rows that lag may sample needs them.

        A row's next owner is admitted by a plan that was made behind the row's last tokens.
        """
        if result.token_ids is not None:
            self._sampler.note_tokens(result.rows, result.token_ids.numpy())

    @torch.inference_mode()
    def launch(self, step: ExecuteStep) -> LaunchedStep:
        """Enqueue a step and the copy of its result."""
        with self.transfers.on_compute():
            rows, changes = self._table.advance(step)
            self._rows.change_tables(changes)
            forward = self._mixed(rows) if len(step.prefill_rows) else self._decode(rows)
            result = self._result(step, rows, forward)
            ended = self._note_time()
            num_tokens = int(rows.num_scheduled.sum())
            return bring_down(result, num_tokens, forward.started, ended, self.transfers)

    # ── forward passes ───────────────────────────────────────────────────────────────────────

    def _mixed(self, rows: StepRows) -> _Forward:
        """Prefill chunks beside decoding rows, laid out by the host."""
        inputs = self._table.inputs(rows)
        started = self._note_time()
        self.counts.count_eager("prompt_logprobs" if inputs.prompt_spans else "prefill")
        batch, sampled_rows = self._rows.place_batch(inputs, rows, self._samples_here)
        logits = self._model.forward(batch, self._kv_cache)
        return _Forward(started, logits, sampled_rows, inputs.prompt_spans)

    def _decode(self, rows: StepRows) -> _Forward:
        num_rows = len(rows.rows)
        self._rows.set_decoding(rows.rows)
        if not self._samples_here:
            token_ids = self._table.last_token_ids(rows.rows)
            self._rows.set_last_tokens_from_host(rows.rows, token_ids)
        seq_lens = rows.num_computed + 1
        captured = self._graphs.of(num_rows) if self._graphs else None
        decoding = self._rows.decoding(num_rows)
        if captured is None:
            self.counts.count_eager(self._no_graphs_because or "batch_beyond_buckets")
            started = self._note_time()
            logits = self._decode_eagerly(num_rows, seq_lens.tolist())
            return _Forward(started, logits, decoding, [])
        self.counts.num_replayed += 1
        captured.set_lengths(seq_lens)
        started = self._note_time()
        captured.replay()
        logits, likeliest = (part[:num_rows] for part in captured.output)
        return _Forward(started, logits, decoding, [], likeliest)

    def _note_time(self) -> Any:
        event = self._device.timing_event()
        event.record(self.transfers.compute)
        return event

    def _decode_eagerly(
        self, num_rows: int, seq_lens: Sequence[int], is_static: bool = False
    ) -> Tensor:
        batch = self._rows.decode_batch(num_rows, seq_lens, is_static)
        logits = self._model.forward(batch, self._kv_cache)
        self._rows.advance_decoding(num_rows)
        return logits

    @torch.inference_mode()
    def _record_graphs(self) -> DecodeGraphs:
        def decode(bucket: int) -> DecodeOutput:
            logits = self._decode_eagerly(bucket, (PADDING_LEN,) * bucket, is_static=True)
            likeliest = logits.argmax(dim=-1)
            self._rows.set_last_tokens(self._rows.decoding(bucket), likeliest)
            return DecodeOutput(logits, likeliest)

        stream, buckets = self.transfers.compute, batch_buckets(self._config.max_num_seqs)
        with self.transfers.on_compute():
            return DecodeGraphs(self._device, stream, buckets, decode, self._rows.capacity)

    # ── results ──────────────────────────────────────────────────────────────────────────────

    def _result(self, step: ExecuteStep, rows: StepRows, forward: _Forward) -> StepResult:
        self._sampler.release(i32(step.released_rows))
        for new in step.new_rows:
            self._sampler.admit(new)
        sampled_rows = rows.sampled_rows
        result = StepResult(step.step_id, sampled_rows, prompts=self._prompts(forward))
        logits = forward.logits[: len(sampled_rows)]
        if not self._samples_here:
            self._table.await_tokens(step.step_id, sampled_rows)
            # A graph's next replay may begin before this has come down.
            return replace(result, logits=logits.clone())
        if not len(sampled_rows):
            return replace(result, token_ids=forward.sampled_rows)
        if forward.likeliest is not None and not self._sampler.needs_logits(sampled_rows):
            # A copy, since the next replay may begin before this has come down.
            sampled = self._sampler.take_greedy(forward.likeliest.clone(), sampled_rows)
            return replace(result, token_ids=sampled.token_ids)
        sampled = self._sampler.sample(logits, sampled_rows)
        self._rows.set_last_tokens(forward.sampled_rows, sampled.token_ids)
        return replace(result, token_ids=sampled.token_ids, logprobs=sampled.logprobs)

    def _prompts(self, forward: _Forward) -> list[tuple[PromptSpan, LogprobColumns]]:
        return [(span, self._prompt_columns(span, forward.logits)) for span in forward.spans]

    def _prompt_columns(self, span: PromptSpan, logits: Tensor) -> LogprobColumns:
        next_token_ids = self.transfers.upload(span.next_token_ids.astype(np.int64))
        own = logits[span.first_logit : span.first_logit + len(next_token_ids)]
        return prompt_logprobs(own, next_token_ids, span.num_top)
