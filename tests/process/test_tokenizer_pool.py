"""The pool with real worker processes: order, deadlines, deaths, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from stages.columns import i32, i32_bytes
from stages.config import ServerConfig, decode_config
from stages.errors import ConfigError, StageStartError
from stages.messages import (
    AbortRequest,
    ChatMessage,
    ChatPrompt,
    Detokenize,
    Detokenized,
    Generate,
    Message,
    RequestRejected,
    SamplingParams,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizedRequest,
)
from stages.recorder import Frame, Header, read_recording
from tests.unit.tokenizer_folders import byte_level_bpe, edit_tokenizer_config, server_config
from tokenizer_svc.service import TokenizerService

# Ten thousand million turns within the sandbox's limit on one range: as good as for ever.
SPIN = (
    "{% if messages[0].content == 'spin' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = byte_level_bpe(tmp_path_factory.mktemp("model"))
    edit_tokenizer_config(folder, chat_template=SPIN)
    return folder


class Harness:
    """A service, what it said, and a way to wait for it to say more."""

    def __init__(self, config: ServerConfig) -> None:
        self.said: list[Message] = []
        self.service = TokenizerService(config, self._take)
        self._news = asyncio.Condition()
        self._woken: set[asyncio.Task[None]] = set()

    async def wait_for(self, count: int) -> list[Message]:
        """Wait until `count` messages have been said."""
        async with asyncio.timeout(DEADLINE_S), self._news:
            await self._news.wait_for(lambda: len(self.said) >= count)
        return self.said

    def _take(self, message: Message) -> None:
        self.said.append(message)
        task = asyncio.get_running_loop().create_task(self._notify())
        self._woken.add(task)
        task.add_done_callback(self._woken.discard)

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()


@pytest.fixture
async def harnesses() -> AsyncIterator[list[Harness]]:
    """Harnesses to close at the end; no worker may be left then."""
    harnesses: list[Harness] = []
    yield harnesses
    for harness in harnesses:
        await harness.service.close()
    assert workers() == []


async def started(harnesses: list[Harness], config: ServerConfig) -> Harness:
    harness = Harness(config)
    harnesses.append(harness)
    await harness.service.start()
    return harness


def workers() -> list[int]:
    """The ids of the processes that this one has as children, zombies included."""
    return [child.pid for child in psutil.Process().children()]


def chat(request_id: int, text: str, epoch: int = 1) -> Generate:
    return Generate(request_id, epoch, ChatPrompt([ChatMessage("user", text)]), SamplingParams())


def kinds(messages: list[Message]) -> list[tuple[str, int]]:
    return [(type(m).__name__, getattr(m, "request_id")) for m in messages]  # noqa: B009


async def test_every_kind_of_message_is_answered(harnesses: list[Harness], folder: Path) -> None:
    harness = await started(harnesses, server_config(folder, tokenizer_workers=2))
    service = harness.service
    assert len(workers()) == 2
    service.submit(
        [
            chat(1, "the wheel"),
            Generate(2, 1, TextPrompt(""), SamplingParams()),
            Tokenize(3, TextPrompt("the wheel")),
            Detokenize(4, i32_bytes([5, 6])),
        ]
    )
    assert service.queue_len() == 4
    by_id = {message.request_id: message for message in await harness.wait_for(4)}  # type: ignore[attr-defined]
    request, rejected, tokenized, detokenized = (by_id[n] for n in (1, 2, 3, 4))
    assert isinstance(request, TokenizedRequest) and isinstance(tokenized, Tokenized)
    assert request.prompt_token_ids == tokenized.token_ids
    assert i32(request.params.stop_token_ids).tolist() == [2, 0]
    assert isinstance(rejected, RequestRejected) and rejected.status == 400
    assert isinstance(detokenized, Detokenized)
    assert service.queue_len() == 0
    assert service.progress() == 4
    assert service.stats() == {
        "tokenizer_answered_total": 4,
        "tokenizer_rejected_total": 1,
        "tokenizer_late_total": 0,
        "tokenizer_worker_crashes_total": 0,
        "tokenizer_workers": 2,
    }


async def test_an_abort_leaves_behind_its_request(harnesses: list[Harness], folder: Path) -> None:
    harness = await started(harnesses, server_config(folder, tokenizer_workers=2))
    requests = [chat(n, "the wheel " * 5) for n in range(40)]
    aborts = [AbortRequest(n, 1) for n in range(0, 40, 2)]
    harness.service.submit([*requests, AbortRequest(999, 1), AbortRequest(0, 7), *aborts])
    said = kinds(await harness.wait_for(62))
    # Nothing is open under these: they have no request to wait for.
    assert said[:2] == [("AbortRequest", 999), ("AbortRequest", 0)]
    for n in range(40):
        ours = [kind for kind, request_id in said[2:] if request_id == n]
        assert ours == ["TokenizedRequest", "AbortRequest"][: 2 - n % 2]


async def test_a_request_sent_again_in_a_new_epoch_is_another(
    harnesses: list[Harness], folder: Path
) -> None:
    harness = await started(harnesses, server_config(folder))
    harness.service.submit([chat(5, "a", 1), chat(5, "a", 2), AbortRequest(5, 2)])
    said = await harness.wait_for(3)
    epochs = [(type(m).__name__, m.epoch) for m in said]  # type: ignore[attr-defined]
    assert epochs == [("TokenizedRequest", 1), ("TokenizedRequest", 2), ("AbortRequest", 2)]


async def test_a_template_without_end_costs_its_own_request_only(
    harnesses: list[Harness], folder: Path
) -> None:
    config = server_config(folder, tokenizer_workers=1, template_timeout=0.5)
    harness = await started(harnesses, config)
    (before,) = workers()
    harness.service.submit([chat(1, "spin"), AbortRequest(1, 1), *[chat(n, "a") for n in (2, 3)]])
    said = await harness.wait_for(4)
    late = said[0]
    assert isinstance(late, RequestRejected)
    assert (late.request_id, late.epoch, late.status) == (1, 1, 400)
    assert (late.code, late.param) == ("template_timeout", "messages")
    assert "longer than 0.5 s" in late.message
    assert kinds(said[1:]) == [
        ("AbortRequest", 1),
        ("TokenizedRequest", 2),
        ("TokenizedRequest", 3),
    ]
    (after,) = workers()
    assert after != before
    assert harness.service.stats()["tokenizer_late_total"] == 1
    assert harness.service.stats()["tokenizer_worker_crashes_total"] == 0


async def test_a_pause_of_the_service_is_not_taken_for_a_slow_worker(
    harnesses: list[Harness], folder: Path
) -> None:
    config = server_config(folder, template_timeout=0.4)
    harness = await started(harnesses, config)
    harness.service.submit([chat(1, "a")])
    await asyncio.sleep(0)
    # As SIGSTOP would: the loop sees the answer and the passed time at the same moment.
    time.sleep(0.8)
    assert kinds(await harness.wait_for(1)) == [("TokenizedRequest", 1)]


async def test_work_queued_on_a_stuck_worker_goes_to_another(
    harnesses: list[Harness], folder: Path
) -> None:
    config = server_config(folder, tokenizer_workers=2, template_timeout=1.0)
    harness = await started(harnesses, config)
    harness.service.submit([chat(0, "spin"), *[chat(n, "a") for n in range(1, 21)]])
    said = await harness.wait_for(21)
    rejected = [m for m in said if isinstance(m, RequestRejected)]
    assert [m.request_id for m in rejected] == [0]
    assert sorted(request_id for _, request_id in kinds(said)) == list(range(21))


async def test_work_of_a_killed_worker_is_done_again(
    harnesses: list[Harness], folder: Path
) -> None:
    harness = await started(harnesses, server_config(folder, template_timeout=60.0))
    (first,) = workers()
    os.kill(first, signal.SIGSTOP)
    harness.service.submit([chat(n, "a") for n in range(10)])
    os.kill(first, signal.SIGKILL)
    said = await harness.wait_for(10)
    assert kinds(said) == [("TokenizedRequest", n) for n in range(10)]
    assert harness.service.stats()["tokenizer_worker_crashes_total"] == 1


async def test_a_request_that_takes_two_workers_down_is_rejected(
    harnesses: list[Harness], folder: Path
) -> None:
    harness = await started(harnesses, server_config(folder, template_timeout=60.0))
    (first,) = workers()
    os.kill(first, signal.SIGSTOP)
    harness.service.submit([chat(1, "spin"), chat(2, "a")])
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        # The next worker is at work on the first request from the moment when it counts as open.
        while workers() == [first] or harness.service.stats()["tokenizer_workers"] == 0:
            await asyncio.sleep(0.02)
    (second,) = workers()
    assert harness.said == []
    os.kill(second, signal.SIGKILL)
    said = await harness.wait_for(2)
    assert kinds(said) == [("RequestRejected", 1), ("TokenizedRequest", 2)]
    assert isinstance(said[0], RequestRejected)
    assert (said[0].status, said[0].code) == (500, "tokenizer_error")


async def test_a_prompt_of_many_megabytes_passes_the_socket(
    harnesses: list[Harness], folder: Path
) -> None:
    harness = await started(harnesses, server_config(folder, max_model_len=2**20))
    harness.service.submit([Tokenize(1, TextPrompt("The wheel stands still. " * 60_000))])
    (said,) = await harness.wait_for(1)
    assert isinstance(said, Tokenized)
    assert len(said.token_strs) == len(said.token_ids) // 4 > 300_000


async def test_a_folder_that_cannot_work_is_a_config_error(
    harnesses: list[Harness], tmp_path: Path
) -> None:
    harness = Harness(server_config(tmp_path, tokenizer_workers=2))
    harnesses.append(harness)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        await harness.service.start()


async def test_a_worker_that_is_not_ready_in_time_is_a_start_error(
    harnesses: list[Harness], folder: Path
) -> None:
    harness = Harness(server_config(folder, start_timeout=0.01))
    harnesses.append(harness)
    with pytest.raises(StageStartError, match="not ready within"):
        await harness.service.start()


async def test_a_worker_that_cannot_be_replaced_ends_the_service(
    harnesses: list[Harness], tmp_path: Path
) -> None:
    model = byte_level_bpe(tmp_path)
    harness = await started(harnesses, server_config(model))
    (model / "tokenizer.json").unlink()
    (worker,) = workers()
    os.kill(worker, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
            await harness.service.wait_failed()


async def test_close_ends_the_wait_for_a_failure(harnesses: list[Harness], folder: Path) -> None:
    harness = await started(harnesses, server_config(folder))
    waiting = asyncio.create_task(harness.service.wait_failed())
    await asyncio.sleep(0)
    await harness.service.close()
    async with asyncio.timeout(DEADLINE_S):
        await waiting


async def test_workers_write_recordings(
    harnesses: list[Harness], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.rec"
    config = server_config(folder, record={"tokenizer": str(path)})
    harness = await started(harnesses, config)
    harness.service.submit([chat(1, "a"), chat(2, "b")])
    await harness.wait_for(2)
    header, *frames = read_recording(path)
    assert isinstance(header, Header)
    assert decode_config(header.config) == config
    assert all(isinstance(frame, Frame) for frame in frames)
    assert len(frames) == 2


def test_a_stuck_worker_dies_with_its_parent(folder: Path) -> None:
    script = """
import asyncio, signal, sys
from pathlib import Path
import psutil
from tests.unit.tokenizer_folders import server_config
from tokenizer_svc.service import TokenizerService

async def run():
    service = TokenizerService(server_config(Path(sys.argv[1])), print)
    await service.start()
    (worker,) = psutil.Process().children()
    worker.suspend()  # It cannot see the end of its socket any more.
    print(worker.pid, flush=True)
    signal.pause()

asyncio.run(run())
"""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=DEADLINE_S)
    assert alive == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [("tokenizer_svc.service", "transformers"), ("tokenizer_svc.stage", "torch")],
)
def test_heavy_imports_stay_out(module: str, absent: str) -> None:
    script = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
