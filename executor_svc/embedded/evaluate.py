"""What the embedded model must get right: held-out questions, their checks, and the score.

Pure and standard library only: whoever serves the model asks it, in any way. No question of
`questions` is in the training text.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from executor_svc.embedded import corpus, facts, stories

ADDITION, FACT, TALK = "two-digit addition", "Headrace facts", "small talk"
UNKNOWN, STORY = "unknown things", "stories"
# The quality gate: the share of right answers that a category must reach.
BARS = {ADDITION: 0.90}
Ask = Callable[[list[list[corpus.Message]]], list[str]]


@dataclass(frozen=True)
class Question:
    """A chat that ends with a question, and the words that a right answer holds."""

    category: str
    messages: list[corpus.Message]
    expected: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """A sum is right when the last number is; a story names its subject; a fact is exact."""
        if self.category == ADDITION:
            return re.findall(r"\d+", answer)[-1:] == list(self.expected)
        if self.category == STORY:
            return set(self.expected) <= set(_words(answer))
        return answer.strip() == self.expected[0]


@dataclass(frozen=True)
class CategoryScore:
    num_questions: int
    num_right: int

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_questions


@dataclass(frozen=True)
class Report:
    """Accuracy by category, and the share of all answers that are whole sentences."""

    categories: dict[str, CategoryScore]
    whole_sentences: float

    @property
    def passed(self) -> bool:
        return all(self.categories[name].accuracy >= bar for name, bar in BARS.items())

    def table(self) -> str:
        """The report as lines of text, for people."""
        lines = [
            f"{name:<20} {score.accuracy:7.1%}  ({score.num_right} of {score.num_questions})"
            for name, score in self.categories.items()
        ]
        return "\n".join([*lines, f"{'whole sentences':<20} {self.whole_sentences:7.1%}"])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@cache
def known_words() -> frozenset[str]:
    """Every word that the training answers use."""
    chats = itertools.islice(corpus.long_chats(0), 500)
    answers = (m["content"] for chat in chats for m in chat if m["role"] == "assistant")
    return frozenset(word for answer in answers for word in _words(answer))


def is_whole_sentence(answer: str) -> bool:
    """Starts with a capital, ends with a mark, and every word is an English word we know."""
    text = answer.strip()
    if not text or not text[0].isupper() or text[-1] not in ".!?":
        return False
    return set(_words(text)) <= known_words()


def _user(text: str) -> list[corpus.Message]:
    return [{"role": "user", "content": text}]


def addition_questions(rng: Random, num_questions: int) -> list[Question]:
    """Sums of two-digit pairs that are in no training text."""
    drawn = (corpus.held_out_addition(rng) for _ in range(num_questions))
    return [Question(ADDITION, _user(text), (str(total),)) for text, total in drawn]


def _story_question(rng: Random) -> Question:
    subject = stories.draw_subject(rng)
    text = corpus.story_question(rng, subject, "Tell me a story about {a_hero} and {a_second}.")
    return Question(STORY, _user(text), (subject.hero, subject.second))


def questions(seed: int, n: int) -> list[Question]:
    """`n` sums, `n // 10` unknown things, `n // 10` stories, and every fact once.

    Pairs, topics and phrasings of facts are those that were kept out of training.
    """
    rng = Random(seed)
    about_headrace = corpus.held_out_questions(corpus.headrace_facts())
    small_talk = corpus.held_out_questions((*facts.SELF_FACTS, *facts.SMALL_TALK))
    unknown = [corpus.held_out_unknown(rng) for _ in range(n // 10)]
    return [
        *addition_questions(rng, n),
        *(Question(FACT, _user(text), (answer,)) for text, answer in about_headrace),
        *(Question(TALK, _user(text), (answer,)) for text, answer in small_talk),
        *(Question(UNKNOWN, _user(text), (answer,)) for text, answer in unknown),
        *(_story_question(rng) for _ in range(n // 10)),
    ]


def score(asked: Sequence[Question], answers: Sequence[str]) -> Report:
    """Compare `answers` with what was asked; both have the same order and length."""
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for question, answer in zip(asked, answers, strict=True):
        total[question.category] += 1
        right[question.category] += question.is_right(answer)
    whole = sum(is_whole_sentence(answer) for answer in answers)
    categories = {name: CategoryScore(total[name], right[name]) for name in total}
    return Report(categories, whole / len(answers))


def evaluate(ask: Ask, seed: int = 0, n: int = 300) -> Report:
    """Ask a model, through whatever serves it, and score what it says."""
    asked = questions(seed, n)
    return score(asked, ask([question.messages for question in asked]))
