"""The line about load that vLLM's users know, made from what the scheduler says of itself."""

from __future__ import annotations

from collections.abc import Mapping

PERIOD_S = 10.0


class ThroughputLog:
    """Turns counters into rates, one line a period; silent while nothing happens."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._last: Mapping[str, float] = {}
        self._was_busy = False

    def line(self, stats: Mapping[str, float], now_s: float) -> str | None:
        """The line for the period that ends now, or None if none ends or nothing happened in it.

        `stats`: the scheduler's newest (see `Stage.stats`); `now_s`: a monotonic clock.
        """
        seconds = now_s - self._since_s
        if seconds < PERIOD_S or not stats:
            return None
        prompt = self._since_last(stats, "prompt_tokens_total")
        generated = self._since_last(stats, "generation_tokens_total")
        running = stats.get("num_requests_running", 0)
        waiting = stats.get("num_requests_waiting", 0)
        is_first = not self._last
        self._since_s, self._last = now_s, dict(stats)
        is_busy = bool(prompt or generated or running or waiting)
        # One idle line more tells that the last burst is over.
        is_told, self._was_busy = is_busy or self._was_busy, is_busy
        if is_first or not is_told:
            return None
        return (
            f"Engine 000: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {running:.0f} reqs, Waiting: {waiting:.0f} reqs, "
            f"KV cache usage: {stats.get('kv_cache_usage_perc', 0):.1%}, "
            f"Prefix cache hit rate: {_hit_rate(stats):.1%}"
        )

    def _since_last(self, stats: Mapping[str, float], name: str) -> float:
        """How much a counter grew; a restarted scheduler counts from zero."""
        return max(0.0, stats.get(name, 0.0) - self._last.get(name, 0.0))


def _hit_rate(stats: Mapping[str, float]) -> float:
    queries = stats.get("prefix_cache_queries_total", 0.0)
    return stats.get("prefix_cache_hits_total", 0.0) / queries if queries else 0.0
