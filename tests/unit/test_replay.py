"""Recording and replay of a small stage: equal when it is, a named difference when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from stages.columns import f32_bytes, i32_bytes
from stages.config import ModelFacts, ServerConfig, encode_config
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    ExecutorFacts,
    FinishRequest,
    Message,
    OutputLogprobs,
    StepLogprobs,
    TokenLogprob,
)
from stages.recorder import RecordedStage, schema
from stages.replay import ReplayError, replay
from stages.stage import Stage

CONFIG = ServerConfig(
    model="m", served_model_name="m", facts=ModelFacts("A", 9, 9, []), run_dir="/"
)


class Echo:
    """Answers an abort with a finish in the current epoch, and with log-probabilities."""

    def __init__(
        self, offset: int = 0, logprob: float = -1.0, output_logprob: float = -1.0
    ) -> None:
        self._offset = offset
        self._logprob = logprob
        self._output_logprob = output_logprob
        self._epoch = 0

    def begin_epoch(self, message: BeginEpoch) -> None:
        self._epoch = message.epoch

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        out: list[Message] = []
        one, score = i32_bytes([1]), f32_bytes([self._logprob])
        for message in messages:
            assert isinstance(message, AbortRequest)
            out.append(FinishRequest(message.request_id + self._offset, self._epoch))
            out.append(StepLogprobs(1, one, score, one, one, one, score))
            token = TokenLogprob("a", b"a", 1, self._output_logprob, 1, [])
            out.append(OutputLogprobs(message.request_id, self._epoch, [token]))
        return out

    def progress(self) -> int:
        return 0

    def queue_len(self) -> int:
        return 0

    def stats(self) -> dict[str, float]:
        return {}


def record(path: Path) -> None:
    with RecordedStage(Echo(), path, "scheduler", 1, encode_config(CONFIG)) as stage:
        stage.begin_epoch(BeginEpoch(4, ExecutorFacts()))
        stage.handle([AbortRequest(5, 4), AbortRequest(6, 4)], now_ns=1)


def make(offset: int = 0, logprob: float = -1.0, output_logprob: float = -1.0) -> Stage:
    return Echo(offset, logprob, output_logprob)


def test_the_same_stage_says_the_same(tmp_path: Path) -> None:
    record(tmp_path / "r")
    result = replay("scheduler", tmp_path / "r", lambda config, incarnation: make())
    assert (result.num_frames, result.num_inbound, result.num_outbound) == (2, 3, 6)


def test_two_incarnations_in_one_file(tmp_path: Path) -> None:
    record(tmp_path / "r")
    record(tmp_path / "r")
    assert replay("scheduler", tmp_path / "r", lambda *_: make()).num_frames == 4


def test_a_difference_is_shown(tmp_path: Path) -> None:
    record(tmp_path / "r")
    with pytest.raises(ReplayError, match="frame 1, message 0 differs"):
        replay("scheduler", tmp_path / "r", lambda *_: make(offset=1))


def test_logprobs_may_differ_by_rounding_only(tmp_path: Path) -> None:
    record(tmp_path / "r")
    assert replay("scheduler", tmp_path / "r", lambda *_: make(logprob=-1.0001)).num_frames == 2
    with pytest.raises(ReplayError, match="message 1 differs"):
        replay("scheduler", tmp_path / "r", lambda *_: make(logprob=-1.1))
    close = replay("scheduler", tmp_path / "r", lambda *_: make(output_logprob=-1.0001))
    assert close.num_frames == 2
    with pytest.raises(ReplayError, match="message 2 differs"):
        replay("scheduler", tmp_path / "r", lambda *_: make(output_logprob=-1.1))


def test_a_recording_cut_off_by_a_kill_is_read_to_its_last_frame(tmp_path: Path) -> None:
    record(tmp_path / "r")
    data = (tmp_path / "r").read_bytes()
    (tmp_path / "r").write_bytes(data[:-3])
    assert replay("scheduler", tmp_path / "r", lambda *_: make()).num_frames == 1


def test_a_message_that_has_changed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "r")
    monkeypatch.setattr("stages.replay.schema", lambda: schema() | {"AbortRequest": ["epoch"]})
    with pytest.raises(ReplayError, match="AbortRequest had the fields"):
        replay("scheduler", tmp_path / "r", lambda *_: make())


@pytest.mark.parametrize("stage", ["sampler"])
def test_the_wrong_stage_is_refused(tmp_path: Path, stage: str) -> None:
    record(tmp_path / "r")
    with pytest.raises(ReplayError, match="stage scheduler"):
        replay(stage, tmp_path / "r", lambda *_: make())


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    with pytest.raises(ReplayError, match="no recording"):
        replay("scheduler", tmp_path / "r", lambda *_: make())
