"""What `headrace bench steps` tells: rows for the table and for the JSON file."""

from __future__ import annotations

import msgspec

from stages.bench.figures import ModeFigures

SEQUENTIAL = "sequential"
OVERLAPPED = "overlapped"
MODES = (SEQUENTIAL, OVERLAPPED)

HEADING = (
    f"{'batch':>5} {'mode':<10} {'step ms':>8} {'busy':>6} {'idle us p50':>11} {'p99':>7} "
    f"{'exposed us':>10} {'launch us':>9} {'CPU us':>7} {'tokens/s':>8} {'ITL ms p50':>10} "
    f"{'p99':>7} {'exposed ratio':>13}"
)


class Row(msgspec.Struct, frozen=True):
    """One batch size; `exposed_ratio`: exposed host time, sequential over overlapped."""

    batch: int
    exposed_ratio: float
    sequential: ModeFigures
    overlapped: ModeFigures

    def table(self) -> str:
        """Its two lines below `HEADING`."""
        return "\n".join(
            [
                _line(self.batch, SEQUENTIAL, self.sequential),
                _line(self.batch, OVERLAPPED, self.overlapped) + f" {self.exposed_ratio:>12.1f}x",
            ]
        )


class Report(msgspec.Struct, frozen=True):
    """What `--json` holds. `step_ms` and `token_us` are those of the emulated device."""

    rows: list[Row]
    device: str
    enforce_eager: bool
    step_ms: float
    token_us: float
    seconds: float
    rounds: int


def make_row(batch: int, sequential: ModeFigures, overlapped: ModeFigures) -> Row:
    """Set the two modes against each other."""
    ratio = sequential.exposed_host_us / overlapped.exposed_host_us
    return Row(batch, ratio, sequential, overlapped)


def _line(batch: int, mode: str, figures: ModeFigures) -> str:
    return (
        f"{batch:>5} {mode:<10} {figures.step_ms:>8.3f} {figures.device_busy:>6.1%} "
        f"{figures.idle_us_p50:>11.1f} {figures.idle_us_p99:>7.1f} "
        f"{figures.exposed_host_us:>10.1f} {figures.launch_us_p50:>9.0f} "
        f"{sum(figures.host_cpu_us.values()):>7.0f} "
        f"{figures.tokens_per_s:>8.0f} {figures.itl_ms_p50:>10.2f} {figures.itl_ms_p99:>7.2f}"
    )
