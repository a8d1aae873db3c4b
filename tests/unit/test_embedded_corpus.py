"""The training text is seeded, right, and never tells what the evaluation asks."""

import itertools
import json
import math
import re
import struct
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor_svc.embedded import corpus, evaluate, facts, stories

SEEDS = st.integers(0, 2**32)
NUMBER = re.compile(r"\d+")


def first_samples(seed: int, n: int = 3_000) -> list[list[corpus.Message]]:
    """Short samples of both parts of a training, then a twentieth as many long chats."""
    streams = [
        (corpus.samples(seed, part=0), n // 2),
        (corpus.samples(seed, part=1), n // 2),
        (corpus.long_chats(seed), n // 20),
    ]
    return [sample for stream, size in streams for sample in itertools.islice(stream, size)]


def test_same_seed_gives_the_same_samples() -> None:
    assert first_samples(7, 200) == first_samples(7, 200)
    assert first_samples(7, 200) != first_samples(8, 200)


def test_held_out_pairs_do_not_depend_on_the_order() -> None:
    pairs = list(itertools.product(range(10, 100), repeat=2))
    assert all(corpus.is_held_out(a, b) == corpus.is_held_out(b, a) for a, b in pairs)
    share = sum(corpus.is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert 0.08 < share < 0.12


@given(SEEDS)
def test_an_addition_is_right_and_never_held_out(seed: int) -> None:
    question, answer = corpus.addition(Random(seed))
    a, b, total = map(int, NUMBER.findall(answer))
    assert a + b == total
    assert not corpus.is_held_out(a, b)
    asked = {int(number) for number in NUMBER.findall(question)}
    assert asked <= {a, b}


@given(SEEDS)
def test_differences_and_products_are_right(seed: int) -> None:
    a, b, difference = map(int, NUMBER.findall(corpus.subtraction(Random(seed))[1]))
    assert a - b == difference >= 0
    _, answer = corpus.product(Random(seed))
    if answer != corpus.TOO_LARGE_FACTOR_ANSWER:
        a, b, result = map(int, NUMBER.findall(answer))
        assert a * b == result


def test_no_sample_contains_a_held_out_question() -> None:
    asked = {question.messages[-1]["content"].lower() for question in evaluate.questions(3, 200)}
    is_story = re.compile("tell me a story about")
    told = {m["content"].lower() for sample in first_samples(0) for m in sample}
    assert not {text for text in told & asked if not is_story.match(text)}


def test_roles_alternate_and_a_chat_ends_with_an_answer() -> None:
    for sample in first_samples(1, 500):
        roles = [message["role"] for message in sample if message["role"] != "system"]
        is_document = roles in (["text"], ["given", "text"])
        assert is_document or roles == ["user", "assistant"] * (len(roles) // 2)


def test_every_training_answer_is_a_whole_sentence() -> None:
    samples = first_samples(2, 1_000)
    answers = {m["content"] for chat in samples for m in chat if m["role"] == "assistant"}
    documents = [chat for chat in samples if chat[-1]["role"] == "text"]
    answers |= {"".join(message["content"] for message in chat) for chat in documents}
    assert not {answer for answer in answers if not evaluate.is_whole_sentence(answer)}


@given(SEEDS)
def test_a_story_names_its_subject_in_four_to_six_sentences(seed: int) -> None:
    rng = Random(seed)
    subject = stories.draw_subject(rng)
    text = stories.tell(rng, subject)
    assert {subject.hero, subject.second} <= set(re.findall("[a-z]+", text.lower()))
    assert 4 <= text.count(".") <= 6
    assert "{" not in text
    assert not re.search(r"\ba [aeiou]", text)


@pytest.mark.parametrize("fact", corpus.headrace_facts(), ids=lambda fact: fact.held_out_question)
def test_a_fact_keeps_one_question_out_of_training(fact: facts.Fact) -> None:
    assert fact.held_out_question not in fact.trained_questions
    assert len(fact.trained_questions) >= 4


def test_no_question_has_two_answers() -> None:
    known = (*corpus.headrace_facts(), *facts.SELF_FACTS, *facts.SMALL_TALK, *facts.PLAIN_FACTS)
    answers: dict[str, str] = {}
    for fact in known:
        for question in fact.questions:
            assert answers.setdefault(question, fact.answer) == fact.answer
    assert not set(answers) & set(facts.UNKNOWN_QUESTIONS)


def test_numbers_are_spelled_in_english() -> None:
    spelled = [corpus.spell(n) for n in (0, 13, 20, 42, 99)]
    assert spelled == ["zero", "thirteen", "twenty", "forty-two", "ninety-nine"]


def test_score_counts_right_answers_by_category() -> None:
    asked = evaluate.questions(0, 50)
    perfect = [
        f"Once upon a time there was a {q.expected[0]} and a {q.expected[1]}."
        if q.category == evaluate.STORY
        else f"The sum is {q.expected[0]}."
        if q.category == evaluate.ADDITION
        else q.expected[0]
        for q in asked
    ]
    report = evaluate.score(asked, perfect)
    assert report.passed
    assert report.whole_sentences == 1.0
    assert {score.accuracy for score in report.categories.values()} == {1.0}
    assert report.categories[evaluate.ADDITION].num_questions == 50
    assert "100.0%" in report.table()


def test_score_fails_a_model_that_cannot_add() -> None:
    asked = evaluate.questions(0, 50)
    report = evaluate.evaluate(lambda chats: ["i dunno lol"] * len(chats), seed=0, n=50)
    assert not report.passed
    assert report.whole_sentences == 0.0
    assert sum(s.num_questions for s in report.categories.values()) == len(asked)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("The sum of 12 and 34 is 46.", True),
        ("46", True),
        ("The sum of 12 and 34 is 146.", False),
        ("46 is the sum of 12 and 34.", False),
        ("I do not know.", False),
    ],
)
def test_the_last_number_of_an_answer_counts(answer: str, is_right: bool) -> None:
    question = evaluate.Question(evaluate.ADDITION, [], ("46",))
    assert question.is_right(answer) is is_right


def test_questions_are_seeded() -> None:
    assert evaluate.questions(1, 20) == evaluate.questions(1, 20)
    assert evaluate.questions(1, 20) != evaluate.questions(2, 20)


def test_the_shipped_model_keeps_its_limits() -> None:
    folder = Path(evaluate.__file__).parent / "model"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16 * 1024 * 1024
    with (folder / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    assert {tensor["dtype"] for tensor in tensors} == {"BF16"}
    assert sum(math.prod(tensor["shape"]) for tensor in tensors) <= 8_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_the_shipped_tokenizer_gives_each_digit_a_token() -> None:
    tokenizer = json.loads((Path(evaluate.__file__).parent / "model/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert set("0123456789") <= set(vocabulary)
    assert not [token for token in vocabulary if len(token) > 1 and re.search(r"\d", token)]
