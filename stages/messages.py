"""Every message that crosses a process border, one union per channel.

Rules: frozen, positional (`array_like`), tagged; fields are append-only with defaults; ids are
integers; token ids are little-endian int32 bytes (see `columns.py`); commands are imperative,
events are nouns or past participles. No message carries a tensor object or a pickle.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all messages: its tag is the class name, its body the fields in order."""


class FinishReason(IntEnum):
    """Why a request ended; 0 means that it has not."""

    NOT_FINISHED = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


# ── what a request is ────────────────────────────────────────────────────────────────────────


class ChatMessage(Message, frozen=True):
    """One turn of a conversation, its content parts already joined to one text."""

    role: str
    content: str
    name: str = ""


class TextPrompt(Message, frozen=True):
    """A prompt as text; `add_special_tokens` adds the tokenizer's BOS where it has one."""

    text: str
    add_special_tokens: bool = True


class ChatPrompt(Message, frozen=True):
    """A conversation to be rendered with the model's chat template."""

    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, bool | int | float | str] = {}


class TokenPrompt(Message, frozen=True):
    """A prompt as token ids (int32 bytes)."""

    token_ids: bytes


Prompt: TypeAlias = TextPrompt | ChatPrompt | TokenPrompt


class SamplingParams(Message, frozen=True):
    """How one request is sampled and where it ends.

    `max_tokens`: 0 asks for all that the context holds; the tokenizer stage replaces it by the true
    limit. `top_k`: 0 keeps all. `seed` is always set: the gateway draws one for a request that
    brings none (`is_seed_drawn`). `logprobs`/`prompt_logprobs`: -1 for none, else how many
    alternatives. `stop_token_ids` (int32 bytes): the user's; the tokenizer stage adds the model's
    end-of-sequence ids unless `ignore_eos`. `logit_bias_ids` (int32 bytes) and `logit_bias_values`
    (float32 bytes) are parallel columns. `bad_words`: texts that must not be generated; the
    tokenizer stage replaces them by token sequences: `bad_word_ids`, concatenated, and
    `bad_word_lens` (both int32 bytes). The last token of a sequence is forbidden where the outputs
    end in those before it.
    """

    max_tokens: int = 0
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int = -1
    prompt_logprobs: int = -1
    stop: list[str] = []
    stop_token_ids: bytes = b""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias_ids: bytes = b""
    logit_bias_values: bytes = b""
    echo: bool = False
    bad_words: list[str] = []
    bad_word_ids: bytes = b""
    bad_word_lens: bytes = b""
    is_seed_drawn: bool = False


# ── gateway → tokenizer ──────────────────────────────────────────────────────────────────────


class Generate(Message, frozen=True):
    """Run one request; the gateway sends it again, with the tokens so far, after a recovery.

    `output_token_ids` (int32 bytes): tokens that the gateway has received already; generation
    continues behind them. `priority`: lower runs earlier. `arrival_ns`: wall clock.
    """

    request_id: int
    epoch: int
    prompt: Prompt
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    arrival_ns: int = 0
    output_token_ids: bytes = b""


class AbortRequest(Message, frozen=True):
    """Stop working on a request; travels the same way as the request and so behind it."""

    request_id: int
    epoch: int


class Tokenize(Message, frozen=True):
    """Answer with the token ids of a prompt (`/tokenize`)."""

    request_id: int
    prompt: Prompt


class Detokenize(Message, frozen=True):
    """Answer with the text of token ids (`/detokenize`)."""

    request_id: int
    token_ids: bytes


# ── tokenizer → scheduler ────────────────────────────────────────────────────────────────────


class TokenizedRequest(Message, frozen=True):
    """A request ready for the scheduler: `params` complete, prompt known to fit the model.

    `prompt_token_ids`, `output_token_ids`: int32 bytes; the latter as in `Generate`.
    """

    request_id: int
    epoch: int
    prompt_token_ids: bytes
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    arrival_ns: int = 0
    output_token_ids: bytes = b""


# ── tokenizer or sampler → gateway ───────────────────────────────────────────────────────────


class RequestRejected(Message, frozen=True):
    """Terminal: the request ends in an error. `status` is the HTTP status, `param` the field."""

    request_id: int
    epoch: int
    status: int
    code: str
    message: str
    param: str = ""


class Tokenized(Message, frozen=True):
    """Answer to `Tokenize`: ids as int32 bytes, one string a token."""

    request_id: int
    token_ids: bytes
    token_strs: list[str]


class Detokenized(Message, frozen=True):
    """Answer to `Detokenize`."""

    request_id: int
    text: str


# ── scheduler → executor ranks and sampler (plan ring) ───────────────────────────────────────


class NewRow(Message, frozen=True):
    """A request takes a row. Valid until the row appears in `released_rows`.

    `token_ids` (int32 bytes): the prompt and behind it the outputs so far (a preempted or recovered
    request has some); `num_computed_tokens` of them have KV in `block_ids` (int32 bytes) already.
    `num_cached_tokens`: how many of the prompt came from the prefix cache at first admission.
    """

    row: int
    request_id: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    block_ids: bytes
    params: SamplingParams


class ExecuteStep(Message, frozen=True):
    """One forward pass, as a difference to the last one. All columns are int32 bytes.

    Applied in field order: `released_rows` become free; `new_rows` take theirs; `block_ids[i]` is
    appended to the block table of `block_rows[i]`; `stopped_rows` leave the set of decoding rows
    and `started_rows` join it. Then the step computes one token for every decoding row, in
    ascending row order, and behind them `prefill_lens[i]` tokens of `prefill_rows[i]`. A token is
    sampled for every decoding row and for every prefill row whose known tokens are then all
    computed.
    """

    step_id: int
    released_rows: bytes = b""
    new_rows: list[NewRow] = []
    block_rows: bytes = b""
    block_ids: bytes = b""
    stopped_rows: bytes = b""
    started_rows: bytes = b""
    prefill_rows: bytes = b""
    prefill_lens: bytes = b""


class EndRequests(Message, frozen=True):
    """These requests end for a reason that is not in their tokens; the sampler tells the gateway.

    `request_ids`: uint64 bytes; `reasons`: int8 bytes of `FinishReason`. A request that has no row
    (never admitted, or preempted) may be among them; one that ended by itself is not told twice.
    """

    request_ids: bytes
    reasons: bytes


class RejectRequest(Message, frozen=True):
    """The scheduler refuses a request that can never run; the sampler tells the gateway."""

    request_id: int
    status: int
    code: str
    message: str
    param: str = ""


# ── executor → sampler (logits ring, placement `process`) ────────────────────────────────────


class StepLogits(Message, frozen=True):
    """Logits of one step: `logits` is float32 [len(rows), vocab_size], row-major bytes."""

    step_id: int
    rows: bytes
    vocab_size: int
    logits: bytes


# ── executor or sampler → scheduler, sampler, executor (token ring) ──────────────────────────


class StepTokens(Message, frozen=True):
    """The tokens of one step. `rows`, `token_ids`: int32 bytes, parallel, in the plan's order."""

    step_id: int
    rows: bytes
    token_ids: bytes


class StepLogprobs(Message, frozen=True):
    """Log-probabilities of sampled tokens; comes before the `StepTokens` of its step.

    For the rows that asked: `logprobs` float32 [n] of the sampled token, `ranks` int32 [n]
    (1 = most likely), `num_top` int32 [n], then `top_ids` int32 and `top_logprobs` float32,
    concatenated over rows.
    """

    step_id: int
    rows: bytes
    logprobs: bytes
    ranks: bytes
    num_top: bytes
    top_ids: bytes
    top_logprobs: bytes


class StepPromptLogprobs(Message, frozen=True):
    """Log-probabilities of prompt tokens `start .. start + n` of one row (n = len(logprobs) / 4).

    Columns as in `StepLogprobs`, `num_top` the same for every token. Position 0 has none.
    """

    step_id: int
    row: int
    start: int
    logprobs: bytes
    ranks: bytes
    num_top: int
    top_ids: bytes
    top_logprobs: bytes


# ── sampler → scheduler ──────────────────────────────────────────────────────────────────────


class FinishRequest(Message, frozen=True):
    """The text of a request ended it (stop string); the scheduler takes its row back."""

    request_id: int
    epoch: int


# ── sampler → gateway ────────────────────────────────────────────────────────────────────────


class RequestStarted(Message, frozen=True):
    """A request got its row: its counts for `usage`, and the prompt's text if it asked for echo."""

    request_id: int
    epoch: int
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_text: str = ""


class TopLogprob(Message, frozen=True):
    """One alternative: its text, its bytes (a token may be part of a character), its logprob."""

    token: str
    token_bytes: bytes
    token_id: int
    logprob: float


class TokenLogprob(Message, frozen=True):
    """One sampled (or prompt) token with its alternatives, most likely first."""

    token: str
    token_bytes: bytes
    token_id: int
    logprob: float
    rank: int
    top: list[TopLogprob]


class OutputLogprobs(Message, frozen=True):
    """Log-probabilities of the next tokens of a request; precedes their `TextOutputs`."""

    request_id: int
    epoch: int
    tokens: list[TokenLogprob]


class PromptLogprobs(Message, frozen=True):
    """Log-probabilities of the whole prompt, sent before the first `TextOutputs`.

    Nothing predicts the first token: its entry has rank 0 and no alternatives.
    """

    request_id: int
    epoch: int
    tokens: list[TokenLogprob]


class TextOutputs(Message, frozen=True):
    """What one step gave, for all requests at once.

    `request_ids` uint64 bytes [n]; `num_tokens` int32 bytes [n]; `token_ids` int32 bytes,
    concatenated; `deltas` [n] texts (may be '' while a character or a stop string is undecided);
    `finish_reasons` int8 bytes [n]; `stop_reasons`: for each *finished* request in order, the stop
    string or stop token id that ended it, or None.
    """

    epoch: int
    request_ids: bytes
    num_tokens: bytes
    token_ids: bytes
    deltas: list[str]
    finish_reasons: bytes
    stop_reasons: list[str | int | None]


# ── HTTP handlers ↔ the gateway's core (same process; messages so that it can be replayed) ───


class OpenRequest(Message, frozen=True):
    """A client wants this request (epoch and output ids not yet set)."""

    generate: Generate


class CloseRequest(Message, frozen=True):
    """The client of this request has left."""

    request_id: int


class Resend(Message, frozen=True):
    """Tell the pipeline the open requests again.

    `unanswered_only`: only those of which nothing was heard (the tokenizer died); otherwise all
    (a new epoch has begun).
    """

    epoch: int
    unanswered_only: bool


class Flush(Message, frozen=True):
    """Deliver the text that has come and is held: it is time to write to clients again."""


# ── supervisor ↔ stages (control socket, descriptors ride along) ─────────────────────────────


class Configure(Message, frozen=True):
    """First message to a stage: the whole configuration (`ServerConfig` as msgpack).

    `cpus`: the processors that it runs on; none: those that it has.
    """

    config: bytes
    incarnation: int
    cpus: list[int] = []


class ExecutorFacts(Message, frozen=True):
    """What only the executor knows once the model is loaded.

    `num_blocks` counts block 0, the null block, which is never given out.
    """

    num_blocks: int = 0
    block_size: int = 0
    vocab_size: int = 0
    incarnation: int = 0


class RingEnd(Message, frozen=True):
    """One end of a ring that comes with `BeginEpoch`: its geometry and how many descriptors.

    `role` is 'writer' or the reader's index as text; `geometry` is what `shm.ring` serialises.
    """

    name: str
    role: str
    geometry: bytes
    num_fds: int


class BeginEpoch(Message, frozen=True):
    """Forget every request and go on with these rings; sent at start and after every death.

    Messages of an older epoch are dropped from here on. `facts.incarnation` tells the scheduler
    whether the executor's KV cache still holds what it held.
    """

    epoch: int
    facts: ExecutorFacts
    rings: list[RingEnd] = []


class ResendUnanswered(Message, frozen=True):
    """To the gateway: the tokenizer was restarted."""


class StageState(Message, frozen=True):
    """One stage as `headrace status`, `/health` and `/metrics` see it."""

    stage: str
    pid: int
    incarnation: int
    is_ready: bool
    heartbeat_ns: int
    progress: int
    queue_len: int
    stats: dict[str, float] = {}


class GroupState(Message, frozen=True):
    """To the gateway, once a second and on every change: the state of all stages."""

    epoch: int
    stages: list[StageState]


class Drain(Message, frozen=True):
    """To the gateway: take no new requests; answer `Drained` when none is open."""

    deadline_ns: int


class Stop(Message, frozen=True):
    """End now, exit code 0."""


class StageReady(Message, frozen=True):
    """The stage has loaded what it needs and waits for `BeginEpoch`."""

    stage: str
    pid: int
    facts: ExecutorFacts = ExecutorFacts()


class EpochBegun(Message, frozen=True):
    """The stage has forgotten the old epoch and works in this one."""

    stage: str
    epoch: int


class Heartbeat(Message, frozen=True):
    """Once a second: `progress` counts what the stage has finished, `queue_len` what waits."""

    stage: str
    progress: int
    queue_len: int
    stats: dict[str, float] = {}


class Drained(Message, frozen=True):
    """From the gateway: no request is open."""


class StageFailed(Message, frozen=True):
    """The last words of a stage before it exits non-zero."""

    stage: str
    text: str


# ── one union per channel ────────────────────────────────────────────────────────────────────

TokenizerInbound: TypeAlias = Generate | AbortRequest | Tokenize | Detokenize
SchedulerInbound: TypeAlias = TokenizedRequest | AbortRequest | FinishRequest
GatewayInbound: TypeAlias = (
    RequestRejected
    | Tokenized
    | Detokenized
    | RequestStarted
    | OutputLogprobs
    | PromptLogprobs
    | TextOutputs
)
PlanRecord: TypeAlias = ExecuteStep | EndRequests | RejectRequest
LogitsRecord: TypeAlias = StepLogits | StepPromptLogprobs
TokenRecord: TypeAlias = StepTokens | StepLogprobs | StepPromptLogprobs
ToStage: TypeAlias = Configure | BeginEpoch | ResendUnanswered | GroupState | Drain | Stop
FromStage: TypeAlias = StageReady | EpochBegun | Heartbeat | Drained | StageFailed
