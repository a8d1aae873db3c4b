"""Runs the requests of one body to their end and answers, whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from aiohttp import web

from gateway_svc import sse
from gateway_svc.deliveries import Delta
from gateway_svc.gateway import Gateway
from gateway_svc.inbox import SlowClient
from gateway_svc.openai.errors import error_body
from gateway_svc.openai.fields import SamplingFields, StreamOptions
from gateway_svc.openai.outputs import Output, Outputs, Usage, usage_of
from stages.errors import RequestError
from stages.messages import Generate


class Wording(Protocol):
    """How an endpoint words an answer."""

    def whole(self, choices: Sequence[Output], usage: Usage) -> msgspec.Struct:
        """Word a finished answer."""

    def chunks(self, output: Output, usage: Usage | None) -> list[msgspec.Struct]:
        """Word what is new of a choice; empty if it is nothing to tell."""

    def text_chunk(self, index: int) -> msgspec.Struct | None:
        """Word a piece of text of choice `index`, the text being `HOLE`.

        None where the choice's next chunk has more to tell than text.
        """

    def last_chunk(self, usage: Usage) -> msgspec.Struct:
        """Word the chunk that has the usage and no choice."""


@dataclass(frozen=True)
class Job:
    """One body's requests and how to answer them. `n`: choices a prompt.

    `counts_output`: False where the client asked for no tokens and one had to be generated.
    """

    requests: list[Generate]
    n: int
    wording: Wording
    is_stream: bool
    stream_options: StreamOptions
    counts_output: bool = True


def make_job(
    requests: list[Generate], fields: SamplingFields, wording: Wording, *, counts_output: bool
) -> Job:
    """Put together what both endpoints need."""
    return Job(
        requests,
        fields.n or 1,
        wording,
        bool(fields.stream),
        fields.stream_options or StreamOptions(),
        counts_output,
    )


class Shortcut:
    """Writes pieces of plain text as they are delivered, while the stream's handler waits.

    The first chunk of a choice, its last, and whatever has more to tell than text are left to the
    handler, and so is everything while the client's connection is backed up.
    """

    def __init__(self, stream: sse.EventStream, outputs: Outputs, job: Job) -> None:
        self._stream = stream
        self._outputs = outputs
        self._wording = job.wording
        self._is_allowed = not job.stream_options.continuous_usage_stats
        self._lanes: dict[int, tuple[Output, sse.EventTemplate]] = {}

    def write(self, delta: Delta) -> bool:
        """Write what a step gave one choice; False if the handler has to."""
        lane = self._lanes.get(delta.request_id) or self._open_lane(delta)
        if lane is None or delta.finish_reason or delta.logprobs:
            return False
        output, template = lane
        if delta.text and not self._stream.write_soon(template.fill(delta.text)):
            return False
        output.num_tokens += delta.num_tokens
        return True

    def _open_lane(self, delta: Delta) -> tuple[Output, sse.EventTemplate] | None:
        output = self._outputs.of(delta)
        document = self._wording.text_chunk(output.index) if self._is_allowed else None
        if document is None:
            return None
        lane = self._lanes[delta.request_id] = (output, sse.EventTemplate(document))
        return lane


async def respond(request: web.Request, gateway: Gateway, job: Job) -> web.StreamResponse:
    """Answer `request`; raises `RequestError` as long as an error can still be a status."""
    if job.is_stream:
        return await _stream(request, gateway, job)
    with gateway.generate(job.requests) as inbox:
        outputs = Outputs(inbox)
        while not outputs.are_finished:
            await outputs.advance()
    usage = usage_of(outputs.choices, job.n, counts_output=job.counts_output)
    body = msgspec.json.encode(job.wording.whole(outputs.choices, usage))
    return web.Response(body=body, content_type="application/json")


async def _stream(request: web.Request, gateway: Gateway, job: Job) -> web.StreamResponse:
    stream = sse.EventStream(request)
    try:
        with gateway.generate(job.requests) as inbox:
            outputs = Outputs(inbox)
            inbox.hang_up = stream.hang_up
            inbox.shortcut = Shortcut(stream, outputs, job).write
            await _write_answer(stream, outputs, job)
    except (ConnectionResetError, TimeoutError, SlowClient):
        stream.hang_up()
    return stream.response


async def _write_answer(stream: sse.EventStream, outputs: Outputs, job: Job) -> None:
    try:
        await _write_choices(stream, outputs, job)
    except RequestError as error:
        if not stream.is_started:
            raise
        await stream.write(sse.event(error_body(error)))
    await stream.end()


async def _write_choices(stream: sse.EventStream, outputs: Outputs, job: Job) -> None:
    options = job.stream_options
    while not outputs.are_finished:
        events: list[bytes] = []
        for output in await outputs.advance():
            usage = None
            if options.continuous_usage_stats:
                usage = usage_of([output], 1, counts_output=job.counts_output)
            events += map(sse.event, job.wording.chunks(output, usage))
        if events:
            await stream.write(b"".join(events))
    ending = sse.DONE
    if options.include_usage:
        usage = usage_of(outputs.choices, job.n, counts_output=job.counts_output)
        ending = sse.event(job.wording.last_chunk(usage)) + ending
    await stream.write(ending)
