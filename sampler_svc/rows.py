"""What the sampler knows of each row as columns, so that a step's ends are found at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sampler_svc.request import Request
from stages.columns import Int32Array, i32
from stages.finish import NO_TOKEN, finish_reasons
from stages.messages import NewRow


class RowTable:
    """Struct-of-arrays over rows.

    Invariant: `requests[row]` is the request that holds the row or None; `is_live[row]` says that
    the request has not ended, `num_output[row]` how many tokens it has.
    """

    def __init__(self, num_rows: int) -> None:
        self.requests: list[Request | None] = [None] * num_rows
        self.request_ids = np.zeros(num_rows, dtype=np.uint64)
        self.is_live = np.zeros(num_rows, dtype=np.bool_)
        self.num_output = np.zeros(num_rows, dtype=np.int32)
        self._max_tokens = np.zeros(num_rows, dtype=np.int32)
        self._stop_token_ids = np.full((num_rows, 1), NO_TOKEN, dtype=np.int32)

    def take(self, new: NewRow, request: Request) -> None:
        """Give a row to a request."""
        row = request.row = new.row
        self.requests[row] = request
        self.request_ids[row] = new.request_id
        self.is_live[row] = True
        self.num_output[row] = len(new.token_ids) // 4 - new.num_prompt_tokens
        self._max_tokens[row] = new.params.max_tokens
        stop_token_ids = i32(new.params.stop_token_ids)
        self._widen(len(stop_token_ids))
        self._stop_token_ids[row] = NO_TOKEN
        self._stop_token_ids[row, : len(stop_token_ids)] = stop_token_ids

    def end(self, row: int) -> None:
        """The request in this row has ended; the row stays taken until the plan releases it."""
        self.is_live[row] = False

    def release(self, row: int) -> Request | None:
        """Make a row free; returns the request that held it."""
        request, self.requests[row] = self.requests[row], None
        self.is_live[row] = False
        return request

    def requests_of(self, rows: Int32Array) -> list[Request]:
        """The requests that hold these rows, all of them taken."""
        requests = [self.requests[row] for row in rows.tolist()]
        return [request for request in requests if request is not None]

    def append(self, rows: Int32Array, token_ids: Int32Array) -> NDArray[np.int8]:
        """Count one more token for each live row [n]; returns the `FinishReason` it brings."""
        self.num_output[rows] += 1
        return finish_reasons(
            token_ids,
            self.num_output[rows],
            self._max_tokens[rows],
            self._stop_token_ids[rows],
        )

    def _widen(self, width: int) -> None:
        missing = width - self._stop_token_ids.shape[1]
        if missing > 0:
            self._stop_token_ids = np.pad(
                self._stop_token_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN
            )
