"""Finds stop strings in a growing text and holds back what could still become one.

Knows text only; whether a stop string may count yet (`min_tokens`) is told with each piece.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """An incremental matcher: one Knuth-Morris-Pratt automaton for each stop string.

    Invariant: the text released and the text held make up the text pushed; held is the longest
    end of it that begins a stop string. What is released and matched does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stop: Iterable[str], include_in_output: bool) -> None:
        self._include_in_output = include_in_output
        self._automata = [_Automaton(pattern) for pattern in stop if pattern]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, may_match: bool = True) -> str:
        """Add text; return what may be shown. Sets `matched` at a match, the last push that counts.

        The match that ends first wins, the longest of those that end together. A match may begin
        in earlier text but ends in text with `may_match`, as in vLLM.
        """
        if not self._automata:
            return text
        window = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [each.pattern for each in self._automata if each.advance(char)]
            if complete and may_match:
                self.matched = max(complete, key=len)
                self._held = ""
                return window[: end if self._include_in_output else end - len(self.matched)]
        num_held = max(automaton.state for automaton in self._automata)
        released = len(window) - num_held
        self._held = window[released:]
        return window[:released]

    def flush(self) -> str:
        """The text ends here: return what was held."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """`state`: length of the longest proper beginning of `pattern` that the text ends with."""

    __slots__ = ("_failure", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._failure = _failure_table(pattern)

    def advance(self, char: str) -> bool:
        """Take one character; say whether the pattern ends with it."""
        state = _next_state(self.pattern, self._failure, self.state, char)
        is_complete = state == len(self.pattern)
        self.state = self._failure[state] if is_complete else state
        return is_complete


def _failure_table(pattern: str) -> list[int]:
    """`table[n]`: length of the longest proper border of the first n characters."""
    table = [0] * (len(pattern) + 1)
    for end in range(2, len(pattern) + 1):
        table[end] = _next_state(pattern, table, table[end - 1], pattern[end - 1])
    return table


def _next_state(pattern: str, failure: list[int], state: int, char: str) -> int:
    while state and pattern[state] != char:
        state = failure[state]
    return state + 1 if pattern[state] == char else 0
