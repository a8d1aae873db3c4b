"""Codes of 4 or 8 bits side by side in int32 words, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> unsigned codes [rows, n * 32 / bits] as uint8."""
    rows, num_words = words.shape
    codes = torch.empty(rows, num_words, 32 // bits, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for place in range(32 // bits):  # one at a time: only a slice exists as int32
        codes[:, :, place] = (words >> (place * bits)) & mask
    return codes.view(rows, -1)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [n, columns] -> unsigned codes [n * 32 / bits, columns] as uint8."""
    num_words, columns = words.shape
    codes = torch.empty(num_words, 32 // bits, columns, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for place in range(32 // bits):
        codes[:, place] = (words >> (place * bits)) & mask
    return codes.view(-1, columns)


def center(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes -> signed ones as int8: the middle becomes 0."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
