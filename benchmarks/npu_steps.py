"""What recording decode steps saves the host of an Ascend NPU, beside the emulated CANN's clock.

Runs `headrace bench steps --device npu` twice, with recorded steps and eagerly. Torch, torch_npu
and the executor are the real ones; the card is `tests/emulated_cann`, whose clock is a model of a
910B and which computes nothing. Host times are thus real, those of the device are not a card's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from stages.bench.figures import ModeFigures
from stages.bench.report import Report, Row
from tests.emulated_cann.load import environment

# What a recorded step has to reach: an eager one's launch time over its own, and the device's share
# of the step.
MIN_LAUNCH_RATIO = 10.0
MIN_BUSY = 0.95

HEADING = (
    f"{'batch':>5} {'steps':<9} {'launch us':>9} {'device us':>9} {'step us':>8} {'busy':>6} "
    f"{'eager / captured':>16}"
)


def measure(arguments: argparse.Namespace, enforce_eager: bool) -> list[Row]:
    """One run of the command, under the emulator."""
    env = environment(clock=1, compute=0, mem_mb=arguments.memory_mb)
    with TemporaryDirectory(prefix="npu-steps-") as folder:
        path = Path(folder) / "steps.json"
        command = [
            *(sys.executable, "-m", "stages.cli", "bench", "steps", arguments.model),
            *("--device", "npu", "--batch", arguments.batch, "--json", str(path)),
            *("--seconds", str(arguments.seconds), "--rounds", str(arguments.rounds)),
            *(["--enforce-eager"] if enforce_eager else []),
        ]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return msgspec.json.decode(path.read_bytes(), type=Report).rows


def table(captured: Sequence[Row], eager: Sequence[Row]) -> str:
    """Both ways at each batch size, overlapped, with the ratio of their launch times.

    busy: device time over step time. An eager step's device time holds the gaps in which the card
    waits for its next kernel, so its work is taken to be that of the captured step.
    """
    lines = [HEADING]
    for one, other in zip(captured, eager, strict=True):
        fast, slow = one.overlapped, other.overlapped
        work_us = _device_us(fast)
        ratio = _launch_ratio(one, other)
        lines.append(f"{_line(one.batch, 'captured', fast, work_us)} {ratio:>15.1f}x")
        lines.append(_line(other.batch, "eager", slow, min(work_us, _device_us(slow))))
    return "\n".join(lines)


def bars(captured: Row, eager: Row) -> str:
    """What the recorded steps of one batch size reach, beside what they have to."""
    ratio, busy = _launch_ratio(captured, eager), captured.overlapped.device_busy
    reached = (
        (
            f"launch eager / captured {ratio:.1f}",
            f"{MIN_LAUNCH_RATIO:g}",
            ratio >= MIN_LAUNCH_RATIO,
        ),
        (f"device busy {busy:.1%}", f"{MIN_BUSY:.0%}", busy >= MIN_BUSY),
    )
    return "\n".join(
        f"batch {captured.batch}: {text}, bar {bar}: {'met' if is_met else 'missed'}"
        for text, bar, is_met in reached
    )


def _launch_ratio(captured: Row, eager: Row) -> float:
    return eager.overlapped.launch_us_p50 / captured.overlapped.launch_us_p50


def _device_us(figures: ModeFigures) -> float:
    return figures.device_busy * figures.step_ms * 1e3


def _line(batch: int, kind: str, figures: ModeFigures, work_us: float) -> str:
    step_us = figures.step_ms * 1e3
    return (
        f"{batch:>5} {kind:<9} {figures.launch_us_p50:>9.0f} {_device_us(figures):>9.0f} "
        f"{step_us:>8.0f} {work_us / step_us:>6.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder, such as one of headrace make-model")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=2, help="windows a mode and batch size")
    parser.add_argument("--memory-mb", type=int, default=8000, help="of the emulated card")
    arguments = parser.parse_args()
    captured, eager = (measure(arguments, enforce_eager) for enforce_eager in (False, True))
    print("Host times are real; the device's are those of a model (figures_910b.h), not a card's.")
    print(table(captured, eager))
    print(bars(captured[-1], eager[-1]))


if __name__ == "__main__":
    main()
