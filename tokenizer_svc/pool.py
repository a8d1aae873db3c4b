"""The pool of tokenizer workers: hands out messages, keeps each request's order, survives workers.

Stays small: no transformers here. A worker that is too slow or dies costs its own request at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import (
    AbortRequest,
    Detokenize,
    Generate,
    Message,
    RequestRejected,
    TokenizerInbound,
)
from tokenizer_svc.frames import pack
from tokenizer_svc.limits import MAX_BYTES_PER_TOKEN
from tokenizer_svc.rejection import TOKENIZER_ERROR, prompt_param, reject
from tokenizer_svc.worker_process import Job, WorkerProcess

# Enough that a worker never waits for the pool between two jobs, few enough that a short prompt
# does not queue behind long ones while another worker is idle.
MAX_JOBS_PER_WORKER = 4

# Far below what any kind of tokenizer does on a busy core: the time that a long text may take more.
BYTES_PER_SECOND = 200_000

# The first crash may be another's fault (a kill by hand, a full memory); the second is the job's.
MAX_CRASHES = 2

logger = logging.getLogger(__name__)


class WorkerPool:
    """`config.tokenizer_workers` workers behind one queue.

    Every submitted message is answered exactly once, through `on_reply`: by a worker, or by a
    rejection when it ran out of time or took two workers down. An `AbortRequest` passes after the
    answer to its request, and at once where none is open.
    """

    def __init__(
        self,
        config: ServerConfig,
        on_reply: Callable[[list[Message]], None],
        incarnation: int = 0,
    ) -> None:
        self._config = config
        self._on_reply = on_reply
        self._incarnation = incarnation
        self._queue: deque[Job] = deque()
        self._open_requests: dict[tuple[int, int], Job] = {}
        self._workers: list[WorkerProcess] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._num_answered = 0
        self._num_rejected = 0
        self._num_late = 0
        self._num_crashes = 0

    async def start(self) -> None:
        """Start all workers. Raises ConfigError or StageStartError if one cannot; then `close`."""
        workers = [self._spawn() for _ in range(self._config.tokenizer_workers)]
        await asyncio.gather(*(self._greet(worker) for worker in workers))
        self._tasks = [asyncio.create_task(self._keep_worker(worker)) for worker in workers]

    def submit(self, message: TokenizerInbound) -> None:
        """Take a message; its answer comes later through `on_reply`."""
        if isinstance(message, AbortRequest):
            self._abort(message)
            return
        frame = pack(message)
        job = Job(message, frame, self._time_limit(len(frame)))
        if isinstance(message, Generate):
            self._open_requests[message.request_id, message.epoch] = job
        self._queue.append(job)
        self._dispatch()

    async def wait_failed(self) -> None:
        """Wait until a worker has died and no other can be started in its place.

        Raises what `start` raises; returns only when the pool is closed.
        """
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Kill the workers, who hold nothing that is not lost anyway when the stage ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            worker.kill()
            worker.reap()
        self._workers.clear()

    def queue_len(self) -> int:
        """Messages not yet answered."""
        return len(self._queue) + sum(len(worker.jobs) for worker in self._workers)

    def progress(self) -> int:
        """Messages answered since the start."""
        return self._num_answered

    def stats(self) -> dict[str, float]:
        """Counters and gauges for `/metrics`."""
        return {
            "tokenizer_answered_total": self._num_answered,
            "tokenizer_rejected_total": self._num_rejected,
            "tokenizer_late_total": self._num_late,
            "tokenizer_worker_crashes_total": self._num_crashes,
            "tokenizer_workers": sum(worker.is_open for worker in self._workers),
        }

    def _spawn(self) -> WorkerProcess:
        worker = WorkerProcess(self._on_late)
        self._workers.append(worker)
        return worker

    async def _greet(self, worker: WorkerProcess) -> None:
        await worker.greet(self._config, self._incarnation)

    async def _keep_worker(self, worker: WorkerProcess) -> None:
        """Serve with a worker, and with another one when it has died, until cancelled."""
        while True:
            self._dispatch()
            await worker.read_answers(self._answer)
            self._retire(worker)
            worker = self._spawn()
            await self._greet(worker)

    def _retire(self, worker: WorkerProcess) -> None:
        """Put the jobs of a dead worker back, and blame the first of them if it was a crash.

        Ownership: a job is in `_queue`, or in some worker's `jobs`, or answered.
        """
        is_crash = worker.is_open
        worker.kill()
        exit_code = worker.reap()
        self._workers.remove(worker)
        jobs = worker.jobs
        if is_crash:
            logger.warning("a tokenizer worker died (exit code %d); starting another", exit_code)
            self._num_crashes += 1
            if jobs:
                jobs[0].num_crashes += 1
        culprit = jobs.popleft() if jobs and jobs[0].num_crashes == MAX_CRASHES else None
        self._queue.extendleft(reversed(jobs))
        if culprit is not None:
            text = "The tokenizer died on this request."
            self._reject(culprit, RequestError(text, code=TOKENIZER_ERROR, status=500))
        self._dispatch()

    def _on_late(self, worker: WorkerProcess) -> None:
        """End the job that takes too long; `_retire` follows when the worker's socket ends."""
        self._num_late += 1
        worker.kill()
        job = worker.jobs.popleft()
        logger.warning("request %d was too slow to tokenize; ended", job.message.request_id)
        text = f"The prompt took longer than {job.time_limit:.1f} s to render and encode."
        param = "" if isinstance(job.message, Detokenize) else prompt_param(job.message.prompt)
        self._reject(job, RequestError(text, code="template_timeout", param=param))

    def _dispatch(self) -> None:
        """Give waiting jobs to the least busy workers, as long as one has room."""
        workers = [worker for worker in self._workers if worker.is_open]
        while self._queue and workers:
            worker = min(workers, key=lambda candidate: len(candidate.jobs))
            if len(worker.jobs) == MAX_JOBS_PER_WORKER:
                return
            worker.give(self._queue.popleft())

    def _abort(self, message: AbortRequest) -> None:
        job = self._open_requests.get((message.request_id, message.epoch))
        if job is None:
            self._on_reply([message])
        else:
            job.abort = message

    def _answer(self, job: Job, answers: list[Message]) -> None:
        self._num_answered += 1
        self._num_rejected += sum(isinstance(answer, RequestRejected) for answer in answers)
        if isinstance(job.message, Generate):
            self._open_requests.pop((job.message.request_id, job.message.epoch), None)
        self._on_reply(answers if job.abort is None else [*answers, job.abort])
        self._dispatch()

    def _reject(self, job: Job, error: RequestError) -> None:
        self._answer(job, [reject(job.message, error)])

    def _time_limit(self, num_bytes: int) -> float:
        """Give the seconds a worker may take: the template's, and the encoding's by length.

        What is longer than a prompt can be costs no more: it is refused unread.
        """
        num_bytes = min(num_bytes, MAX_BYTES_PER_TOKEN * self._config.max_model_len)
        return self._config.template_timeout + num_bytes / BYTES_PER_SECOND
