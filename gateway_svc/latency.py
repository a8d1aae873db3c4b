"""Times of requests as a client sees them, collected into histograms.

With several gateways each tells its own as plain figures, and any of them can add up all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway_svc.deliveries import Delivery, Delta
from stages.messages import FinishReason, RequestRejected, RequestStarted

SHORT_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
    5.0,
)  # fmt: skip
LONG_BUCKETS = (
    0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS = tuple(float(2**exponent) for exponent in range(18))

FINISHED = "finished"
FIGURE_SEPARATOR = ":"


class Histogram:
    """Counts of observations in buckets; `observe` costs a bisection, no lock: one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    def figures(self) -> dict[str, float]:
        """Everything that is not 0, by short names: the reverse of `add`."""
        counts = {str(index): float(count) for index, count in enumerate(self._counts) if count}
        return counts | ({"sum": self.sum} if self.sum else {})

    def add(self, name: str, figure: float) -> None:
        """Add one of another histogram's `figures`."""
        if name == "sum":
            self.sum += figure
        else:
            self._counts[int(name)] += int(figure)

    def buckets(self) -> list[tuple[str, float]]:
        """Give (upper bound, observations up to it), the last one '+Inf'."""
        total = 0.0
        result = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            result.append((bound, total))
        return result


@dataclass(slots=True)
class RequestTimes:
    """Moments of one request in seconds of one clock, and its token counts."""

    opened: float
    started: float
    first_token: float = 0.0
    last_token: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


class Latencies:
    """Histograms over all requests, by the names that vLLM gives them."""

    def __init__(self) -> None:
        self.histograms = {
            "time_to_first_token_seconds": Histogram(LONG_BUCKETS),
            "inter_token_latency_seconds": Histogram(SHORT_BUCKETS),
            "request_time_per_output_token_seconds": Histogram(SHORT_BUCKETS),
            "e2e_request_latency_seconds": Histogram(LONG_BUCKETS),
            "request_queue_time_seconds": Histogram(LONG_BUCKETS),
            "request_prefill_time_seconds": Histogram(LONG_BUCKETS),
            "request_decode_time_seconds": Histogram(LONG_BUCKETS),
            "request_prompt_tokens": Histogram(TOKEN_BUCKETS),
            "request_generation_tokens": Histogram(TOKEN_BUCKETS),
        }
        self.finished: Counter[str] = Counter()

    @classmethod
    def merged(cls, figures: Iterable[Mapping[str, float]]) -> Latencies:
        """Add up what several gateways told with `figures`; other names are passed over."""
        merged = cls()
        for own in figures:
            for name, figure in own.items():
                family, separator, part = name.partition(FIGURE_SEPARATOR)
                if separator and family == FINISHED:
                    merged.finished[part] += int(figure)
                elif separator:
                    merged.histograms[family].add(part, figure)
        return merged

    def figures(self) -> dict[str, float]:
        """Everything as numbers under names that no other figure of a stage has."""
        figures = {
            f"{family}{FIGURE_SEPARATOR}{part}": figure
            for family, histogram in self.histograms.items()
            for part, figure in histogram.figures().items()
        }
        return figures | {
            f"{FINISHED}{FIGURE_SEPARATOR}{reason}": float(count)
            for reason, count in self.finished.items()
        }

    def observe(self, times: RequestTimes, delivery: Delivery, now: float) -> None:
        """Note a delivery of a request at `now`, on the clock of `times.opened`."""
        if isinstance(delivery, Delta):
            if delivery.token_ids:
                self._observe_tokens(times, delivery.num_tokens, now)
            if delivery.finish_reason:
                self.end(times, FinishReason(delivery.finish_reason), now)
        elif isinstance(delivery, RequestStarted):
            times.started = now
            times.num_prompt_tokens = delivery.num_prompt_tokens
            self.histograms["request_queue_time_seconds"].observe(now - times.opened)
        elif isinstance(delivery, RequestRejected):
            self.finished["error"] += 1

    def _observe_tokens(self, times: RequestTimes, count: int, now: float) -> None:
        if times.first_token:
            gap = (now - times.last_token) / count
            self.histograms["inter_token_latency_seconds"].observe(gap, count)
        else:
            times.first_token = now
            self.histograms["time_to_first_token_seconds"].observe(now - times.opened)
            self.histograms["request_prefill_time_seconds"].observe(now - times.started)
        times.last_token = now
        times.num_output_tokens += count

    def end(self, times: RequestTimes, reason: FinishReason, now: float) -> None:
        """Note the end of a request; an aborted one counts but has no latency."""
        self.finished[reason.name.lower()] += 1
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        decode = times.last_token - times.first_token
        self.histograms["e2e_request_latency_seconds"].observe(now - times.opened)
        self.histograms["request_decode_time_seconds"].observe(decode)
        self.histograms["request_prompt_tokens"].observe(times.num_prompt_tokens)
        self.histograms["request_generation_tokens"].observe(times.num_output_tokens)
        if times.num_output_tokens > 1:
            per_token = decode / (times.num_output_tokens - 1)
            self.histograms["request_time_per_output_token_seconds"].observe(per_token)
