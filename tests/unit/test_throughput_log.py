"""The load line: rates of its period, silence while idle."""

from __future__ import annotations

from stages.throughput_log import ThroughputLog

IDLE = {"prompt_tokens_total": 0.0, "generation_tokens_total": 0.0, "num_requests_running": 0.0}
BUSY = {
    "prompt_tokens_total": 500.0,
    "generation_tokens_total": 1000.0,
    "num_requests_running": 3.0,
    "num_requests_waiting": 2.0,
    "kv_cache_usage_perc": 0.25,
    "prefix_cache_queries_total": 200.0,
    "prefix_cache_hits_total": 50.0,
}


def test_rates_are_of_the_period() -> None:
    log = ThroughputLog()
    assert log.line(IDLE, 100.0) is None  # nothing to compare with
    assert log.line(BUSY, 105.0) is None  # the period is not over
    line = log.line(BUSY, 110.0)
    assert line == (
        "Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 100.0 "
        "tokens/s, Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 25.0%, Prefix cache hit "
        "rate: 25.0%"
    )


def test_one_idle_line_then_silence() -> None:
    log = ThroughputLog()
    ended = BUSY | {"num_requests_running": 0.0, "num_requests_waiting": 0.0}
    log.line(IDLE, 10.0)
    assert log.line(BUSY, 20.0) is not None
    assert "generation throughput: 0.0" in (log.line(ended, 30.0) or "")
    assert log.line(ended, 40.0) is None
    assert log.line(ended, 50.0) is None


def test_a_restarted_scheduler_gives_no_negative_rate() -> None:
    log = ThroughputLog()
    log.line(BUSY, 10.0)
    restarted = IDLE | {"generation_tokens_total": 5.0}
    assert "generation throughput: 0.0" in (log.line(restarted, 20.0) or "")


def test_nothing_known_nothing_said() -> None:
    assert ThroughputLog().line({}, 100.0) is None
