"""/live, /ready, /health and /metrics."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient
from prometheus_client.parser import text_string_to_metric_families

from gateway_svc.deliveries import Delta
from gateway_svc.health import MAX_SILENCE_NS, Health
from gateway_svc.latency import Histogram, Latencies, RequestTimes
from stages.columns import i32_bytes
from stages.messages import Drain, FinishReason, GroupState, RequestStarted
from tests.unit.gateway_fakes import MODEL, Served, group_state, serving

SECOND = 1_000_000_000
START = 1_000 * SECOND


def after(seconds: int, **scheduler: Any) -> GroupState:
    return group_state(START + seconds * SECOND, **scheduler)


def problems(health: Health, states: list[GroupState]) -> list[str]:
    """Observe states, each at the time of its heartbeats; what is wrong at the last one."""
    for state in states:
        now_ns = state.stages[2].heartbeat_ns
        health.observe(state, now_ns)
    return health.problems(states[-1], now_ns)


def test_an_idle_group_is_healthy_for_ever() -> None:
    assert problems(Health(), [after(0), after(1000)]) == []


def test_waiting_work_without_progress_is_sick_after_5_s() -> None:
    stuck = [after(second, queue_len=3, progress=7) for second in range(6)]
    assert problems(Health(), stuck) == []
    stuck.append(after(6, queue_len=3, progress=7))
    assert problems(Health(), stuck) == ["work waits, but no step has ended for 6.0 s"]


def test_running_work_counts_as_work() -> None:
    stuck = [after(second, stats={"num_requests_running": 1.0}) for second in (0, 6)]
    assert len(problems(Health(), stuck)) == 1


def test_progress_is_health() -> None:
    busy = [after(second, queue_len=3, progress=second) for second in range(60)]
    assert problems(Health(), busy) == []


def test_work_that_has_just_come_is_not_late() -> None:
    assert problems(Health(), [after(0), after(60), after(61, queue_len=1)]) == []


def test_a_restarted_scheduler_counts_anew() -> None:
    states = [
        after(0, queue_len=1, progress=5),
        after(4, queue_len=1, progress=5, incarnation=2),
        after(8, queue_len=1, progress=5, incarnation=2),
    ]
    assert problems(Health(), states) == []


@pytest.mark.parametrize("index", range(5))
def test_a_silent_stage_is_named(index: int) -> None:
    state = after(10)
    stage = state.stages[index]
    state.stages[index] = msgspec.structs.replace(stage, heartbeat_ns=START + 4 * SECOND)
    now_ns = START + 10 * SECOND
    assert Health().problems(state, now_ns) == [f"{stage.stage} has been silent for 6.0 s"]
    assert MAX_SILENCE_NS == 5 * SECOND


async def status(client: TestClient[Any, Any], path: str) -> int:
    response = await client.get(path)
    await response.json()
    return response.status


async def probes(served: Served) -> tuple[int, int, int]:
    client = served.client
    return (
        await status(client, "/live"),
        await status(client, "/ready"),
        await status(client, "/health"),
    )


async def test_probes_from_start_to_drain() -> None:
    async with serving() as served:
        assert await probes(served) == (200, 503, 503)
        served.gateway.on_group_state(group_state(time.time_ns(), is_ready=False))
        assert await probes(served) == (200, 503, 200)
        served.gateway.on_group_state(group_state(time.time_ns()))
        assert await probes(served) == (200, 200, 200)
        served.gateway.on_group_state(group_state(time.time_ns() - 6 * SECOND))
        assert await probes(served) == (200, 200, 503)
        served.gateway.on_group_state(group_state(time.time_ns()))
        served.gateway.drain(Drain(0))
        assert await probes(served) == (200, 503, 200)


async def test_not_ready_before_the_first_epoch() -> None:
    async with serving(has_begun=False) as served:
        served.gateway.on_group_state(group_state(time.time_ns()))
        assert await status(served.client, "/ready") == 503


async def metrics(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    response = await served.client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(await response.text())
        for sample in family.samples
    }


def vllm(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"vllm:{name}", frozenset({"model_name": MODEL, "engine": "0", **labels}.items())


def of_stage(name: str, stage: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"headrace:{name}", frozenset({("stage", stage)})


async def test_metrics_of_the_scheduler_have_vllms_names() -> None:
    stats = {
        "num_requests_running": 4.0,
        "num_requests_waiting": 2.0,
        "kv_cache_usage_perc": 0.5,
        "num_preemptions_total": 1.0,
        "prefix_cache_queries_total": 10.0,
        "prefix_cache_hits_total": 6.0,
        "prompt_tokens_total": 100.0,
        "generation_tokens_total": 50.0,
    }
    async with serving() as served:
        served.gateway.on_group_state(group_state(time.time_ns(), stats=stats))
        samples = await metrics(served)
    assert {name: samples[vllm(name)] for name in stats} == stats


async def test_metrics_are_there_before_the_scheduler_is() -> None:
    async with serving() as served:
        samples = await metrics(served)
    assert samples[vllm("num_requests_waiting")] == 0
    assert samples[vllm("request_success_total", finished_reason="stop")] == 0


async def test_metrics_of_requests() -> None:
    async with serving() as served:
        await (await served.complete(max_tokens=4)).read()
        await (await served.complete(prompt=[[1], [2]], max_tokens=4)).read()
        samples = await metrics(served)
    assert samples[vllm("request_success_total", finished_reason="length")] == 3
    assert samples[vllm("time_to_first_token_seconds_count")] == 3
    assert samples[vllm("e2e_request_latency_seconds_count")] == 3
    assert samples[vllm("inter_token_latency_seconds_count")] == 9
    assert samples[vllm("request_generation_tokens_sum")] == 12
    assert samples[vllm("request_prompt_tokens_sum")] == 15
    assert samples[vllm("e2e_request_latency_seconds_bucket", le="+Inf")] == 3


async def test_metrics_of_stages() -> None:
    async with serving() as served:
        stats = {"own_figure": 3.0, "own_total": 4.0, "not a name": 5.0}
        state = group_state(time.time_ns(), queue_len=2, progress=9, incarnation=3, stats=stats)
        served.gateway.on_group_state(state)
        samples = await metrics(served)
    assert samples[of_stage("stage_queue_len", "scheduler")] == 2
    assert samples[of_stage("stage_progress_total", "scheduler")] == 9
    assert samples[of_stage("stage_restarts_total", "scheduler")] == 2
    assert samples[of_stage("stage_is_ready", "gateway")] == 1
    assert 0 <= samples[of_stage("stage_heartbeat_age_seconds", "sampler")] < 5
    assert samples[of_stage("own_figure", "scheduler")] == 3
    assert samples[of_stage("own_total", "scheduler")] == 4


def test_histogram_buckets_are_cumulative_and_include_their_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, count=2)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 5), ("+Inf", 6)]
    assert histogram.sum == 16.0


def test_latencies_of_one_request() -> None:
    latencies = Latencies()
    times = RequestTimes(opened=10.0, started=10.0)

    def tokens(count: int, reason: FinishReason = FinishReason.NOT_FINISHED) -> Delta:
        return Delta(1, i32_bytes([0] * count), "", reason)

    latencies.observe(times, RequestStarted(1, 1, 7, 0), 11.0)
    latencies.observe(times, tokens(1), 13.0)
    latencies.observe(times, tokens(2), 17.0)
    latencies.observe(times, tokens(0, FinishReason.STOP), 18.0)
    sums = {name: histogram.sum for name, histogram in latencies.histograms.items()}
    assert sums == {
        "time_to_first_token_seconds": 3.0,
        "inter_token_latency_seconds": 4.0,
        "request_time_per_output_token_seconds": 2.0,
        "e2e_request_latency_seconds": 8.0,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 4.0,
        "request_prompt_tokens": 7.0,
        "request_generation_tokens": 3.0,
    }
    assert latencies.finished == {"stop": 1}


def test_latencies_of_several_gateways_add_up() -> None:
    both, parts = Latencies(), [Latencies(), Latencies()]
    for index, ttft in enumerate((0.3, 0.02, 7.0)):
        times = [RequestTimes(opened=1.0, started=1.0) for _ in range(2)]
        for latencies, own in zip((both, parts[index % 2]), times, strict=True):
            latencies.observe(own, RequestStarted(1, 1, 3, 0), 1.0)
            delta = Delta(1, i32_bytes([5]), "", FinishReason.LENGTH)
            latencies.observe(own, delta, 1.0 + ttft)
    merged = Latencies.merged([part.figures() | {"requests_ended_total": 9.0} for part in parts])
    assert merged.figures() == both.figures()
    assert merged.finished == both.finished == {"length": 3}
