"""The state of all rows on the device: a decode step reads and advances it there.

Only differences are written from the host; in steady decode there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor_svc.accelerator.transfers import Transfers
from executor_svc.batch import ForwardBatch
from executor_svc.rows import StepInputs, TableChanges
from stages.columns import Int32Array
from stages.persistent_batch import StepRows

# The tensors of a batch, all of which travel.
_TENSORS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "seq_lens",
    "block_tables",
    "logits_indices",
)


class DeviceRows:
    """Tables over all rows, and behind them the null row, which fills a batch up to its bucket.

    Invariant: the null row has position 0 and only the null block, so what it computes lands there.
    """

    def __init__(
        self, max_num_rows: int, max_model_len: int, block_size: int, transfers: Transfers
    ) -> None:
        self._null_row = max_num_rows
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._transfers = transfers
        width = -(-max_model_len // block_size)
        num_rows = max_num_rows + 1
        with transfers.on_compute():
            self._last_token_ids = transfers.zeros(num_rows)
            self._num_computed = transfers.zeros(num_rows)
            self._block_tables = transfers.zeros(num_rows, width, dtype=torch.int32)
            self._decoding = transfers.zeros(max_num_rows) + self._null_row
            self._tokens_before = transfers.upload(np.arange(num_rows, dtype=np.int32))
        self._decoding_host: Int32Array = np.zeros(0, dtype=np.int32)

    @property
    def capacity(self) -> int:
        """Tokens that a row's block table has places for."""
        return self._block_tables.shape[1] * self._block_size

    def change_tables(self, changes: TableChanges) -> None:
        """Write the block table entries that a step sets."""
        if len(changes.places):
            places, block_ids = self._transfers.upload_all([changes.places, changes.block_ids])
            self._block_tables.view(-1).index_copy_(0, places, block_ids)

    def set_decoding(self, rows: Int32Array) -> None:
        """Name the rows of the decode steps that follow, in the order of their batch."""
        if np.array_equal(rows, self._decoding_host):
            return
        self._decoding_host = rows
        padded = np.full(len(self._decoding), self._null_row, dtype=np.int64)
        padded[: len(rows)] = rows
        self._decoding.copy_(self._transfers.upload(padded))

    def decode_batch(self, num_rows: int, seq_lens: Sequence[int], is_static: bool) -> ForwardBatch:
        """The next decode step of the first `num_rows` decoding rows, computed on the device.

        `seq_lens`: context lengths, this step's token included. `is_static`: for a capture, whose
        shapes must do for any of them.
        """
        rows = self._decoding[:num_rows]
        positions = self._num_computed.index_select(0, rows)
        tables = self._block_tables.index_select(0, rows)
        max_seq_len = self._max_model_len if is_static else max(seq_lens)
        width = -(-max_seq_len // self._block_size)
        return ForwardBatch(
            token_ids=self._last_token_ids.index_select(0, rows),
            positions=positions,
            slot_mapping=self._slots(tables, positions),
            query_start=self._tokens_before[: num_rows + 1],
            seq_lens=(positions + 1).int(),
            block_tables=tables if is_static else tables[:, :width].contiguous(),
            logits_indices=self._tokens_before[:num_rows].long(),
            query_lens_host=(1,) * num_rows,
            seq_lens_host=tuple(seq_lens),
            max_query_len=1,
            max_seq_len=max_seq_len,
            num_decode_rows=num_rows,
        )

    def advance_decoding(self, num_rows: int) -> None:
        """Count the token of each of the first `num_rows` decoding rows as computed."""
        rows = self._decoding[:num_rows]
        is_real = (rows < self._null_row).long()
        advanced = self._num_computed.index_select(0, rows) + is_real
        self._num_computed.index_copy_(0, rows, advanced)

    def decoding(self, num_rows: int) -> Tensor:
        """The first `num_rows` decoding rows: int64 [num_rows]."""
        return self._decoding[:num_rows]

    def place_batch(
        self, inputs: StepInputs, rows: StepRows, takes_last: bool
    ) -> tuple[ForwardBatch, Tensor]:
        """A batch of any shape from the host, and its sampled rows int64 [m], on the device.

        Counts its tokens as computed. `takes_last`: the decoding rows' tokens are those that the
        device has sampled.
        """
        batch = inputs.batch
        columns = [getattr(batch, name).numpy() for name in _TENSORS]
        *tensors, all_rows, sampled_rows, num_computed = self._transfers.upload_all(
            [
                *columns,
                *(column.astype(np.int64) for column in (rows.rows, inputs.sampled_rows)),
                batch.seq_lens.numpy().astype(np.int64),
            ]
        )
        self._num_computed.index_copy_(0, all_rows, num_computed)
        on_device: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
        placed = replace(batch, **on_device)
        if takes_last and rows.num_decoding:
            last = self._last_token_ids.index_select(0, all_rows[: rows.num_decoding])
            placed.token_ids[: rows.num_decoding].copy_(last)
        return placed, sampled_rows

    def set_last_tokens(self, rows: Tensor, token_ids: Tensor) -> None:
        """The next decode step of these rows starts from these tokens: int64 [n] both."""
        self._last_token_ids.index_copy_(0, rows, token_ids)

    def set_last_tokens_from_host(self, rows: Int32Array, token_ids: Int32Array) -> None:
        """As `set_last_tokens`, for tokens that were sampled elsewhere."""
        columns = [column.astype(np.int64) for column in (rows, token_ids)]
        self.set_last_tokens(*self._transfers.upload_all(columns))

    def _slots(self, tables: Tensor, positions: Tensor) -> Tensor:
        places = positions.div(self._block_size, rounding_mode="floor")
        blocks = tables.gather(1, places.unsqueeze(1)).squeeze(1)
        return positions + (blocks - places) * self._block_size
