"""The compiled sampling head against the plain rule, on every build that this machine runs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sampler_svc import sampling_head
from sampler_svc.native.head import NativeHead
from sampler_svc.native.library import SamplingLibrary, load_library
from sampler_svc.sampling_rows import ChoiceColumns
from sampler_svc.torch_head import TorchHead
from sampler_svc.uploads import upload_to
from stages.native_library import BUILDS, LibraryUnavailable, processor_flags
from tests.unit.native_models import BUILD_NAMES

UNIT = 2**40
LARGEST_UNIFORM = 1 - 2.0**-53
CPU = torch.device("cpu")
Floats = NDArray[np.float32]

any_row = settings(max_examples=100, deadline=None)


@dataclass(frozen=True)
class Rule:
    """How one row is drawn."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.5


def load_build(name: str) -> SamplingLibrary:
    needs = {build.name: build.needs for build in BUILDS}[name]
    if not needs <= processor_flags():
        pytest.skip(f"this processor cannot run the {name} build")
    try:
        library = load_library(flags=needs)
    except LibraryUnavailable as unavailable:
        pytest.skip(str(unavailable))
    if library.name != name:
        pytest.skip(f"the {name} build was not made on this machine")
    return library


@pytest.fixture(params=BUILD_NAMES, scope="module")
def library(request: pytest.FixtureRequest) -> SamplingLibrary:
    return load_build(request.param)


def choose(
    library: SamplingLibrary, logits: Floats, rules: list[Rule], num_threads: int = 1
) -> list[int]:
    native = NativeHead(library, logits.shape[1], num_threads)
    token_ids = native.choose(torch.from_numpy(logits), columns_of(rules), uniforms_of(rules))
    return [int(token_id) for token_id in token_ids]


def columns_of(rules: list[Rule]) -> ChoiceColumns:
    return ChoiceColumns(
        temperatures=np.array([rule.temperature for rule in rules], dtype=np.float32),
        min_p=np.array([rule.min_p for rule in rules], dtype=np.float32),
        top_k=np.array([rule.top_k for rule in rules], dtype=np.int64),
        top_p=np.array([rule.top_p for rule in rules], dtype=np.float64),
        is_seeded=np.ones(len(rules), dtype=np.bool_),
        is_greedy=not any(rule.temperature for rule in rules),
    )


def uniforms_of(rules: list[Rule]) -> NDArray[np.float64]:
    return np.array([rule.uniform for rule in rules])


def masses_of(library: SamplingLibrary, logits: Floats, rule: Rule) -> list[int]:
    masses = np.empty_like(logits)
    library.functions.sampling_token_masses(
        logits.ctypes.data, len(logits), rule.temperature, rule.min_p, masses.ctypes.data
    )
    assert (masses == np.floor(masses)).all()
    return [int(mass) for mass in masses]


def plain_draw(masses: list[int], rule: Rule) -> int:
    """The rule of draw.py on exact integers, by sorting."""
    order = list(range(len(masses)))
    if not sum(masses):
        return 0
    is_cut = 0 < rule.top_k < len(masses)
    if is_cut or rule.top_p < 1:
        order.sort(key=lambda token: (-masses[token], token))
    if is_cut:
        order = order[: rule.top_k]
    if rule.top_p < 1:
        size = math.ceil(float(sum(masses[token] for token in order)) * rule.top_p)
        reached, end = 0, 0
        while reached < size and end < len(order):
            reached += masses[order[end]]
            end += 1
        order = order[:end]
    total = sum(masses[token] for token in order)
    target = min(int(rule.uniform * float(total)), total - 1)
    for token in order:
        target -= masses[token]
        if target < 0:
            return token
    raise AssertionError("the target lies beyond the total")


@st.composite
def logit_rows(draw: st.DrawFn) -> Floats:
    """Rows of all shapes: spread, flat, almost and quite equal, in steps, one-hot, with holes."""
    size = draw(st.integers(1, 80) | st.sampled_from([255, 256, 257, 1000, 4099]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 5.0, 30.0, 1e30]))
    row = rng.normal(0.0, 1.0, size) * scale
    kind = draw(st.sampled_from(["as it is", "steps", "one-hot", "two values", "holes"]))
    if kind == "steps":
        row = np.round(row)
    elif kind == "one-hot":
        row[rng.integers(size)] = 100.0
    elif kind == "two values":
        row = rng.integers(0, 2, size) * max(scale, 1e-7)
    elif kind == "holes":
        row[rng.random(size) < 0.5] = -np.inf
    return row.astype(np.float32)


rules = st.builds(
    Rule,
    temperature=st.sampled_from([1e-5, 0.3, 0.8, 1.0, 1.7, 50.0, 1e30]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.1, 0.9999, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 33, 300, 5000]),
    top_p=st.sampled_from([1.0, 1e-12, 0.1, 0.5, 0.95, 0.999999]) | st.floats(1e-6, 1.0),
    uniform=st.floats(0.0, 1.0, exclude_max=True) | st.just(LARGEST_UNIFORM),
)


@any_row
@given(logits=logit_rows(), drawn=st.lists(rules, min_size=1, max_size=6))
def test_every_draw_follows_the_plain_rule(
    library: SamplingLibrary, logits: Floats, drawn: list[Rule]
) -> None:
    tokens = choose(library, np.tile(logits, (len(drawn), 1)), drawn)
    assert tokens == [plain_draw(masses_of(library, logits, rule), rule) for rule in drawn]


@pytest.mark.parametrize("rule", [Rule(top_p=0.9), Rule(top_k=700), Rule(top_k=900, top_p=0.5)])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-2])
def test_crowded_buckets_are_drawn_exactly(
    library: SamplingLibrary, rule: Rule, spread: float
) -> None:
    """So many masses alike that each level of the selection has work, up to a bucket of equals."""
    rng = np.random.default_rng(5)
    logits = (rng.integers(0, 50, 2000) * spread).astype(np.float32)
    drawn = [Rule(rule.temperature, 0.0, rule.top_k, rule.top_p, u) for u in rng.random(40)]
    masses = masses_of(library, logits, rule)
    tokens = choose(library, np.tile(logits, (len(drawn), 1)), drawn)
    assert tokens == [plain_draw(masses, each) for each in drawn]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_masses_are_probabilities(library: SamplingLibrary, temperature: float) -> None:
    logits = np.random.default_rng(1).normal(0, 5, 5001).astype(np.float32)
    masses = np.array(masses_of(library, logits, Rule(temperature)))
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    # Rounding the exponent costs up to half a unit of its last place, 40 at most.
    np.testing.assert_allclose(masses, np.exp(scaled) * UNIT, rtol=3e-6, atol=1)
    assert masses.max() == UNIT and masses[logits.argmax()] == UNIT


def test_min_p_is_a_fraction_of_the_likeliest(library: SamplingLibrary) -> None:
    logits = np.log([0.1, 0.4, 0.3, 0.2]).astype(np.float32)
    kept = [
        [token for token, mass in enumerate(masses_of(library, logits, Rule(min_p=min_p))) if mass]
        for min_p in (0.0, 0.2, 0.3, 0.6, 0.8, 1.0)
    ]
    assert kept == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [1, 2], [1], [1]]


def test_infinite_logits_share_all_and_none_is_drawn_that_is_no_number(
    library: SamplingLibrary,
) -> None:
    nan, inf = np.nan, np.inf
    for row, possible in (
        ([1, inf, nan, inf, -inf], {1, 3}),
        ([nan, 2, -inf, 2, nan], {1, 3}),
        ([-inf, -inf, -inf], {0, 1, 2}),
        ([nan, nan, nan], {0}),
        ([0, 0, 0], {0, 1, 2}),
        ([nan], {0}),
    ):
        logits = np.array([row] * 30, dtype=np.float32)
        for rule in (Rule(), Rule(top_k=len(row) - 1), Rule(top_p=0.999)):
            drawn = [Rule(rule.temperature, 0, rule.top_k, rule.top_p, i / 30) for i in range(30)]
            tokens = set(choose(library, logits, drawn))
            assert tokens == possible if rule == Rule() else tokens <= possible


@pytest.mark.parametrize("size", [*range(1, 70), 1003])
def test_greedy_rows_are_numpys_argmax(library: SamplingLibrary, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.integers(-3, 4, (12, size)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, rng.integers(size)] = np.nan
    logits[3, rng.integers(size, size=2)] = np.inf
    logits[4] = -0.0
    logits[4, size // 2 :] = 0.0
    logits[5] = np.nan
    greedy = [Rule(temperature=0.0)] * len(logits)
    assert choose(library, logits, greedy) == logits.argmax(axis=-1).tolist()


def mixed_rules(n: int) -> list[Rule]:
    rng = np.random.default_rng(2)
    return [
        Rule(
            temperature=float(rng.choice([0.0, 0.7, 1.0, 2.0])),
            min_p=float(rng.choice([0.0, 0.05])),
            top_k=int(rng.choice([0, 0, 20, 400])),
            top_p=float(rng.choice([1.0, 0.9])),
            uniform=float(rng.random()),
        )
        for _ in range(n)
    ]


def test_a_token_depends_on_its_row_alone(library: SamplingLibrary) -> None:
    """Whoever stands beside it, wherever it lies in memory, on however many threads."""
    logits = np.random.default_rng(3).normal(0, 2, (60, 1003)).astype(np.float32)
    drawn = mixed_rules(60)
    expected = choose(library, logits, drawn)
    assert choose(library, logits, drawn, num_threads=3) == expected
    assert choose(library, logits[::-1].copy(), drawn[::-1]) == expected[::-1]
    wide = np.zeros((60, 1024), dtype=np.float32)
    wide[:, 11:1014] = logits
    assert choose(library, wide[:, 11:1014], drawn) == expected
    for row in range(0, 60, 7):
        assert choose(library, logits[row : row + 1], drawn[row : row + 1]) == [expected[row]]


def test_torch_chooses_the_same_tokens(library: SamplingLibrary) -> None:
    """But for a boundary that falls into a rounding of exp(), once in many thousands of draws."""
    rng = np.random.default_rng(4)
    scales = rng.choice([0.2, 1.0, 4.0], (200, 1))
    logits = (rng.normal(0, 1, (200, 1003)) * scales).astype(np.float32)
    drawn = mixed_rules(200)
    on_torch = TorchHead(upload_to(CPU)).choose(
        torch.from_numpy(logits), columns_of(drawn), uniforms_of(drawn)
    )
    same = np.array(choose(library, logits, drawn)) == on_torch.numpy()
    assert same.mean() >= 0.99


@any_row
@given(logits=logit_rows(), seed=st.integers(0, 2**32), num_top=st.integers(0, 30))
def test_logprobs_are_those_of_float64(
    library: SamplingLibrary, logits: Floats, seed: int, num_top: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([logits, rng.permutation(logits), -logits])
    rows[2, np.isinf(rows[2])] = 0.0  # +inf has no log-probability
    tokens = rng.integers(len(logits), size=3)
    places = np.array([0, 2])
    head = NativeHead(library, len(logits), 2)
    columns = head.token_logprobs(torch.from_numpy(rows), torch.from_numpy(tokens), places, num_top)
    for i, (row, token) in enumerate(zip(rows[places], tokens[places], strict=True)):
        with np.errstate(invalid="ignore"):  # a row of -inf has none
            exact = row.astype(np.float64) - row.max()
        exact -= np.log(np.exp(exact).sum())
        order = np.argsort(-row, kind="stable")[:num_top]
        np.testing.assert_allclose(columns.logprobs[i], exact[token], rtol=1e-6, atol=3e-6)
        assert columns.ranks[i] == (row > row[token]).sum() + 1
        assert columns.top_ids[i].tolist() == order.tolist()
        np.testing.assert_allclose(columns.top_logprobs[i], exact[order], rtol=1e-6, atol=3e-6)


def test_without_the_library_torch_samples_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(**_: object) -> None:
        raise LibraryUnavailable("no library here")

    monkeypatch.setattr(sampling_head, "load_library", unavailable)
    with caplog.at_level(logging.INFO):
        made = sampling_head.make_sampling_head(CPU, 100, 1, upload_to(CPU))
    assert isinstance(made, TorchHead)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no library here" in caplog.text
