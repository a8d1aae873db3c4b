"""`headrace bench steps`: what a step costs the device, overlapped and sequential, in one run.

Two groups stand side by side, one with overlap and one without; the load goes to them in turn, so
that whatever else the machine does hits both. An idle group costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import msgspec

from stages.bench.client import MODEL_NAME, Client, StreamFigures
from stages.bench.figures import ModeFigures, SteadySteps, mode_figures, steady_steps
from stages.bench.group import BenchGroup, serving
from stages.bench.plot import Lanes, check_plot, write_plot
from stages.bench.report import HEADING, MODES, OVERLAPPED, SEQUENTIAL, Report, Row, make_row
from stages.errors import ConfigError
from stages.model_folder import embedded_model, read_model_facts
from stages.topology import EXECUTOR
from stages.trace import Events, read_trace

# The emulated device has no limit of its own: streams outlast every window.
EMULATED_MODEL_LEN = 64 * 1024
# Of a stream: the prompt, and some room.
RESERVED_TOKENS = 64
PLOT_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """What to measure. `seconds`: length of a window; each mode gets `rounds` windows a batch."""

    model: str | None
    device: str
    enforce_eager: bool
    cpu_kernels: str | None
    step_ms: float
    token_us: float
    batches: Sequence[int]
    seconds: float
    rounds: int
    json_path: Path | None
    plot_path: Path | None
    plot_batch: int | None


@dataclass
class Measurement:
    """The windows of one mode at one batch size."""

    steps: list[SteadySteps] = field(default_factory=list)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    streams: list[StreamFigures] = field(default_factory=list)
    lanes: Lanes = field(default_factory=dict)


def bench_steps(options: Options) -> int:
    """Measure, print the table, write the files."""
    if options.plot_path is not None:
        check_plot(options.plot_path)
    plot_batch = _plot_batch(options)
    rows: list[Row] = []
    with _groups(options) as groups:
        print(HEADING)
        for batch in options.batches:
            measured = _measure_batch(groups, batch, options)
            rows.append(make_row(batch, *(_figures(batch, measured[mode]) for mode in MODES)))
            print(rows[-1].table(), flush=True)
            if options.plot_path is not None and batch == plot_batch:
                lanes = {mode: measured[mode].lanes for mode in MODES}
                write_plot(options.plot_path, lanes, f"{batch} streams, {_device_text(options)}")
    if options.json_path is not None:
        _write_json(options.json_path, rows, options)
    return 0


def parse_batches(text: str) -> list[int]:
    """Read '1,8,64'."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batch takes batch sizes such as 1,8,64, not {text!r}")
    return batches


@contextmanager
def _groups(options: Options) -> Iterator[dict[str, BenchGroup]]:
    """Both groups, ready."""
    common = serve_arguments(options)
    with ExitStack() as stack:
        yield {
            SEQUENTIAL: stack.enter_context(serving([*common, "--no-overlap"])),
            OVERLAPPED: stack.enter_context(serving([*common, "--overlap"])),
        }


def serve_arguments(options: Options) -> list[str]:
    """The flags of `headrace serve` that both groups have."""
    largest = max(options.batches)
    settings = {
        "--served-model-name": MODEL_NAME,
        "--device": options.device,
        "--max-num-seqs": largest,
        "--max-num-batched-tokens": max(1024, largest),
    }
    if options.device == "emulated":
        settings |= {
            "--emulated-step-ms": options.step_ms,
            "--emulated-token-us": options.token_us,
            "--max-model-len": EMULATED_MODEL_LEN,
        }
    model = [options.model] if options.model else []
    if options.enforce_eager:
        model.append("--enforce-eager")
    if options.cpu_kernels is not None:
        model += ["--cpu-kernels", options.cpu_kernels]
    return [*model, *(str(word) for setting in settings.items() for word in setting)]


def _max_tokens(options: Options) -> int:
    if options.device == "emulated":
        return EMULATED_MODEL_LEN - RESERVED_TOKENS
    folder = Path(options.model) if options.model else embedded_model()
    return max(1, read_model_facts(folder).max_position_embeddings - RESERVED_TOKENS)


def _measure_batch(
    groups: Mapping[str, BenchGroup], batch: int, options: Options
) -> dict[str, Measurement]:
    """A window of one mode, one of the other, and again."""
    measured = {mode: Measurement() for mode in MODES}
    max_tokens = _max_tokens(options)
    for _ in range(options.rounds):
        for mode in MODES:
            client = Client(groups[mode].url, batch, max_tokens)
            try:
                _measure_window(groups[mode], client, batch, options.seconds, measured[mode])
            finally:
                client.kill()
    return measured


def _measure_window(
    group: BenchGroup, client: Client, batch: int, seconds: float, into: Measurement
) -> None:
    client.wait_steady()
    client.measure()
    cpu_before, start_ns = group.cpu_seconds(), time.time_ns()
    time.sleep(seconds)
    cpu_after, end_ns = group.cpu_seconds(), time.time_ns()
    traces = {stage: read_trace(pid) for stage, pid in group.pids.items()}
    into.streams.append(client.stop())
    into.steps.append(steady_steps(traces[EXECUTOR], batch, start_ns, end_ns))
    into.seconds += (end_ns - start_ns) / 1e9
    for stage, cpu in cpu_after.items():
        into.cpu_seconds[stage] = into.cpu_seconds.get(stage, 0.0) + cpu - cpu_before[stage]
    into.lanes = {stage: _last_second(events, end_ns) for stage, events in traces.items()}


def _write_json(path: Path, rows: list[Row], options: Options) -> None:
    report = Report(
        rows,
        options.device,
        options.enforce_eager,
        options.step_ms,
        options.token_us,
        options.seconds,
        options.rounds,
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


def _last_second(events: Events, end_ns: int) -> Events:
    start_ns = end_ns - int(PLOT_SECONDS * 1e9)
    return events[(events["end_ns"] > start_ns) & (events["start_ns"] < end_ns)]


def _figures(batch: int, measured: Measurement) -> ModeFigures:
    share = {stage: cpu / measured.seconds for stage, cpu in measured.cpu_seconds.items()}
    figures = mode_figures(batch, measured.steps, share)
    return msgspec.structs.replace(
        figures,
        itl_ms_p50=fmean(stream.itl_ms_p50 for stream in measured.streams),
        itl_ms_p99=fmean(stream.itl_ms_p99 for stream in measured.streams),
        itl_ms_std=fmean(stream.itl_ms_std for stream in measured.streams),
    )


def _plot_batch(options: Options) -> int:
    """The batch size that is drawn: the one asked for, else 64 if measured, else the largest."""
    if options.plot_batch is not None:
        if options.plot_batch not in options.batches:
            raise ConfigError(f"--plot-batch {options.plot_batch} is not among --batch")
        return options.plot_batch
    return 64 if 64 in options.batches else max(options.batches)


def _device_text(options: Options) -> str:
    if options.device == "emulated":
        return f"emulated device of {options.step_ms:g} ms a step"
    return options.model or "the embedded model"
