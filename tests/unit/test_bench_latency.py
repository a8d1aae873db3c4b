"""`headrace bench latency`: plans, arithmetic under a fake clock, output, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from executor_svc.bench.latency import Round, paired_share, run_rounds
from executor_svc.bench.plans import Chunk, Workload
from executor_svc.bench.report import make_phase
from executor_svc.bench.work import Work, WorkModel
from executor_svc.kv_cache import KvSpec
from executor_svc.make_model import make_model
from executor_svc.ops.native.limits import Limits
from stages.bench.latency import latency_config
from stages.cli import main
from stages.columns import i32
from stages.errors import ConfigError
from stages.messages import ExecuteStep, Message
from stages.persistent_batch import PersistentBatch
from tests.unit.native_models import make_config

US = 1_000


def workload(**changes: int) -> Workload:
    sizes = {"input_len": 5, "output_len": 3, "batch_size": 2, "block_size": 4}
    return Workload(**{**sizes, "token_budget": 7, "vocab_size": 50, **changes})


class FakeStage:
    """Takes 10 us a prefill step and 3 us a decode step on a clock of its own."""

    def __init__(self, sizes: Workload) -> None:
        self.now_ns = 0
        self.num_tokens: list[int] = []
        self._rows = PersistentBatch(sizes.batch_size)

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        (step,) = messages
        assert isinstance(step, ExecuteStep)
        rows = self._rows.apply(step)
        self.num_tokens.append(int(rows.num_scheduled.sum()))
        self.now_ns += 10 * US if len(i32(step.prefill_rows)) else 3 * US
        return []

    def clock(self) -> int:
        return self.now_ns


# ── plans ────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_cut_at_the_token_budget() -> None:
    assert [*workload().prefill_steps()] == [
        [Chunk(0, 0, 5), Chunk(1, 0, 2)],
        [Chunk(1, 2, 5)],
    ]
    assert [*workload(output_len=2).decode_steps()] == [[Chunk(0, 5, 6), Chunk(1, 5, 6)]]
    assert workload().num_blocks == 1 + 2 * 2


def test_warm_up_is_not_measured_and_rounds_are_timed_step_by_step() -> None:
    sizes = workload()
    stage = FakeStage(sizes)
    rounds = run_rounds(stage, sizes, rounds=2, warmup=1, seed=0, clock=stage.clock)
    assert rounds == [Round(20 * US, [3 * US, 3 * US])] * 2
    assert rounds[0].total_ns == 26 * US
    assert stage.num_tokens == [7, 3, 2, 2] * 3


def test_each_round_knows_what_was_read_right_before_and_after_it() -> None:
    sizes = workload()
    stage = FakeStage(sizes)
    rates = iter((8e9, 6e9, 2e9))
    rounds = run_rounds(
        stage, sizes, 2, warmup=1, seed=0, clock=stage.clock, read_now=lambda: next(rates)
    )
    assert [round_.read_bytes_per_s for round_ in rounds] == [7e9, 4e9]


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────


def test_work_counts_projections_head_and_what_attention_sees() -> None:
    config = make_config(layer_windows=(None, 3))
    spec = KvSpec(2, config.num_kv_heads, config.head_dim, torch.bfloat16)
    work = WorkModel(config, spec, weight_bytes=1000)
    layer = 56 * ((2 * 6 + 2 * 2) * 20 + 3 * 90)
    head, pair, token_bytes = 56 * 333, 4 * 6 * 20, 2 * 2 * 20 * 2
    decode = work.steps([[Chunk(0, 9, 10)]], prompt_len=9)
    assert decode == Work(1000 + (10 + 3) * token_bytes, 2 * (2 * layer + head) + (10 + 3) * pair)
    # Of a prompt in two chunks the first wants no logits; the window hides what lies before it.
    prefill = work.steps([[Chunk(0, 0, 2)], [Chunk(0, 2, 5)]], prompt_len=5)
    assert prefill.num_bytes == 2000 + (2 + 2 + 5 + 5) * token_bytes
    assert prefill.flops == 2 * (5 * 2 * layer + head) + (15 + 12) * pair


def test_shares_are_work_over_the_median_time_over_the_limits() -> None:
    limits = Limits(read=8e9, flops=1e12)
    phase = make_phase([2 * US, 1 * US, 9 * US], 4, Work(4000, 1_000_000), limits)
    assert (phase.ms_p50, phase.ms_min) == (0.002, 0.001)
    assert phase.tokens_per_s == pytest.approx(2_000_000)
    assert phase.bandwidth_share == pytest.approx(4000 / 2e-6 / 8e9)
    assert phase.flops_share == pytest.approx(0.5)


def test_the_paired_share_sets_each_round_against_its_own_minute() -> None:
    work = Work(4000, 1)
    rounds = [
        Round(1, [2 * US, 2 * US, 9 * US], 4e9),  # 2e9 bytes a second
        Round(1, [1 * US], 5e9),  # 4e9
        Round(1, [4 * US], 1e9),  # 1e9
    ]
    assert paired_share(rounds, work) == pytest.approx(0.8)
    assert paired_share(rounds, None) is None
    assert paired_share([Round(1, [], 4e9), Round(1, [US])], work) is None


def test_without_limits_or_work_there_are_no_shares() -> None:
    phase = make_phase([US], 1, Work(1, 1), None)
    assert (phase.bytes, phase.bandwidth_share, phase.flops_share) == (1, None, None)
    assert make_phase([US], 1, None, Limits(1, 1)).flops_share is None


# ── the command ──────────────────────────────────────────────────────────────────────────────

KEYS = {
    "model",
    "dtype",
    "num_threads",
    "batch_size",
    "input_len",
    "output_len",
    "rounds",
    "read_bytes_per_s",
    "flops_per_s",
    "prefill",
    "decode",
    "latency_ms_p50",
    "paired_bandwidth_share",
}
PHASE_KEYS = {
    "ms_p50",
    "ms_min",
    "ms_p90",
    "tokens_per_s",
    "bytes",
    "flops",
    "bandwidth_share",
    "flops_share",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny-qwen3", out, vocab_size=512)
    return out


def test_the_command_prints_a_table_and_writes_stable_keys(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ROUND_S", "MOMENT_S"):
        monkeypatch.setattr(f"executor_svc.ops.native.limits.{name}", 0.0001)
    file = tmp_path / "latency.json"
    sizes = ("--input-len", "9", "--output-len", "4", "--batch-size", "3", "--rounds", "2")
    num_threads = torch.get_num_threads()
    code = main(
        ["bench", "latency", str(folder), *sizes, "--cpu-threads", "1", "--json", str(file)]
    )
    torch.set_num_threads(num_threads)
    assert code == 0
    assert "3 x (9 in, 4 out), 2 rounds" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report.keys() == KEYS
    assert report["prefill"].keys() == report["decode"].keys() == PHASE_KEYS
    assert (report["num_threads"], report["dtype"]) == (1, "bfloat16")
    for phase in (report["prefill"], report["decode"]):
        assert 0 < phase["ms_min"] <= phase["ms_p50"] <= phase["ms_p90"]
        assert phase["bytes"] > 0 and phase["flops"] > 0
    assert report["paired_bandwidth_share"] > 0
    assert report["latency_ms_p50"] > report["prefill"]["ms_min"]


def options(folder: Path, **changes: object) -> dict[str, object]:
    given: dict[str, object] = {"model": str(folder), "input_len": 16, "output_len": 4}
    given |= {"batch_size": 2, "rounds": 1, "warmup": 0, "device": None, "json": None}
    return given | changes


def test_the_configuration_holds_exactly_the_load(folder: Path) -> None:
    config = latency_config(options(folder, batch_size=3000, cpu_threads="auto"))
    assert (config.max_num_seqs, config.max_model_len) == (3000, 20)
    assert (config.max_num_batched_tokens, config.cpu_threads) == (3000, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_len": 0}, "--input-len is at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size is at least 1"),
        ({"warmup": -1}, "--warmup is at least 0"),
        ({"input_len": 10**6}, "--input-len and --output-len make 1000004 tokens"),
        ({"device": "emulated"}, "--device emulated computes nothing"),
        ({"cpu_threads": "many"}, "--cpu-threads takes auto or a whole number, not 'many'"),
    ],
)
def test_bad_options_are_named(folder: Path, changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        latency_config(options(folder, **changes))
