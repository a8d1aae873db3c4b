"""The arithmetic of `vs_peers_cpu`: from measured figures to a table, shares and ratios.

Pure: no servers, no torch. A figure that a contender does not have is a text that says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypedDict

from benchmarks.checkpoint import Tensor

Figures = dict[str, float]
Outcome = Figures | str
Rounds = Sequence[Mapping[str, Outcome]]
"""Of one contender, one entry a round: by the name of a case, its figures or why it has none."""
Cell = float | str

DECODE, LONG = "decode", "long"
SHORT_TOKENS, LONG_TOKENS, OUTPUT_TOKENS = 128, 1024, 64


@dataclass(frozen=True)
class Costs:
    """What the model costs: weights that a step multiplies, and the layers' part of them."""

    num_weights: int
    num_layer_weights: int
    num_layers: int
    kv_width: int
    attention_width: int

    def step_bytes(self, bytes_per_weight: float, kv_bytes: int, rows: int = 1) -> float:
        """Bytes that a step reads when its rows are halfway through their answers."""
        context = SHORT_TOKENS + OUTPUT_TOKENS // 2
        kv = 2 * self.num_layers * self.kv_width * context * kv_bytes
        return self.num_weights * bytes_per_weight + rows * kv

    def prefill_flops(self, tokens: int) -> float:
        """Operations of a prompt of so many tokens; the head takes the last one only."""
        head = self.num_weights - self.num_layer_weights
        attention = 2 * tokens * tokens * self.num_layers * self.attention_width
        return 2.0 * (self.num_layer_weights * tokens + head) + attention


def costs_of(config: Mapping[str, Any], tensors: Iterator[Tensor]) -> Costs:
    """Count a checkpoint's matrices; an embedding that is not the head is looked up, not read."""
    layers = head = embedding = 0
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue
        if ".layers." in tensor.name:
            layers += tensor.size
        elif tensor.name == "lm_head.weight":
            head += tensor.size
        else:
            embedding += tensor.size
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_width = config["num_key_value_heads"] * dim
    return Costs(
        layers + (head or embedding), layers, config["num_hidden_layers"], kv_width, heads * dim
    )


def throughput_case(concurrency: int) -> str:
    """The name of the case with so many clients."""
    return f"{concurrency} clients"


class Row(TypedDict):
    """One contender: medians over the rounds, or the reason why there is no figure.

    The keys of `cells` are the same in all rows; times in milliseconds, shares of 1.
    """

    name: str
    cells: dict[str, Cell]


def cell(rounds: Rounds, case: str, figure: str) -> Cell:
    """The median over the rounds that have the figure; without any, the last reason.

    An answer that came in one event has no time a token.
    """
    reason = "not measured"
    found = []
    for outcomes in rounds:
        outcome = outcomes.get(case, reason)
        if isinstance(outcome, str):
            reason = outcome
        elif outcome[figure] == 0:
            reason = f"{case}: answers came in one event"
        else:
            found.append(outcome[figure])
    return median(found) if found else reason


def make_row(
    name: str,
    rounds: Rounds,
    concurrencies: Sequence[int],
    least_step_s: float,
    least_long_s: float,
) -> Row:
    """Give the row of a contender.

    `least_step_s` is what reading takes that this contender must do for a token, `least_long_s`
    what the arithmetic of the long prompt takes: the shares come from them.
    """
    cells: dict[str, Cell] = {"batch_1_ms": cell(rounds, DECODE, "tpot_ms_p50")}
    for number in concurrencies:
        case = throughput_case(number)
        cells[f"batch_{number}_ms"] = cell(rounds, case, "tpot_ms_p50")
        cells[f"tokens_per_s_{number}"] = cell(rounds, case, "tokens_per_s")
    cells["ttft_short_ms"] = cell(rounds, DECODE, "ttft_ms_p50")
    cells["ttft_long_ms"] = cell(rounds, LONG, "ttft_ms_p50")
    cells["read_share"] = _share(least_step_s, cells["batch_1_ms"])
    cells["flops_share"] = _share(least_long_s, cells["ttft_long_ms"])
    return Row(name=name, cells=cells)


def _share(least_s: float, took_ms: Cell) -> Cell:
    return took_ms if isinstance(took_ms, str) else least_s / (took_ms / 1e3)


def limit_row(costs: Costs, concurrencies: Sequence[int], read: float, flops: float) -> Row:
    """Give what the machine allows with weights of 16 bits.

    `read` is in bytes, `flops` in operations on such weights a second.
    """
    cells: dict[str, Cell] = {"batch_1_ms": 1e3 * costs.step_bytes(2, 2) / read}
    for number in concurrencies:
        cells[f"batch_{number}_ms"] = 1e3 * costs.step_bytes(2, 2, number) / read
        cells[f"tokens_per_s_{number}"] = ""
    cells["ttft_short_ms"] = 1e3 * costs.prefill_flops(SHORT_TOKENS) / flops
    cells["ttft_long_ms"] = 1e3 * costs.prefill_flops(LONG_TOKENS) / flops
    return Row(name="limit", cells=cells | {"read_share": "", "flops_share": ""})


@dataclass(frozen=True)
class Bar:
    """One line of the issue's table: our figure against the best of some contenders."""

    text: str
    column: str
    peers: tuple[str, ...]
    least_ratio: float
    is_lower_better: bool = True


LLAMA_16 = tuple(
    f"{kind}:{name}" for kind in ("llama-server", "llama-cpp-python") for name in ("bf16", "f16")
)
VLLM = ("vllm:bfloat16", "vllm:float16", "vllm:float32")
OURS = "headrace:bfloat16"


def bars(concurrencies: Sequence[int]) -> Iterator[Bar]:
    """Give what Headrace is held to; llama.cpp counts with weights as exact as ours."""
    yield Bar("decode, 1 client, vLLM's best dtype", "batch_1_ms", VLLM, 1.9)
    yield Bar("decode, 1 client, llama.cpp BF16/F16", "batch_1_ms", LLAMA_16, 1.1)
    for number in concurrencies:
        column = f"tokens_per_s_{number}"
        yield Bar(f"throughput, {number} clients, vLLM's best dtype", column, VLLM, 2.0, False)
        yield Bar(f"throughput, {number} clients, llama.cpp", column, LLAMA_16, 1.5, False)
    for text, column in ((SHORT_TOKENS, "ttft_short_ms"), (LONG_TOKENS, "ttft_long_ms")):
        yield Bar(f"TTFT of {text} tokens, better of both", column, VLLM + LLAMA_16, 1.2)


class Verdict(TypedDict):
    """A bar as measured. `ratio`: how many times better we are; None if a side has no figure."""

    text: str
    best_peer: str | None
    ratio: float | None
    bar: float
    is_met: bool


def judge(bar: Bar, rows: Sequence[Row]) -> Verdict:
    """Hold our row against the best of the bar's peers."""
    figures = {
        row["name"]: value for row in rows if not isinstance(value := row["cells"][bar.column], str)
    }
    rivals = {name: figures[name] for name in bar.peers if name in figures}
    if not rivals or OURS not in figures:
        return Verdict(text=bar.text, best_peer=None, ratio=None, bar=bar.least_ratio, is_met=False)
    pick = min if bar.is_lower_better else max
    best = pick(rivals, key=lambda name: rivals[name])
    ratio = rivals[best] / figures[OURS] if bar.is_lower_better else figures[OURS] / rivals[best]
    return Verdict(
        text=bar.text,
        best_peer=best,
        ratio=ratio,
        bar=bar.least_ratio,
        is_met=ratio >= bar.least_ratio,
    )


_HEADINGS = {
    "batch_1_ms": "batch 1, ms a token",
    "ttft_short_ms": f"TTFT of {SHORT_TOKENS}, ms",
    "ttft_long_ms": f"TTFT of {LONG_TOKENS}, ms",
    "read_share": "of read limit",
    "flops_share": "of arithmetic limit",
}


def format_table(rows: Sequence[Row]) -> str:
    """Write Markdown; reasons for missing figures stand below it, each with a number."""
    columns = list(rows[0]["cells"])
    reasons: list[str] = []
    lines = [
        "| | " + " | ".join(map(_heading, columns)) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for row in rows:
        texts = [_format(column, row["cells"][column], reasons) for column in columns]
        lines.append(f"| {row['name']} | " + " | ".join(texts) + " |")
    lines += [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines)


def _heading(column: str) -> str:
    if column in _HEADINGS:
        return _HEADINGS[column]
    number = "".join(filter(str.isdigit, column))
    return f"{number} clients, " + ("ms a step" if column.startswith("batch") else "tokens/s")


def _format(column: str, value: Cell, reasons: list[str]) -> str:
    if value == "":
        return ""
    if isinstance(value, str):
        if value not in reasons:
            reasons.append(value)
        return f"- [{reasons.index(value) + 1}]"
    return f"{value:.0%}" if column.endswith("_share") else f"{value:,.1f}"


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Write Markdown, a line a bar."""
    lines = [
        "| Headrace against | best of them | ratio | bar | |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for one in verdicts:
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}x"
        word = "-" if one["ratio"] is None else "met" if one["is_met"] else "missed"
        best = one["best_peer"] or "no figure"
        lines.append(f"| {one['text']} | {best} | {ratio} | {one['bar']:.1f}x | {word} |")
    return "\n".join(lines)
