"""The sampler stage: turns the tokens of each step into text, ends and counts for the gateway.

Owns every request's text until it ends. In placement `process` it also samples. No I/O but the
tokenizer file, read once; torch is imported for placement `process` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sampler_svc.detokenizer import Detokenizer
from sampler_svc.logprob_texts import prompt_logprobs_of, sampled_logprobs
from sampler_svc.outputs import Ending, StopReason, endings_outputs, step_outputs
from sampler_svc.request import Request
from sampler_svc.rows import RowTable
from sampler_svc.step_order import Plan, Result, StepOrder
from stages.columns import Int32Array, i8, i32, u64
from stages.config import ServerConfig
from stages.messages import (
    BeginEpoch,
    EndRequests,
    ExecuteStep,
    FinishReason,
    FinishRequest,
    Message,
    NewRow,
    OutputLogprobs,
    PromptLogprobs,
    RejectRequest,
    RequestRejected,
    RequestStarted,
    StepLogits,
    StepLogprobs,
    StepPromptLogprobs,
    StepTokens,
)
from stages.model_folder import model_path

if TYPE_CHECKING:
    from sampler_svc.host_sampler import HostSampler

_NO_EPOCH = -1


class SamplerStage:
    """Implements `stages.stage.Stage`.

    Invariant: `_requests` holds what has been told to the gateway and has not ended; `_ended` those
    whose end the gateway knows and whose row the scheduler has not released yet, so that none ends
    twice. What is said depends on the order within each ring, never on how the rings raced.
    """

    def __init__(self, config: ServerConfig, detokenizer: Detokenizer | None = None) -> None:
        self._config = config
        self._detokenizer = detokenizer or Detokenizer.from_model_folder(model_path(config))
        self._eos_token_ids = frozenset(config.facts.eos_token_ids)
        self._num_steps = 0
        self._num_tokens = 0
        self._num_dropped = 0
        self._num_finished = dict.fromkeys(FinishReason, 0)
        self._forget(_NO_EPOCH)

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Forget every request."""
        self._num_dropped += self._order.num_dropped
        self._forget(message.epoch)

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Take records of the rings, in the order of each; see `Stage.handle`."""
        said: list[Message] = []
        for message in messages:
            match message:
                case ExecuteStep() | EndRequests():
                    self._order.add_plan(message)
                case StepTokens() | StepLogits() | StepLogprobs() | StepPromptLogprobs():
                    self._order.add_result(message)
                case RejectRequest():
                    said.append(self._reject(message))
                case _:
                    self._num_dropped += 1
        for record in self._order.drain():
            said += self._follow(record)
        return said

    def progress(self) -> int:
        """Steps done."""
        return self._num_steps

    def queue_len(self) -> int:
        """Requests that have started and not ended."""
        return len(self._requests)

    def stats(self) -> dict[str, float]:
        """See `Stage.stats`."""
        finished = self._num_finished
        return {
            "generation_tokens_total": self._num_tokens,
            "request_success_stop_total": finished[FinishReason.STOP],
            "request_success_length_total": finished[FinishReason.LENGTH],
            "request_success_abort_total": finished[FinishReason.ABORT],
            "request_success_error_total": finished[FinishReason.ERROR],
            "dropped_messages_total": self._num_dropped + self._order.num_dropped,
        }

    def _forget(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = StepOrder()
        self._rows = RowTable(self._config.max_num_seqs)
        self._requests: dict[int, Request] = {}
        self._ended: set[int] = set()
        self._step_logprobs: StepLogprobs | None = None
        self._host_sampler = self._new_host_sampler()

    def _new_host_sampler(self) -> HostSampler | None:
        if self._config.sampling_placement != "process":
            return None
        from sampler_svc.host_sampler import HostSampler

        config = self._config
        return HostSampler(config.max_num_seqs, config.facts.vocab_size, config.cpu_kernels)

    def _follow(self, record: Plan | Result) -> list[Message]:
        match record:
            case ExecuteStep():
                return self._apply_plan(record)
            case EndRequests():
                return self._end_requests(record)
            case StepLogprobs():
                self._step_logprobs = record  # waits for the tokens that it is about
                return []
            case StepPromptLogprobs():
                return self._take_prompt_logprobs(record)
            case StepLogits():
                return self._sample(record)
            case StepTokens():
                return self._take_tokens(record)

    # ── plans ────────────────────────────────────────────────────────────────────────────────

    def _apply_plan(self, step: ExecuteStep) -> list[Message]:
        released = i32(step.released_rows)
        for row in released.tolist():
            request = self._rows.release(row)
            if request is not None:
                self._ended.discard(request.request_id)
        if self._host_sampler is not None:
            self._host_sampler.release(released)
            for new in step.new_rows:
                self._host_sampler.admit(new)
        return [message for new in step.new_rows for message in self._admit(new)]

    def _admit(self, new: NewRow) -> Iterator[Message]:
        """A preempted request goes on with the text it has; any other starts."""
        request = self._requests.get(new.request_id)
        if request is not None:
            self._rows.take(new, request)
            return
        request = self._requests[new.request_id] = Request(new, self._detokenizer)
        self._rows.take(new, request)
        yield self._request_started(new, request)
        yield from self._all_prompt_logprobs(request)
        yield from self._replay(new, request)

    def _request_started(self, new: NewRow, request: Request) -> RequestStarted:
        prompt_text = ""
        if new.params.echo:
            prompt_text = self._detokenizer.decode(
                i32(request.prompt_token_ids), new.params.skip_special_tokens
            )
        return RequestStarted(
            new.request_id, self._epoch, new.num_prompt_tokens, new.num_cached_tokens, prompt_text
        )

    def _replay(self, new: NewRow, request: Request) -> Iterator[Message]:
        """Rebuild the text state of a recovered request from the outputs that are told already."""
        outputs = i32(new.token_ids)[new.num_prompt_tokens :].tolist()
        for num_output_tokens, token_id in enumerate(outputs, start=1):
            request.text.push(token_id, num_output_tokens, FinishReason.NOT_FINISHED)
            if request.text.stop_string is not None:
                # The scheduler took it up again before it read that it had ended.
                ending = self._end(request, FinishReason.STOP, request.text.stop_string)
                yield FinishRequest(request.request_id, self._epoch)
                yield endings_outputs(self._epoch, [ending])
                return

    def _end_requests(self, message: EndRequests) -> list[Message]:
        endings = []
        columns = zip(u64(message.request_ids).tolist(), i8(message.reasons).tolist(), strict=True)
        for request_id, reason in columns:
            if request_id in self._ended:
                continue
            request = self._requests.get(request_id)
            if request is not None:
                endings.append(self._end(request, FinishReason(reason)))
            else:
                self._num_finished[FinishReason(reason)] += 1
                endings.append(Ending(request_id, "", FinishReason(reason)))
        return [endings_outputs(self._epoch, endings)] if endings else []

    def _reject(self, message: RejectRequest) -> RequestRejected:
        self._num_finished[FinishReason.ERROR] += 1
        return RequestRejected(
            message.request_id,
            self._epoch,
            message.status,
            message.code,
            message.message,
            message.param,
        )

    # ── results ──────────────────────────────────────────────────────────────────────────────

    def _sample(self, record: StepLogits) -> list[Message]:
        assert self._host_sampler is not None, "logits came, but the executor samples"
        tokens, self._step_logprobs = self._host_sampler.sample(record)
        told = [tokens] if self._step_logprobs is None else [self._step_logprobs, tokens]
        return [*told, *self._take_tokens(tokens)]

    def _take_prompt_logprobs(self, record: StepPromptLogprobs) -> list[Message]:
        request = self._rows.requests[record.row]
        if request is None or not self._rows.is_live[record.row]:
            return []
        prompt = i32(request.prompt_token_ids)
        request.add_prompt_logprobs(
            record.start, prompt_logprobs_of(record, prompt, self._detokenizer)
        )
        return self._all_prompt_logprobs(request)

    def _all_prompt_logprobs(self, request: Request) -> list[Message]:
        logprobs = request.prompt_logprobs
        if logprobs is None or not request.has_all_prompt_logprobs:
            return []
        request.prompt_logprobs = None
        return [PromptLogprobs(request.request_id, self._epoch, logprobs)]

    def _take_tokens(self, record: StepTokens) -> list[Message]:
        """Tell the new tokens of all live rows; rows whose request has ended give none."""
        self._num_steps += 1
        rows, token_ids = i32(record.rows), i32(record.token_ids)
        is_live = self._rows.is_live[rows]
        rows, token_ids = rows[is_live], token_ids[is_live]
        said = self._output_logprobs(dict(zip(rows.tolist(), token_ids.tolist(), strict=True)))
        if len(rows):
            self._num_tokens += len(rows)
            said += self._text_outputs(rows, token_ids)
        return said

    def _output_logprobs(self, token_of_row: dict[int, int]) -> list[Message]:
        record, self._step_logprobs = self._step_logprobs, None
        if record is None:
            return []
        logprobs = sampled_logprobs(record, token_of_row, self._detokenizer)
        return [
            OutputLogprobs(int(self._rows.request_ids[row]), self._epoch, [logprob])
            for row, logprob in logprobs
        ]

    def _text_outputs(self, rows: Int32Array, token_ids: Int32Array) -> list[Message]:
        """Text and ends of live rows int32 [n], each with one new token: int32 [n]."""
        reasons = self._rows.append(rows, token_ids)
        num_output = self._rows.num_output[rows].tolist()
        requests = self._rows.requests_of(rows)
        deltas: list[str] = []
        ended: list[int] = []
        columns = zip(requests, token_ids.tolist(), num_output, reasons.tolist(), strict=True)
        for i, (request, token_id, count, reason) in enumerate(columns):
            deltas.append(request.text.push(token_id, count, reason))
            if reason or request.text.stop_string is not None:
                ended.append(i)
        said: list[Message] = []
        stop_reasons: list[StopReason] = []
        for i in ended:
            request, reason = requests[i], FinishReason(int(reasons[i]))
            stop_reasons.append(self._stop_reason(request, int(token_ids[i]), reason))
            if request.text.stop_string is not None:
                reasons[i] = FinishReason.STOP
                if not reason:  # only the sampler knows
                    said.append(FinishRequest(request.request_id, self._epoch))
            self._retire(request, FinishReason(int(reasons[i])))
        request_ids = self._rows.request_ids[rows]
        outputs = step_outputs(self._epoch, request_ids, token_ids, deltas, reasons, stop_reasons)
        return [*said, outputs]

    # ── ends ─────────────────────────────────────────────────────────────────────────────────

    def _stop_reason(self, request: Request, token_id: int, reason: FinishReason) -> StopReason:
        """The stop string, or the stop token where it is the user's, not the model's own."""
        if request.text.stop_string is not None:
            return request.text.stop_string
        is_own = token_id in self._eos_token_ids
        return token_id if reason == FinishReason.STOP and not is_own else None

    def _retire(self, request: Request, reason: FinishReason) -> None:
        """Forget a request whose end is being told; its row may still be in planned steps."""
        del self._requests[request.request_id]
        self._num_finished[reason] += 1
        if self._rows.requests[request.row] is request:
            self._rows.end(request.row)
            self._ended.add(request.request_id)

    def _end(
        self, request: Request, reason: FinishReason, stop_reason: StopReason = None
    ) -> Ending:
        """End a request without a token; what was held back of its text is told now."""
        self._retire(request, reason)
        return Ending(request.request_id, request.text.flush(), reason, stop_reason)
