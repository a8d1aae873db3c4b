"""`/metrics`: the group's state and the gateway's latencies as Prometheus text.

Names that vLLM has are vLLM's, so that its dashboards and routers work; what only Headrace has is
`headrace:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway_svc.gateway import Gateway
from gateway_svc.health import SCHEDULER
from stages.messages import StageState

FINISHED_REASONS = ("stop", "length", "abort", "error")
ENGINE = "0"
COUNTER_SUFFIX = "_total"
_STAT_NAME = re.compile(r"[a-z][a-z0-9_]*")

SCHEDULER_METRICS = {
    "num_requests_running": "Requests in the running batch.",
    "num_requests_waiting": "Requests that wait for a place in the batch.",
    "kv_cache_usage_perc": "Share of KV-cache blocks in use, 0 to 1.",
    "num_preemptions_total": "Requests that were preempted and recomputed.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "prompt_tokens_total": "Prompt tokens computed.",
    "generation_tokens_total": "Tokens generated.",
}


class GatewayCollector(Collector):
    """Builds all metrics anew at each scrape: nothing is kept twice."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._labels = ("model_name", "engine")
        self._values = (gateway.config.served_model_name, ENGINE)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        yield from self._engine()
        yield from self._latencies()
        yield from self._stages()

    def _engine(self) -> Iterator[Metric]:
        stats: Mapping[str, float] = {}
        for stage in self._gateway.state.stages:
            if stage.stage == SCHEDULER:
                stats = stage.stats
        for name, text in SCHEDULER_METRICS.items():
            family = _family(f"vllm:{name}", text, self._labels)
            family.add_metric(self._values, stats.get(name, 0.0))
            yield family

    def _latencies(self) -> Iterator[Metric]:
        latencies = self._gateway.group_latencies()
        for name, histogram in latencies.histograms.items():
            text = name.replace("_", " ").capitalize() + "."
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=self._labels)
            family.add_metric(self._values, histogram.buckets(), histogram.sum)
            yield family
        labels = (*self._labels, "finished_reason")
        finished = CounterMetricFamily("vllm:request_success", "Requests ended.", labels=labels)
        for reason in FINISHED_REASONS:
            finished.add_metric((*self._values, reason), latencies.finished[reason])
        yield finished

    def _stages(self) -> Iterator[Metric]:
        stages = self._gateway.state.stages
        now_ns = self._gateway.now_ns()
        figures = {
            "queue_len": [float(stage.queue_len) for stage in stages],
            "progress_total": [float(stage.progress) for stage in stages],
            "restarts_total": [float(max(stage.incarnation - 1, 0)) for stage in stages],
            "is_ready": [float(stage.is_ready) for stage in stages],
            "heartbeat_age_seconds": [(now_ns - stage.heartbeat_ns) / 1e9 for stage in stages],
        }
        for name, values in figures.items():
            family = _family(f"headrace:stage_{name}", f"{name} of each stage.", ("stage",))
            for stage, value in zip(stages, values, strict=True):
                family.add_metric((stage.stage,), value)
            yield family
        yield from _stage_stats(stages)


def make_registry(gateway: Gateway) -> CollectorRegistry:
    """Make the gateway's own registry."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(GatewayCollector(gateway))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """Give the text of a scrape."""
    return generate_latest(registry)


def _stage_stats(stages: list[StageState]) -> Iterator[Metric]:
    """Export whatever figures stages send, one family a name, labelled with the stage."""
    names = sorted({name for stage in stages for name in stage.stats})
    for name in filter(_STAT_NAME.fullmatch, names):
        family = _family(f"headrace:{name}", f"{name} as its stage tells it.", ("stage",))
        for stage in stages:
            if name in stage.stats:
                family.add_metric((stage.stage,), stage.stats[name])
        yield family


def _family(
    name: str, text: str, labels: tuple[str, ...]
) -> CounterMetricFamily | GaugeMetricFamily:
    if name.endswith(COUNTER_SUFFIX):
        return CounterMetricFamily(name.removesuffix(COUNTER_SUFFIX), text, labels=labels)
    return GaugeMetricFamily(name, text, labels=labels)
