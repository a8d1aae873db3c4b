"""Plans for an executor without a scheduler: prompts in chunks, then one token a row and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from stages.columns import i32_bytes
from stages.messages import ExecuteStep, NewRow, SamplingParams


class Chunk(NamedTuple):
    """Positions [start, end) of one row that a step computes."""

    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Workload:
    """What one round does: `batch_size` prompts of `input_len` tokens, `output_len` tokens each.

    Prompts are computed in steps of at most `token_budget` tokens, as a server would.
    """

    input_len: int
    output_len: int
    batch_size: int
    block_size: int
    token_budget: int
    vocab_size: int

    @property
    def blocks_per_row(self) -> int:
        return -(-(self.input_len + self.output_len) // self.block_size)

    @property
    def num_blocks(self) -> int:
        """KV blocks that it takes, the null block included."""
        return 1 + self.batch_size * self.blocks_per_row

    def prefill_steps(self) -> Iterator[list[Chunk]]:
        """What each step computes of the prompts; the budget goes to the first rows first."""
        left, chunks = self.token_budget, list[Chunk]()
        for row in range(self.batch_size):
            start = 0
            while start < self.input_len:
                end = min(self.input_len, start + left)
                chunks.append(Chunk(row, start, end))
                left -= end - start
                start = end
                if left == 0:
                    yield chunks
                    left, chunks = self.token_budget, []
        if chunks:
            yield chunks

    def decode_steps(self) -> Iterator[list[Chunk]]:
        """What each step decodes; the first token of a row comes from its prefill."""
        for end in range(self.input_len + 1, self.input_len + self.output_len):
            yield [Chunk(row, end - 1, end) for row in range(self.batch_size)]


class Plans:
    """The plans of one round after another, as a scheduler would publish them."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        self._random = Random(seed)
        self._rows = i32_bytes(range(workload.batch_size))
        self._num_steps = 0

    def prefill(self) -> Iterator[ExecuteStep]:
        """Release the rows of the round before, then compute new prompts."""
        released = self._rows if self._num_steps else b""
        new_rows = self._new_rows()
        for chunks in self._workload.prefill_steps():
            yield ExecuteStep(
                self._next_id(),
                released_rows=released,
                new_rows=new_rows,
                prefill_rows=i32_bytes(chunk.row for chunk in chunks),
                prefill_lens=i32_bytes(chunk.end - chunk.start for chunk in chunks),
            )
            released, new_rows = b"", []

    def decode(self) -> Iterator[ExecuteStep]:
        """One token for every row, until all have theirs."""
        started = self._rows
        for _ in self._workload.decode_steps():
            yield ExecuteStep(self._next_id(), started_rows=started)
            started = b""

    def _next_id(self) -> int:
        self._num_steps += 1
        return self._num_steps

    def _new_rows(self) -> list[NewRow]:
        """Rows whose blocks lie scattered, as after a server's first hours."""
        size = self._workload.num_blocks - 1
        blocks = self._random.sample(range(1, size + 1), size)
        return [self._new_row(row, blocks) for row in range(self._workload.batch_size)]

    def _new_row(self, row: int, blocks: Sequence[int]) -> NewRow:
        workload, count = self._workload, self._workload.blocks_per_row
        prompt = self._random.choices(range(workload.vocab_size), k=workload.input_len)
        return NewRow(
            row=row,
            request_id=row + 1,
            token_ids=i32_bytes(prompt),
            num_prompt_tokens=workload.input_len,
            num_computed_tokens=0,
            num_cached_tokens=0,
            block_ids=i32_bytes(blocks[row * count : (row + 1) * count]),
            params=SamplingParams(temperature=0.0),
        )
