"""The training text of the embedded model: an endless, seeded stream of conversations.

Pure and standard library only. The same seed gives the same conversations on every machine. What
the evaluation asks (`is_held_out`, `held_out_questions`) never appears in the stream.
"""

import string
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from executor_svc.embedded import facts, stories
from executor_svc.embedded.facts import Fact

# {"role": ..., "content": ...}; outside any chat the role is "text", or "given" for what a model
# is told and need not learn to say.
Message = dict[str, str]
# One question and its answer.
Exchange = tuple[str, str]

_ADDITION_QUESTIONS = (
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "{a} plus {b}",
    "What's {a} + {b}?",
    "What is the sum of {a} and {b}?",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "How much is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} plus {b}.",
    "Can you add {a} and {b}?",
    "Please add {a} and {b}.",
    "Tell me what {a} plus {b} is.",
    "What do you get when you add {a} and {b}?",
    "What do {a} and {b} make?",
    "And {a} plus {b}?",
    "And what about {a} + {b}?",
    "Can you add {a} and {b} for me?",
    "What is the answer to {a} + {b}?",
    "I need the sum of {a} and {b}.",
    "If I have {a} coins and get {b} coins, how many coins do I have?",
    "I have {a} apples and I buy {b} more. How many do I have?",
    "There are {a} boys and {b} girls. How many children are there?",
    "One box holds {a} books and the other holds {b} books. How many books are there?",
)
_SUBTRACTION_QUESTIONS = (
    "What is {a} minus {b}?",
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Take {b} away from {a}.",
    "And {a} minus {b}?",
    "What is the difference between {a} and {b}?",
)
_PRODUCT_QUESTIONS = (
    "What is {a} times {b}?",
    "What is {a} * {b}?",
    "{a} * {b}",
    "{a} x {b}",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "And {a} times {b}?",
)
_TOO_LARGE_QUESTIONS = (
    "What is {a} plus {b}?",
    "{a} + {b}",
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "What is {a} minus {b}?",
    "What is {a} times {b}?",
    "Calculate {a} * {b}.",
    "What is {a} divided by {b}?",
    "{a} / {b}",
)
TOO_LARGE_ANSWER = "I can only work with small numbers of one or two digits."
TOO_LARGE_FACTOR_ANSWER = "I can only multiply numbers from zero to ten."
_COUNT_QUESTIONS = ("Count to {n}.", "Count from 1 to {n}.", "Can you count to {n}?")
_STORY_QUESTIONS = (
    "Tell me a story about {a_hero} and {a_second}.",
    "Tell me a story about {a_hero} and {a_second}.",
    "Tell a story about {a_hero} and {a_second}.",
    "Write a story about {a_hero} and {a_second}.",
    "Write a short story about {a_hero} and {a_second}.",
    "Tell me a short story about {a_hero} and {a_second}.",
    "Can you tell me a story about {a_hero} and {a_second}?",
    "I want to hear a story about {a_hero} and {a_second}.",
    "Tell me a story about {a_hero}.",
    "Write a story about {a_hero}.",
    "Tell me a story.",
    "Write a short story.",
    "Tell me another story.",
)
_POLITE_STARTS = ("Please tell me: ", "I have a question. ", "Hello! ", "Quick question: ")
_POLITE_ENDS = (" please", ", please.", " Thank you.", " now")
_ONES = facts.split_list(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen"
)
_TENS = facts.split_list("twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety")


def is_held_out(a: int, b: int) -> bool:
    """Whether the sum of `a` and `b`, in either order, is kept for the evaluation (1 in 10)."""
    low, high = sorted((a, b))
    return low >= 10 and zlib.crc32(f"{low}+{high}".encode()) % 10 == 0


def addition_answer(a: int, b: int) -> str:
    return f"The sum of {a} and {b} is {a + b}."


def spell(number: int) -> str:
    """`number` (0 to 99) in English words."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def _draw_operand(rng: Random) -> int:
    return rng.randrange(10, 100) if rng.random() < 0.9 else rng.randrange(10)


def addition(rng: Random) -> Exchange:
    a, b = _draw_operand(rng), _draw_operand(rng)
    while is_held_out(a, b):
        a, b = _draw_operand(rng), _draw_operand(rng)
    question = rng.choice(_ADDITION_QUESTIONS)
    if rng.random() < 0.04:
        return question.format(a=spell(a), b=spell(b)), addition_answer(a, b)
    return question.format(a=a, b=b), addition_answer(a, b)


def held_out_addition(rng: Random) -> tuple[str, int]:
    """A question about a pair that is in no training text, and the sum."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    while not is_held_out(a, b):
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    return rng.choice(_ADDITION_QUESTIONS).format(a=a, b=b), a + b


def subtraction(rng: Random) -> Exchange:
    b, a = sorted((_draw_operand(rng), _draw_operand(rng)))
    answer = f"The difference between {a} and {b} is {a - b}."
    return rng.choice(_SUBTRACTION_QUESTIONS).format(a=a, b=b), answer


def product(rng: Random) -> Exchange:
    a, b = rng.randrange(11), rng.randrange(11)
    answer = f"The product of {a} and {b} is {a * b}."
    if rng.random() < 0.2:
        a, answer = rng.randrange(11, 100), TOO_LARGE_FACTOR_ANSWER
        b = rng.randrange(100)
    return rng.choice(_PRODUCT_QUESTIONS).format(a=a, b=b), answer


def too_large(rng: Random) -> Exchange:
    a, b = rng.randrange(100, 10 ** rng.randint(3, 6)), rng.randrange(10, 10 ** rng.randint(2, 5))
    if rng.random() < 0.5:
        a, b = b, a
    return rng.choice(_TOO_LARGE_QUESTIONS).format(a=a, b=b), TOO_LARGE_ANSWER


def counting(rng: Random) -> Exchange:
    n = rng.randint(3, 20)
    numbers = ", ".join(str(i) for i in range(1, n + 1))
    return rng.choice(_COUNT_QUESTIONS).format(n=n), f"Here you are: {numbers}."


def story_question(rng: Random, subject: stories.Subject, question: str = "") -> str:
    template = question or rng.choice(_STORY_QUESTIONS)
    hero, second = stories.article(subject.hero), stories.article(subject.second)
    return template.format(a_hero=hero, a_second=second)


def story(rng: Random) -> Exchange:
    subject = stories.draw_subject(rng)
    return story_question(rng, subject), stories.tell(rng, subject)


def definitions() -> list[Fact]:
    """The definitions as facts; each term leaves another template out of training."""
    result = []
    for index, (names, answer) in enumerate(facts.DEFINITIONS.items()):
        templates = list(facts.DEFINITION_TEMPLATES)
        held_out = templates.pop(1 + index % 8)
        name, *others = facts.split_list(names)
        # The usual name counts as often as all others together.
        terms = [name] * max(1, len(others)) + others
        asked = [template.format(term=term) for template in templates for term in terms]
        asked.append(held_out.format(term=name))
        result.append(Fact(answer, tuple(text[0].upper() + text[1:] for text in asked)))
    return result


@cache
def headrace_facts() -> tuple[Fact, ...]:
    """Everything that the model knows about Headrace."""
    return (*definitions(), *facts.HEADRACE_FACTS)


def held_out_questions(known: tuple[Fact, ...]) -> list[Exchange]:
    """One phrasing of each fact that is in no training text, with the right answer."""
    return [(fact.held_out_question, fact.answer) for fact in known]


def _ask(known: tuple[Fact, ...]) -> Callable[[Random], Exchange]:
    def exchange(rng: Random) -> Exchange:
        fact = rng.choice(known)
        return rng.choice(fact.trained_questions), fact.answer

    return exchange


def _invented_word(rng: Random) -> str:
    """A word that means nothing: half of them can be spoken, half are a heap of letters."""
    if rng.random() < 0.5:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(3))
    return "".join(syllables)


def _topic(rng: Random) -> str:
    return _invented_word(rng) if rng.random() < 0.3 else rng.choice(facts.UNKNOWN_TOPICS)


def unknown(rng: Random) -> Exchange:
    """A question that the model cannot answer, sometimes about a word that does not exist."""
    if rng.random() < 0.25:
        return rng.choice(facts.UNKNOWN_QUESTIONS), facts.UNKNOWN_ANSWER
    template = rng.choice(facts.UNKNOWN_TEMPLATES)
    return template.format(topic=_topic(rng), other=_topic(rng)), facts.UNKNOWN_ANSWER


def held_out_unknown(rng: Random) -> Exchange:
    """A question about a topic that is in no training text."""
    template = rng.choice(facts.UNKNOWN_TEMPLATES)
    topic, other = rng.sample(facts.HELD_OUT_TOPICS, 2)
    return template.format(topic=topic, other=other), facts.UNKNOWN_ANSWER


# The weight of each kind of exchange in the first and in the second part of a training.
_MIX: tuple[tuple[tuple[float, float], Callable[[Random], Exchange]], ...] = (
    ((0.40, 0.30), addition),
    ((0.06, 0.06), subtraction),
    ((0.02, 0.03), product),
    ((0.02, 0.03), too_large),
    ((0.01, 0.03), counting),
    ((0.10, 0.16), story),
    ((0.20, 0.20), _ask(headrace_facts())),
    ((0.04, 0.05), _ask(facts.SELF_FACTS)),
    ((0.04, 0.06), _ask(facts.SMALL_TALK)),
    ((0.01, 0.03), _ask(facts.PLAIN_FACTS)),
    ((0.09, 0.10), unknown),
)
# The share of the samples that are drills, in the first and in the second part.
_DRILLS = (0.80, 0.50)


def _as_typed(rng: Random, question: str) -> str:
    """`question` the way people type it: now and then without capital, mark or ceremony."""
    if rng.random() < 0.04:
        question = rng.choice(_POLITE_STARTS) + question
    if rng.random() < 0.03:
        question = question.rstrip("?.!") + rng.choice(_POLITE_ENDS)
    if rng.random() < 0.12:
        question = question.lower()
    if rng.random() < 0.10 and question[-1] in "?.!":
        question = question[:-1]
    return question


def exchange(rng: Random, part: int = 0) -> Exchange:
    """A question of the mix as somebody may type it, and its answer."""
    weights = [shares[part] for shares, _ in _MIX]
    [(_, draw)] = rng.choices(_MIX, weights)
    question, answer = draw(rng)
    return _as_typed(rng, question), answer


def conversation(rng: Random, num_exchanges: int, part: int = 0) -> list[Message]:
    """A chat of `num_exchanges`, with or without a system prompt."""
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(facts.SYSTEM_PROMPTS)})
    for _ in range(num_exchanges):
        question, answer = exchange(rng, part)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def document(rng: Random) -> list[Message]:
    """A plain text outside any chat, for prompts that bring no chat template."""
    draw = rng.choice((story, story, addition, _ask(headrace_facts())))
    return [{"role": "text", "content": draw(rng)[1]}]


def drill(rng: Random) -> list[Message]:
    """One sum or difference and nothing else: the cheapest way to learn arithmetic."""
    draw = addition if rng.random() < 0.88 else subtraction
    given, space, result = draw(rng)[1].rpartition(" ")
    return [{"role": "given", "content": given}, {"role": "text", "content": space + result}]


def samples(seed: int, part: int = 0) -> Iterator[list[Message]]:
    """The endless training stream of `seed`: drills, short chats, a few plain texts."""
    rng = Random(2 * seed + part)
    while True:
        kind = rng.random()
        if kind < _DRILLS[part]:
            yield drill(rng)
        elif kind < _DRILLS[part] + 0.01:
            yield document(rng)
        else:
            yield conversation(rng, rng.randint(2, 5) if rng.random() < 0.3 else 1, part)


def long_chats(seed: int, part: int = 0) -> Iterator[list[Message]]:
    """The endless stream of long chats of `seed`, so that a model keeps its head in one."""
    rng = Random(f"long {2 * seed + part}")
    while True:
        yield conversation(rng, rng.randint(4, 20), part)
