"""Stop strings: found across pieces, never shown in part, the same for every way of cutting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_svc.stop_strings import StopStrings


def run(stop: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """Push pieces until a match; return all that was shown and the match."""
    matcher = StopStrings(stop, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def reference(stop: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The obvious rule on the whole text."""
    ends = [
        (end, -len(each), each)
        for each in stop
        for end in range(len(each), len(text) + 1)
        if text[:end].endswith(each)
    ]
    if not ends:
        return text, None
    end, _, each = min(ends)
    return text[: end if include else end - len(each)], each


def test_a_stop_string_in_one_piece_cuts_the_text() -> None:
    assert run(["END"], ["helloENDmore"]) == ("hello", "END")
    assert run(["END"], ["helloENDmore"], include=True) == ("helloEND", "END")


def test_a_stop_string_over_three_pieces_is_found() -> None:
    assert run(["<stop>"], ["a<s", "to", "p>b"]) == ("a", "<stop>")


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:"], False)
    assert matcher.push("hi\n") == "hi"
    assert matcher.push("x") == "\nx"
    assert matcher.push("\n\nUs") == ""
    assert matcher.push("e") == ""
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.flush() == ""


def test_the_end_of_the_text_gives_what_was_held() -> None:
    matcher = StopStrings(["abc"], False)
    assert matcher.push("xab") == "x"
    assert matcher.flush() == "ab"
    assert matcher.flush() == ""


def test_the_match_that_ends_first_wins() -> None:
    assert run(["lo wor", "hello world"], ["hello world"]) == ("hel", "lo wor")


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert run(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_a_false_start_inside_a_stop_string_is_not_missed() -> None:
    assert run(["aab"], ["aa", "ab"]) == ("a", "aab")


def test_text_that_may_not_match_is_not_matched_later() -> None:
    matcher = StopStrings(["END"], False)
    assert matcher.push("END", may_match=False) == "END"
    assert matcher.push("x", may_match=True) == "x"
    assert matcher.matched is None


def test_a_match_may_begin_in_text_that_may_not_match() -> None:
    matcher = StopStrings(["END"], False)
    assert matcher.push("aEN", may_match=False) == "a"
    assert matcher.push("D", may_match=True) == ""
    assert matcher.matched == "END"


@pytest.mark.parametrize("stop", [[], [""]])
def test_without_stop_strings_text_passes_through(stop: list[str]) -> None:
    assert run(stop, ["a", "", "b"]) == ("ab", None)


def test_a_long_stop_string_costs_linear_time() -> None:
    matcher = StopStrings(["a" * 20_000 + "b"], False)
    for _ in range(500):
        assert matcher.push("a" * 40) == "" and matcher.matched is None
    assert matcher.push("c") == "a" * 20_000 + "c"


@settings(max_examples=300, deadline=None)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    include=st.booleans(),
)
def test_every_cut_gives_what_the_whole_text_gives(
    stop: list[str], pieces: list[str], include: bool
) -> None:
    assert run(stop, pieces, include) == reference(stop, "".join(pieces), include)
