"""On `--device npu` requests with `bad_words` say what they say on the CPU: emulated card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.columns import i32_bytes
from stages.messages import SamplingParams
from tests.emulated_cann.build import unavailable
from tests.golden.conftest import Golden
from tests.golden.npu_cases import run_cases
from tests.pipeline import Pipeline, make_config

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.timeout(300),
]

NUM_PROMPTS = 8
MAX_TOKENS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "eager": {"enforce_eager": True},
    "no overlap": {"overlap": False},
}


def fields(golden: Golden) -> dict[str, Any]:
    """Greedy, without a few words of one to three tokens that the model would say."""
    said = golden.expected[:NUM_PROMPTS]
    words = [tokens[i : i + 1 + i % 3] for i, tokens in enumerate(said, start=1)]
    return {
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "bad_word_ids": i32_bytes([token_id for word in words for token_id in word]),
        "bad_word_lens": i32_bytes([len(word) for word in words]),
    }


def test_equal_to_the_cpu(golden: Callable[[str], Golden], tmp_path: Path) -> None:

    wanted = golden("qwen3")
    params = fields(wanted)
    prompts = wanted.prompts[:NUM_PROMPTS]
    outcomes = Pipeline(make_config(wanted.folder)).generate(prompts, SamplingParams(**params))
    expected = [outcome.token_ids for outcome in outcomes]
    assert expected != [tokens[:MAX_TOKENS] for tokens in wanted.expected[:NUM_PROMPTS]]

    packed = {n: v.hex() if isinstance(v, bytes) else v for n, v in params.items()}
    case = {"kind": "tokens", "folder": str(wanted.folder), "prompts": prompts, "params": packed}
    case |= {"deaths": {}, "rounds": 1}
    cases = {name: case | {"settings": own} for name, own in SETTINGS.items()}
    for name, result in run_cases(cases, tmp_path, timeout_s=280).items():
        assert result["tokens"] == expected, name
