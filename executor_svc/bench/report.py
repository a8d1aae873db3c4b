"""What `headrace bench latency` tells: a table, and the same figures as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles

import msgspec

from executor_svc.bench.work import Work
from executor_svc.ops.native.limits import Limits

HEADING = (
    f"{'':8} {'ms p50':>9} {'ms min':>9} {'ms p90':>9} {'tokens/s':>9} "
    f"{'MB read':>9} {'GFLOP':>8} {'bandwidth':>9} {'flops':>6}"
)


class Phase(msgspec.Struct, frozen=True):
    """The whole prefill, or one decode step.

    `tokens_per_s`: prompt tokens, or output tokens, of all rows, at the median time.
    `bytes` and `flops`: what must be read (weights and KV) and computed; of decode steps the mean.
    `bandwidth_share` and `flops_share`: these over the median time and over the machine's limits.
    The last four are null for a model that is not of a native family, the shares also without
    the compiled kernels, which measure the limits.
    """

    ms_p50: float
    ms_min: float
    ms_p90: float
    tokens_per_s: float
    bytes: float | None
    flops: float | None
    bandwidth_share: float | None
    flops_share: float | None


class Report(msgspec.Struct, frozen=True):
    """What `--json` holds; keys are only ever added.

    `num_threads`: of the executor and of the measured limits. `latency_ms_p50`: prefill and all
    decode steps of a round. `decode` is null with an output of one token, which comes from the
    prefill. `read_bytes_per_s` is the best pass before the rounds, `paired_bandwidth_share` the
    median over the rounds of decode's bytes over its median step, over the median pass right
    before and after: like with like where a machine's memory has better and worse minutes.
    """

    model: str
    dtype: str
    num_threads: int
    batch_size: int
    input_len: int
    output_len: int
    rounds: int
    read_bytes_per_s: float | None
    flops_per_s: float | None
    prefill: Phase
    decode: Phase | None
    latency_ms_p50: float
    paired_bandwidth_share: float | None = None

    def table(self) -> str:
        """For people."""
        limits = "limits not measured: no compiled kernels"
        if self.read_bytes_per_s is not None and self.flops_per_s is not None:
            read, flops = self.read_bytes_per_s / 1e9, self.flops_per_s / 1e9
            limits = f"measured limits: read {read:.1f} GB/s, {flops:.0f} GFLOP/s"
        lines = [
            f"{self.model}, {self.dtype}, {self.num_threads} threads: {self.batch_size} x "
            f"({self.input_len} in, {self.output_len} out), {self.rounds} rounds",
            limits,
            HEADING,
            _line("prefill", self.prefill),
        ]
        if self.decode is not None:
            lines.append(_line("decode", self.decode))
        if self.paired_bandwidth_share is not None:
            share = self.paired_bandwidth_share
            lines.append(f"decode reads at {share:.1%} of the bandwidth measured beside each round")
        return "\n".join([*lines, f"whole round: {self.latency_ms_p50:.3f} ms"])


def make_phase(
    times_ns: Sequence[int], num_tokens: int, work: Work | None, limits: Limits | None
) -> Phase:
    """The figures of equal pieces of work; `num_tokens` and `work` are those of one piece."""
    seconds = median(times_ns) / 1e9
    return Phase(
        ms_p50=seconds * 1e3,
        ms_min=min(times_ns) / 1e6,
        ms_p90=_p90(times_ns) / 1e6,
        tokens_per_s=num_tokens / seconds,
        bytes=work.num_bytes if work else None,
        flops=work.flops if work else None,
        bandwidth_share=work.num_bytes / seconds / limits.read if work and limits else None,
        flops_share=work.flops / seconds / limits.flops if work and limits else None,
    )


def _p90(times_ns: Sequence[int]) -> float:
    return quantiles(times_ns, n=10)[-1] if len(times_ns) > 1 else times_ns[0]


def _line(name: str, phase: Phase) -> str:
    mb = "-" if phase.bytes is None else f"{phase.bytes / 1e6:.1f}"
    gflop = "-" if phase.flops is None else f"{phase.flops / 1e9:.3f}"
    shares = ("-" if s is None else f"{s:.1%}" for s in (phase.bandwidth_share, phase.flops_share))
    bandwidth, flops = shares
    return (
        f"{name:8} {phase.ms_p50:>9.3f} {phase.ms_min:>9.3f} {phase.ms_p90:>9.3f} "
        f"{phase.tokens_per_s:>9.0f} {mb:>9} {gflop:>8} {bandwidth:>9} {flops:>6}"
    )
