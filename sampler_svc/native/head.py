"""The compiled sampling head: a step's tokens, and their log-probabilities, in one call each."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.logprobs import LogprobColumns
from sampler_svc.native.abi import Choice, Logprobs
from sampler_svc.native.library import SamplingLibrary
from sampler_svc.sampling_rows import ChoiceColumns


class NativeHead:
    """A `SamplingHead` for logits on the CPU; not thread-safe, as one step uses all threads.

    A row's token depends on the row alone. Builds for different processors round exp()
    differently, so that near a boundary they may choose different tokens.
    """

    def __init__(self, library: SamplingLibrary, vocab_size: int, num_threads: int) -> None:
        self._functions = library.functions
        self._head = library.start_head(self, num_threads, vocab_size)
        self._vocab_size = vocab_size
        self._columns: ChoiceColumns | None = None
        self._choice = Choice(vocab_size=vocab_size)

    def choose(
        self, logits: Tensor, columns: ChoiceColumns, uniforms: NDArray[np.float64]
    ) -> Tensor:
        """See `SamplingHead.choose`."""
        if columns is not self._columns:
            self._bind(columns)
        num_rows = self._choice.num_rows
        logits = self._dense_rows(logits)
        assert logits.shape[0] == num_rows
        assert uniforms.shape == (num_rows,) and uniforms.dtype == np.float64
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        self._choice.logits = logits.data_ptr()
        self._choice.stride = logits.stride(0)
        self._choice.uniforms = uniforms.ctypes.data
        self._choice.token_ids = token_ids.data_ptr()
        self._functions.sampling_choose_tokens(self._head, byref(self._choice))
        return token_ids

    def token_logprobs(
        self, logits: Tensor, token_ids: Tensor, places: NDArray[np.int64], num_top: int
    ) -> LogprobColumns:
        """See `SamplingHead.token_logprobs`."""
        logits = self._dense_rows(logits)
        num_tokens, num_top = len(places), min(num_top, self._vocab_size)
        chosen = token_ids.numpy()[places]
        assert places.dtype == chosen.dtype == np.int64
        columns = LogprobColumns(
            torch.empty(num_tokens),
            torch.empty(num_tokens, dtype=torch.int32),
            torch.empty(num_tokens, num_top, dtype=torch.int32),
            torch.empty(num_tokens, num_top),
        )
        query = Logprobs(
            logits=logits.data_ptr(),
            rows=places.ctypes.data,
            token_ids=chosen.ctypes.data,
            logprobs=columns.logprobs.data_ptr(),
            ranks=columns.ranks.data_ptr(),
            top_ids=columns.top_ids.data_ptr(),
            top_logprobs=columns.top_logprobs.data_ptr(),
            num_tokens=num_tokens,
            num_top=num_top,
            stride=logits.stride(0),
            vocab_size=self._vocab_size,
        )
        self._functions.sampling_logprobs(self._head, byref(query))
        return columns

    def _bind(self, columns: ChoiceColumns) -> None:
        """Point at the columns, which stay as they are while the rows stay."""
        self._columns = columns
        self._choice.temperatures = columns.temperatures.ctypes.data
        self._choice.min_p = columns.min_p.ctypes.data
        self._choice.top_k = columns.top_k.ctypes.data
        self._choice.top_p = columns.top_p.ctypes.data
        self._choice.num_rows = len(columns.temperatures)

    def _dense_rows(self, logits: Tensor) -> Tensor:
        """Rows may lie anywhere, but the logits of each lie side by side."""
        assert logits.shape[1] == self._vocab_size and logits.dtype == torch.float32
        return logits if logits.stride(1) == 1 else logits.contiguous()
