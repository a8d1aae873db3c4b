"""AWQ checkpoints in the layout of its GEMM kernel, as AutoAWQ writes them.

  qweight [in, out / 8] int32, qzeros [groups, out / 8] int32, scales [groups, out]

Eight outputs of 4 bits share a word, output ORDER[i] of them in place i.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from executor_svc.quantization.int32_packing import center, unpack_columns
from executor_svc.quantization.reader import TensorSource
from executor_svc.quantization.weight import Layout, QuantizedWeight

BITS = 4
# Where output i of eight lies in its word: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
PLACE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqReader:
    """`group_size` -1: one group."""

    group_size: int

    def read(
        self, source: TensorSource, name: str, out_size: int, in_size: int
    ) -> QuantizedWeight | None:
        """See `ProjectionReader.read`."""
        if f"{name}.qweight" not in source:
            return None
        size = self.group_size if self.group_size > 0 else in_size
        groups, num_words = -(-in_size // size), out_size // len(PLACE_OF)
        codes = _unpack(source.stored(f"{name}.qweight", in_size, num_words))
        zeros = _unpack(source.stored(f"{name}.qzeros", groups, num_words))
        scales = source.stored(f"{name}.scales", groups, out_size).float().T
        return QuantizedWeight(
            Layout(BITS, size), codes.T.contiguous(), scales.contiguous(), zeros.T.float()
        )


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> centered codes [rows, out]."""
    places = unpack_columns(words, BITS).view(len(words), -1, len(PLACE_OF))
    return center(places[:, :, list(PLACE_OF)].reshape(len(words), -1), BITS)
