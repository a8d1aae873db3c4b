"""The emulated device: takes its time as an accelerator does, and no processor of this machine.

Its tokens are a pure function of the prompt and the outputs so far that a test can predict, so
that order, ends and recovery are checked through the whole pipeline. Knows no torch and no clock.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from stages.columns import Int32Array, f32_bytes, i32, i32_bytes
from stages.config import ServerConfig
from stages.messages import (
    BeginEpoch,
    ExecuteStep,
    ExecutorFacts,
    Message,
    NewRow,
    StepLogits,
    StepLogprobs,
    StepTokens,
)
from stages.model_folder import model_path
from stages.persistent_batch import PersistentBatch, StepRows
from stages.trace import Trace, What

# The logit of the token that the device wants; all others have 0.
WANTED_LOGIT = 100.0
_NO_LOGPROBS = -1
# A piece of byte-level BPE or SentencePiece, with the mark of a space before it or without.
_WORD = re.compile("[\u0120\u2581]?[A-Za-z0-9]+")


def predict_tokens(
    prompt: Sequence[int], num_tokens: int, choices: Int32Array, outputs: Sequence[int] = ()
) -> list[int]:
    """The `num_tokens` tokens that the device gives behind `prompt` and `outputs`.

    `choices`: see `token_choices`. An end is not looked for: a request ends where its stop tokens,
    its stop strings or its length say so.
    """
    digest = np.array([prompt_digest(i32_bytes(prompt))], dtype=np.uint64)
    token_ids = [*prompt, *outputs]
    for _ in range(num_tokens):
        previous = np.array(token_ids[-1:], dtype=np.int32)
        position = np.array([len(token_ids)], dtype=np.int32)
        token_ids.append(int(next_tokens(digest, previous, position, choices)[0]))
    return token_ids[len(prompt) + len(outputs) :]


def token_choices(vocab_size: int, excluded: Iterable[int]) -> Int32Array:
    """The ids that the device gives, ascending: int32 [k]; all but `excluded`."""
    choices: Int32Array = np.setdiff1d(
        np.arange(vocab_size, dtype=np.int32), np.fromiter(excluded, dtype=np.int32)
    )
    return choices


def prompt_digest(prompt_token_ids: bytes) -> int:
    """What the tokens of a request depend on besides each other; takes int32 bytes."""
    return zlib.crc32(prompt_token_ids)


def next_tokens(
    digests: NDArray[np.uint64], previous: Int32Array, positions: Int32Array, choices: Int32Array
) -> Int32Array:
    """The token at each of `positions` [n], behind the token `previous` [n]: int32 [n].

    It hangs on the token before it, so one that is lost, doubled or out of order shows in all
    that follow. The mixing is the finalizer of SplitMix64 (Steele et al. 2014).
    """
    x = digests << np.uint64(32) ^ positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= previous.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    token_ids: Int32Array = choices[x % np.uint64(len(choices))]
    return token_ids


class Timeline:
    """When the device computes what.

    Steps run one after the other, in the order of their launches, whenever somebody comes to
    look: each begins when it is launched or when the one before it ends, whichever is later.
    """

    def __init__(self, step_ms: float, token_us: float) -> None:
        self._step_ns = step_ms * 1e6
        self._token_ns = token_us * 1e3
        self._end_ns = 0

    def launch(self, num_tokens: int, now_ns: int) -> tuple[int, int]:
        """Append a step; returns when it begins and ends."""
        start_ns = max(now_ns, self._end_ns)
        self._end_ns = start_ns + round(self._step_ns + self._token_ns * num_tokens)
        return start_ns, self._end_ns


@dataclass(frozen=True)
class PlannedStep:
    """A step that has arrived, with its rows; `num_tokens`: those that it computes."""

    step: ExecuteStep
    rows: StepRows
    num_tokens: int


class EmulatedExecutorStage:
    """Implements `stages.stage.TimedStage`.

    A step is launched when the tokens that it reads are on the device: at once in placement
    `device`, where they never leave it, and in placement `process` when the sampler's have come.
    Its result is said once its time is over. Samples greedily whatever the parameters; the
    sampled token has log-probability 0, prompt log-probabilities are not given.
    """

    def __init__(self, config: ServerConfig, choices: Int32Array, trace: Trace) -> None:
        """`choices`: the ids that it may give; `trace` takes the interval of each step."""
        self._config = config
        self._choices = choices
        self._trace = trace
        self._samples_here = config.sampling_placement == "device"
        self._timeline = Timeline(config.emulated_step_ms, config.emulated_token_us)
        self._num_steps = 0
        self._num_tokens = 0
        self._forget()

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Free every row; what the device computes at this moment it computes for nobody."""
        self._forget()

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Launch what can be launched, and say the results that are due; see `Stage.handle`."""
        for message in messages:
            if isinstance(message, ExecuteStep):
                self._waiting.append(self._read(message))
            elif isinstance(message, StepTokens) and not self._samples_here:
                rows = i32(message.rows)
                self._last_token_ids[rows] = i32(message.token_ids)
                self._awaits_token[rows] = False
            while self._waiting and self._has_inputs(self._waiting[0]):
                self._launch(self._waiting.popleft(), now_ns)
        said: list[Message] = []
        while self._running and self._running[0][0] <= now_ns:
            said += self._running.popleft()[1]
            self._num_steps += 1
        return said

    def wakeup_ns(self) -> int | None:
        """When the oldest running step ends; see `TimedStage`."""
        return self._running[0][0] if self._running else None

    def progress(self) -> int:
        """Steps done."""
        return self._num_steps

    def queue_len(self) -> int:
        """Steps that wait for tokens or run."""
        return len(self._waiting) + len(self._running)

    def stats(self) -> dict[str, float]:
        """See `Stage.stats`."""
        return {
            "executor_steps_total": self._num_steps,
            "executor_tokens_total": self._num_tokens,
        }

    def _forget(self) -> None:
        num_rows = self._config.max_num_seqs
        self._waiting: deque[PlannedStep] = deque()
        # When each step ends, and what is said then.
        self._running: deque[tuple[int, list[Message]]] = deque()
        self._batch = PersistentBatch(num_rows)
        self._digests = np.zeros(num_rows, dtype=np.uint64)
        self._last_token_ids = np.zeros(num_rows, dtype=np.int32)
        self._num_logprobs = np.full(num_rows, _NO_LOGPROBS, dtype=np.int32)
        self._awaits_token = np.zeros(num_rows, dtype=np.bool_)

    def _read(self, step: ExecuteStep) -> PlannedStep:
        rows = self._batch.apply(step)
        return PlannedStep(step, rows, int(rows.num_scheduled.sum()))

    def _has_inputs(self, planned: PlannedStep) -> bool:
        """No token that the step reads, or whose row it gives away, is still at the sampler."""
        new_rows = [new.row for new in planned.step.new_rows]
        return not (
            self._awaits_token[planned.rows.rows].any() or self._awaits_token[new_rows].any()
        )

    def _launch(self, planned: PlannedStep, now_ns: int) -> None:
        step, rows = planned.step, planned.rows
        for new in step.new_rows:
            self._admit(new)
        start_ns, end_ns = self._timeline.launch(planned.num_tokens, now_ns)
        self._trace.record(What.DEVICE, step.step_id, planned.num_tokens, start_ns, end_ns)
        self._num_tokens += planned.num_tokens
        self._running.append((end_ns, self._compute(step.step_id, rows)))

    def _admit(self, new: NewRow) -> None:
        self._digests[new.row] = prompt_digest(new.token_ids[: 4 * new.num_prompt_tokens])
        self._last_token_ids[new.row] = i32(new.token_ids)[-1]
        self._num_logprobs[new.row] = new.params.logprobs

    def _compute(self, step_id: int, step_rows: StepRows) -> list[Message]:
        rows = step_rows.sampled_rows
        context_lens = (step_rows.num_computed + step_rows.num_scheduled)[step_rows.sampled]
        previous = self._last_token_ids[rows]
        token_ids = next_tokens(self._digests[rows], previous, context_lens, self._choices)
        if not self._samples_here:
            self._awaits_token[rows] = True
            return [self._logits(step_id, rows, token_ids)]
        self._last_token_ids[rows] = token_ids
        tokens = StepTokens(step_id, i32_bytes(rows), i32_bytes(token_ids))
        return [*self._logprobs(step_id, rows, token_ids), tokens]

    def _logits(self, step_id: int, rows: Int32Array, token_ids: Int32Array) -> StepLogits:
        vocab_size = self._config.facts.vocab_size
        logits = np.zeros((len(rows), vocab_size), dtype=np.float32)
        logits[np.arange(len(rows)), token_ids] = WANTED_LOGIT
        return StepLogits(step_id, i32_bytes(rows), vocab_size, f32_bytes(logits))

    def _logprobs(
        self, step_id: int, rows: Int32Array, token_ids: Int32Array
    ) -> list[StepLogprobs]:
        """For the rows that want any: certainty, and at most the token itself as alternative."""
        wants = self._num_logprobs[rows] != _NO_LOGPROBS
        if not wants.any():
            return []
        num_top = np.minimum(self._num_logprobs[rows[wants]], 1)
        top_ids = token_ids[wants][num_top > 0]
        return [
            StepLogprobs(
                step_id,
                rows=i32_bytes(rows[wants]),
                logprobs=f32_bytes(np.zeros(len(num_top))),
                ranks=i32_bytes(np.ones(len(num_top))),
                num_top=i32_bytes(num_top),
                top_ids=i32_bytes(top_ids),
                top_logprobs=f32_bytes(np.zeros(len(top_ids))),
            )
        ]


def emulated_facts(config: ServerConfig, incarnation: int) -> ExecutorFacts:
    """Blocks for every row at full length, unless `--num-blocks` says otherwise."""
    blocks_per_row = -(-config.max_model_len // config.block_size)
    num_blocks = config.num_blocks or config.max_num_seqs * blocks_per_row + 1
    return ExecutorFacts(num_blocks, config.block_size, config.facts.vocab_size, incarnation)


def load_choices(config: ServerConfig) -> Int32Array:
    """The ids of a model's tokenizer that are plain words or parts of words: int32 [k], ascending.

    So each token has a text of its own, and none ends a request that nobody asked to end. Without
    tokenizer.json: all ids of the vocabulary but the end-of-sequence ids.
    """
    vocab_size = config.facts.vocab_size
    path = model_path(config) / "tokenizer.json"
    if not path.is_file():
        return token_choices(vocab_size, config.facts.eos_token_ids)
    tokenizer = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    special = {token.id for token in tokenizer.added_tokens} | set(config.facts.eos_token_ids)
    vocab = tokenizer.model.vocab
    pieces = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
    words = (token_id for piece, token_id in pieces if _WORD.fullmatch(piece))
    return np.array(
        sorted(token_id for token_id in words if token_id < vocab_size and token_id not in special),
        dtype=np.int32,
    )


class _AddedToken(msgspec.Struct):
    id: int


class _TokenizerModel(msgspec.Struct):
    """`vocab`: piece → id, or (piece, score) by id."""

    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(msgspec.Struct):
    model: _TokenizerModel
    added_tokens: list[_AddedToken] = []
