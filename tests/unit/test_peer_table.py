"""The arithmetic of the comparison with peers, on made-up figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint import Tensor
from benchmarks.peer_table import (
    DECODE,
    LONG,
    Bar,
    Outcome,
    Row,
    bars,
    cell,
    costs_of,
    format_table,
    format_verdicts,
    judge,
    limit_row,
    make_row,
    throughput_case,
)
from benchmarks.peers import TYPES, CannotRun, Contender, Setup, parse_contender
from benchmarks.prompts import Prompts
from benchmarks.same_model import agreement
from benchmarks.vs_peers_cpu import make_cases, measure_server
from executor_svc.make_model import make_model

CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
}


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, Path("file"), "BF16", shape, 0)


def row(name: str, **cells: float | str) -> Row:
    return Row(name=name, cells=dict(cells))


def test_a_tied_embedding_is_the_head_and_an_untied_one_costs_nothing() -> None:
    layers = [
        tensor("model.layers.0.mlp.up_proj.weight", 10, 7),
        tensor("model.norm.weight", 99),
    ]
    embedding = tensor("model.embed_tokens.weight", 100, 7)
    tied = costs_of(CONFIG, iter([*layers, embedding]))
    untied = costs_of(CONFIG, iter([*layers, embedding, tensor("lm_head.weight", 50, 7)]))
    assert (tied.num_layer_weights, tied.num_weights) == (70, 770)
    assert (untied.num_layer_weights, untied.num_weights) == (70, 420)
    assert (tied.num_layers, tied.kv_width, tied.attention_width) == (3, 16, 32)


def test_costs_count_weights_keys_and_values_and_both_products_of_attention() -> None:
    costs = costs_of(CONFIG, iter([tensor("x.layers.0.w", 10, 10), tensor("embed", 3, 10)]))
    # 160 tokens stand in the cache halfway through 64 behind 128.
    assert costs.step_bytes(2, 2, rows=3) == 130 * 2 + 3 * (2 * 3 * 16 * 160 * 2)
    # Two products of 2 operations each, over half of all pairs.
    assert costs.prefill_flops(8) == 2 * (100 * 8 + 30) + 4 * (8 * 8 / 2) * 3 * 32


def test_a_cell_is_the_median_of_the_rounds_that_have_it() -> None:
    rounds: list[dict[str, Outcome]] = [{"a": {"x": 1.0}}, {"a": "broke"}, {"a": {"x": 3.0}}]
    assert cell(rounds, "a", "x") == 2.0
    assert cell(rounds[1:2], "a", "x") == "broke"
    assert cell([], "a", "x") == "not measured"


def test_a_row_holds_shares_of_the_limits_and_says_what_is_missing() -> None:
    decode = {"tpot_ms_p50": 20.0, "ttft_ms_p50": 300.0, "tokens_per_s": 1.0}
    crowd = {"tpot_ms_p50": 50.0, "ttft_ms_p50": 9.0, "tokens_per_s": 160.0}
    found: dict[str, Outcome] = {DECODE: decode, throughput_case(8): crowd, LONG: "too long"}
    cells = make_row("x", [found], [8], least_step_s=0.015, least_long_s=1.0)["cells"]
    assert cells == {
        "batch_1_ms": 20.0,
        "batch_8_ms": 50.0,
        "tokens_per_s_8": 160.0,
        "ttft_short_ms": 300.0,
        "ttft_long_ms": "too long",
        "read_share": pytest.approx(0.75),
        "flops_share": "too long",
    }


@pytest.mark.parametrize(
    ("is_lower_better", "best", "ratio"),
    [(True, "vllm:float32", 1.5), (False, "vllm:bfloat16", 0.4)],
)
def test_a_bar_takes_the_best_of_its_peers(is_lower_better: bool, best: str, ratio: float) -> None:
    bar = Bar("text", "x", ("vllm:bfloat16", "vllm:float32"), 1.5, is_lower_better)
    rows = [
        row("headrace:bfloat16", x=10.0),
        row("vllm:bfloat16", x=25.0),
        row("vllm:float32", x=15.0),
        row("llama-server:bf16", x=1.0 if is_lower_better else 99.0),
    ]
    verdict = judge(bar, rows)
    assert verdict["best_peer"] == best
    assert verdict["ratio"] == pytest.approx(ratio)
    assert verdict["is_met"] is (ratio >= 1.5)


def test_a_bar_without_figures_is_not_met_and_shown() -> None:
    bar = Bar("text", "x", ("vllm:bfloat16",), 1.5)
    for rows in (
        [row("headrace:bfloat16", x=1.0), row("vllm:bfloat16", x="does not start")],
        [row("headrace:bfloat16", x="does not start"), row("vllm:bfloat16", x=1.0)],
    ):
        verdict = judge(bar, rows)
        assert verdict["ratio"] is None
        assert not verdict["is_met"]
        assert "| text | no figure | - | 1.5x | - |" in format_verdicts([verdict])


def test_the_bars_are_those_of_columns_that_every_row_has() -> None:
    columns = make_row("x", [], [8, 16], 1.0, 1.0)["cells"]
    assert all(bar.column in columns for bar in bars([8, 16]))
    assert (
        limit_row(costs_of(CONFIG, iter([])), [8, 16], 1.0, 1.0)["cells"].keys() == columns.keys()
    )


def test_missing_figures_point_to_their_reason() -> None:
    rows = [
        row("a", batch_1_ms=1234.56, read_share=0.5),
        row("b", batch_1_ms="no", read_share="no"),
    ]
    assert format_table(rows).splitlines() == [
        "| | batch 1, ms a token | of read limit |",
        "| --- | ---: | ---: |",
        "| a | 1,234.6 | 50% |",
        "| b | - [1] | - [1] |",
        "[1] no",
    ]


def test_every_contender_is_known_by_its_name() -> None:
    for kind, types in TYPES.items():
        for name in types:
            assert parse_contender(f"{kind}:{name}") == Contender(kind, name)
            assert Contender(kind, name).bytes_per_weight > 0
    with pytest.raises(ValueError, match=r"llama-server:\{bf16,"):
        parse_contender("llama-server:bfloat16")


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("vllm:float32", "--vllm-venv"),
        ("llama-server:bf16", "--llama-server"),
        ("llama-cpp-python:bf16", "--llama-venv"),
    ],
)
def test_a_peer_that_is_not_there_names_its_flag(name: str, flag: str, tmp_path: Path) -> None:
    setup = Setup(model=tmp_path, gguf_folder=tmp_path, max_num_seqs=4, context=100)
    with pytest.raises(CannotRun, match=f"{flag} is not given"):
        parse_contender(name).peer(setup)


def test_each_client_of_llama_server_has_room_for_a_whole_request(tmp_path: Path) -> None:
    (tmp_path / f"{tmp_path.name}-bf16.gguf").touch()
    setup = Setup(tmp_path, tmp_path, max_num_seqs=4, context=100, llama_server=tmp_path)
    command = parse_contender("llama-server:bf16").peer(setup).command
    assert command[command.index("--ctx-size") + 1] == "400"
    assert command[command.index("--parallel") + 1] == "4"


def test_agreement_ends_at_the_first_difference() -> None:
    found = agreement("x", ["abc", "abd", "", "q"], ["abc", "abc", "z", "q"])
    assert (found.num_equal, found.same_characters, found.all_characters) == (2, 6, 8)
    assert not found.is_whole


def test_a_contender_that_cannot_run_is_shown_in_every_case(tmp_path: Path) -> None:
    make_model("tiny-qwen3", tmp_path / "m", vocab_size=300)
    setup = Setup(tmp_path / "m", tmp_path, max_num_seqs=4, context=100)
    cases = make_cases([8], requests_per_client=3)
    prompts = Prompts(setup.model)
    found = measure_server(Contender("vllm", "float32"), setup, cases, prompts, seed=0)
    assert found.keys() == {DECODE, LONG, throughput_case(8)}
    assert all("--vllm-venv is not given" in str(reason) for reason in found.values())
