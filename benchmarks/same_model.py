"""Whether peers serve the same model: their greedy answers to the same texts, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from benchmarks.peers import CannotRun, Contender, Setup
from benchmarks.prompts import Prompts
from benchmarks.server import ServerFailed, serving

NUM_PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 32, 16


@dataclass(frozen=True)
class Agreement:
    """How far a contender's answers equal those of the first one.

    In 32 bits on both sides they are equal. A rounding to 16 bits may turn a near tie, which
    random weights have many of; from there on a text is another.
    """

    name: str
    num_equal: int
    same_characters: int
    all_characters: int

    @property
    def is_whole(self) -> bool:
        """Every answer is equal."""
        return self.num_equal == NUM_PROMPTS

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_equal} of {NUM_PROMPTS} answers equal, "
            f"{self.same_characters} of {self.all_characters} characters"
        )


def compare(
    contenders: Sequence[Contender], setup: Setup, prompts: Prompts
) -> Iterator[Agreement | str]:
    """Ask each in turn; one that cannot run gives a text that says why."""
    texts = prompts.draw(NUM_PROMPTS, PROMPT_TOKENS, seed=1)
    expected: list[str] = []
    for contender in contenders:
        try:
            with serving(contender.peer(setup)) as server:
                answers = [server.complete(text, OUTPUT_TOKENS) for text in texts]
        except (CannotRun, ServerFailed) as error:
            yield f"{contender.name}: {error}"
            continue
        expected = expected or answers
        yield agreement(contender.name, answers, expected)


def agreement(name: str, answers: Sequence[str], expected: Sequence[str]) -> Agreement:
    """Count equal answers, and characters up to the first difference of each."""
    pairs = list(zip(answers, expected, strict=True))
    same = sum(_num_same(mine, theirs) for mine, theirs in pairs)
    return Agreement(name, sum(a == b for a, b in pairs), same, sum(map(len, expected)))


def _num_same(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
