"""Short stories from templates: a hero, a second noun, and a plot that fits the second noun.

Pure: the same generator state gives the same story. A plot belongs to a kind of second noun, so
that the story answers its question even when a model always takes its most likely word.
"""

from dataclasses import dataclass
from random import Random

from executor_svc.embedded.facts import split_list

# noun -> (usual adjective, pronoun, possessive)
HEROES = {
    "fox": ("clever", "it", "its"),
    "rabbit": ("little", "it", "its"),
    "bear": ("big", "it", "its"),
    "owl": ("wise", "it", "its"),
    "mouse": ("tiny", "it", "its"),
    "cat": ("lazy", "it", "its"),
    "dog": ("loyal", "it", "its"),
    "otter": ("happy", "it", "its"),
    "hedgehog": ("shy", "it", "its"),
    "duck": ("loud", "it", "its"),
    "wolf": ("lonely", "it", "its"),
    "frog": ("green", "it", "its"),
    "horse": ("strong", "it", "its"),
    "turtle": ("slow", "it", "its"),
    "bird": ("small", "it", "its"),
    "elephant": ("gentle", "it", "its"),
    "lion": ("proud", "it", "its"),
    "robot": ("curious", "it", "its"),
    "dragon": ("young", "it", "its"),
    "girl": ("brave", "she", "her"),
    "boy": ("quiet", "he", "his"),
    "miller": ("old", "he", "his"),
    "farmer": ("kind", "she", "her"),
    "king": ("tired", "he", "his"),
    "queen": ("young", "she", "her"),
    "fisherman": ("poor", "he", "his"),
    "teacher": ("patient", "she", "her"),
    "knight": ("brave", "he", "his"),
    "princess": ("clever", "she", "her"),
    "sailor": ("old", "he", "his"),
}
PLACES = split_list(
    "river|forest|mountain|lake|garden|village|castle|bridge|desert|island|cave|field|hill|mill|"
    "sea|valley"
)
THINGS = split_list(
    "lamp|key|boat|book|hat|bell|clock|map|kite|basket|drum|apple|stone|ring|wheel|coin|box|star|"
    "letter"
)

_OPENINGS = (
    "Once upon a time there was {a_hero} who lived near {a_place}.",
    "There once was {a_hero} who lived by {a_place}.",
    "Long ago, {a_hero} lived in a small house near {a_place}.",
)
_TIMES = ("One morning", "One day", "One evening", "On a cold day", "On a sunny day")

# Each step of a plot offers sentences that fit whatever was chosen before.
_PLACE_PLOT = (
    (
        "{time} {the_hero} wanted to see the other side of the {second}.",
        "{time} {the_hero} went to the {second} all alone.",
    ),
    (
        "The way was long, and soon {it} was tired and hungry.",
        "The wind was strong, and {it} was a little afraid.",
    ),
    (
        "But {it} did not give up and took one step after the other.",
        "Then {it} met an old friend who knew the way.",
    ),
    (
        "At last {it} stood at the {second} and saw how beautiful it was.",
        "When the sun went down, {it} had found a safe way around the {second}.",
    ),
    (
        "From then on {the_hero} came back to the {second} every day.",
        "{The_hero} went home with a warm heart and told everyone about the {second}.",
    ),
)
_THING_PLOT = (
    (
        "{time} {the_hero} found {a_second} in the grass.",
        "{time} {the_hero} saw {a_second} under a tree.",
    ),
    (
        "{It} had never seen such a fine {second} before.",
        "The {second} was old, but it was still very beautiful.",
    ),
    (
        "{It} asked everyone who had lost it, but nobody knew.",
        "{It} carried the {second} from house to house to find its owner.",
    ),
    (
        "In the end an old woman smiled and said that the {second} was hers.",
        "Then a child came and cried with joy, because the {second} was a gift from home.",
    ),
    (
        "{The_hero} gave the {second} back and got a new friend.",
        "{The_hero} was glad, for a friend is worth more than any {second}.",
    ),
)
_HERO_PLOT = (
    (
        "{time} {the_hero} met {a_second} who looked very sad.",
        "{time} {the_hero} heard {a_second} who called for help.",
    ),
    (
        "The {second} had lost the way home and did not know what to do.",
        "The {second} was hungry and had nothing to eat.",
    ),
    (
        "{The_hero} shared {its} bread and showed the {second} the way.",
        "{The_hero} thought for a while and had a good idea.",
    ),
    (
        "Together they walked until they saw a light in the dark.",
        "They worked all day, and in the evening everything was well.",
    ),
    (
        "Since that day {the_hero} and the {second} have been best friends.",
        "The {second} said thank you, and they laughed and danced all night.",
    ),
)


@dataclass(frozen=True)
class Subject:
    """What a story is about: a hero and a second noun, which is a place, a thing or a hero."""

    hero: str
    second: str


def article(noun_phrase: str) -> str:
    """`noun_phrase` with its indefinite article."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def draw_subject(rng: Random) -> Subject:
    """A hero and a different second noun; the three kinds of second noun are equally likely."""
    hero = rng.choice(list(HEROES))
    kind = rng.choice((PLACES, THINGS, list(HEROES)))
    second = rng.choice([noun for noun in kind if noun != hero])
    return Subject(hero, second)


def _plot(second: str) -> tuple[tuple[str, ...], ...]:
    if second in HEROES:
        return _HERO_PLOT
    return _PLACE_PLOT if second in PLACES else _THING_PLOT


def tell(rng: Random, subject: Subject) -> str:
    """A story of five or six whole sentences about `subject`."""
    adjective, it, its = HEROES[subject.hero]
    place = subject.second if subject.second in PLACES else rng.choice(("forest", "river", "hill"))
    words = {
        "a_hero": article(f"{adjective} {subject.hero}"),
        "a_place": article(place),
        "the_hero": f"the {subject.hero}",
        "The_hero": f"The {subject.hero}",
        "it": it,
        "It": it.capitalize(),
        "its": its,
        "second": subject.second,
        "a_second": article(subject.second),
        "time": rng.choice(_TIMES),
    }
    steps = list(_plot(subject.second))
    if rng.random() < 0.3:
        del steps[rng.choice((1, 2))]
    sentences = [rng.choice(_OPENINGS), *(rng.choice(step) for step in steps)]
    return " ".join(sentence.format(**words) for sentence in sentences)
