"""`headrace perplexity`: the figure itself on models whose perplexity is known, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, KvSpec
from executor_svc.perplexity import (
    WINDOW_TOKENS,
    Token,
    embedded_chats,
    perplexity,
    print_perplexity,
)
from stages.errors import ConfigError
from stages.model_folder import embedded_model

VOCAB_SIZE = 50


class _KnownModel:
    """Gives the token after t, which is t + 1, `odds` times the weight of any other."""

    kv_spec = KvSpec(1, 1, 2, torch.float32)

    def __init__(self, odds: float) -> None:
        self._log_odds = torch.tensor(odds).log()
        self.positions: list[int] = []

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        self.positions += batch.positions.tolist()
        logits = torch.zeros(len(batch.token_ids), VOCAB_SIZE)
        logits[torch.arange(len(logits)), (batch.token_ids + 1) % VOCAB_SIZE] = self._log_odds
        return logits[batch.logits_indices]


def _count_up(num_tokens: int) -> list[Token]:
    return [(n % VOCAB_SIZE, True) for n in range(num_tokens)]


def test_equal_odds_are_the_size_of_the_vocabulary() -> None:
    found, count = perplexity(_KnownModel(1.0), _count_up(100))
    assert found == pytest.approx(VOCAB_SIZE) and count == 99


@pytest.mark.parametrize("num_tokens", [2, 129, WINDOW_TOKENS + 1, WINDOW_TOKENS + 2, 1300])
def test_known_odds_in_any_number_of_windows(num_tokens: int) -> None:
    model = _KnownModel(51.0)
    found, count = perplexity(model, _count_up(num_tokens))
    assert found == pytest.approx((51 + VOCAB_SIZE - 1) / 51)
    windows = -(-num_tokens // WINDOW_TOKENS)
    assert count == num_tokens - windows
    assert model.positions[: WINDOW_TOKENS - 1] == [*range(min(num_tokens, WINDOW_TOKENS) - 1)]


def test_only_scored_tokens_count() -> None:
    tokens = [(0, True), (1, True), (7, False), (8, True)]
    found, count = perplexity(_KnownModel(51.0), tokens)
    assert found == pytest.approx((51 + VOCAB_SIZE - 1) / 51) and count == 2


def test_of_the_embedded_chats_the_answers_are_scored() -> None:
    pieces = [*embedded_chats()][:30]
    scored = "".join(text for text, is_scored in pieces if is_scored)
    assert scored and "assistant" not in scored and scored.endswith("<|im_end|>")


def test_the_table_and_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("Hello. I am Headrace, a very small model.")
    out = tmp_path / "figures.json"
    kinds = "float32,int8"
    print_perplexity(embedded_model(), str(tmp_path / "text"), kinds, 100, str(out))
    figures = json.loads(out.read_bytes())
    assert [figure["weights"] for figure in figures] == kinds.split(",")
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=0.05)
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "float32"


@pytest.mark.parametrize(
    ("text", "weights", "num_tokens", "message"),
    [
        ("absent", "", 10, "No such file"),
        (None, "int9", 10, "--weights int9 is not known; there are auto, float32"),
        (None, "", 1, "must leave two tokens"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, text: str | None, weights: str, num_tokens: int, message: str
) -> None:
    path = None if text is None else str(tmp_path / text)
    with pytest.raises(ConfigError, match=message):
        print_perplexity(embedded_model(), path, weights, num_tokens, None)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        print_perplexity(tmp_path, None, "", 10, None)
