"""What chooses the tokens of a step from its logits, and which way a device takes."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.logprobs import LogprobColumns
from sampler_svc.native.head import NativeHead
from sampler_svc.native.library import load_library
from sampler_svc.sampling_rows import ChoiceColumns
from sampler_svc.torch_head import TorchHead
from sampler_svc.uploads import Upload
from stages.native_library import AUTO, TORCH, LibraryUnavailable

logger = logging.getLogger(__name__)


class SamplingHead(Protocol):
    """Holds no state of requests: a token depends on its row of logits and of columns alone."""

    def choose(
        self, logits: Tensor, columns: ChoiceColumns, uniforms: NDArray[np.float64]
    ) -> Tensor:
        """Choose a token for each row: int64 [m] on the device of the logits.

        Greedy rows take the likeliest, the first among equals; the others are drawn as draw.py
        says.
        logits: float32 [m, vocab], never written to; columns: the same object as long as the rows
        are the same; uniforms: float64 [m] in [0, 1), which greedy rows ignore.
        """
        ...

    def token_logprobs(
        self, logits: Tensor, token_ids: Tensor, places: NDArray[np.int64], num_top: int
    ) -> LogprobColumns:
        """Log-probabilities of tokens int64 [m] under logits float32 [m, vocab], at `places` only.

        places: int64 [n] on the host, ascending; num_top: how many alternatives of each, at most.
        """
        ...


def make_sampling_head(
    device: torch.device, vocab_size: int, num_threads: int, upload: Upload, kernels: str = AUTO
) -> SamplingHead:
    """The compiled sampling head on a CPU that has it, torch everywhere else.

    `kernels`: the name of a build, auto or torch; raises ConfigError if there is no such build.
    """
    if device.type != "cpu" or kernels == TORCH:
        return TorchHead(upload)
    try:
        library = load_library(choice=kernels)
    except LibraryUnavailable as unavailable:
        logger.warning("sampling on torch, much slower than it could be: %s", unavailable)
        return TorchHead(upload)
    return NativeHead(library, vocab_size, num_threads)
