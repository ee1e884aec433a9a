"""Two lists of prompts of which it is known whether row i of one belongs to row i of the other."""

import random
from collections.abc import Callable

from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt

THINGS = ("cake", "boat", "poem", "radio", "garden", "letter", "window", "song", "table", "coat", "map", "bridge")
PLACES = ("Rome", "school", "spring", "my kitchen", "the park", "a tent", "the office", "winter", "Peru", "our street")
ACTS = ("make", "sell", "paint", "find", "mend", "lend", "hide", "draw")
POLITE = ("Could you kindly tell me ", "I should be grateful to learn ", "Would you please explain ")
Rows = list[Prompt]


def _rows(name: str, texts: list[str]) -> Rows:
    return [Prompt(f"{name}{i}", text) for i, text in enumerate(texts)]


def _requests(draw: random.Random, n: int) -> list[str]:
    """Requests of one pattern."""
    return [f"How do I {draw.choice(ACTS)} a {draw.choice(THINGS)} in {draw.choice(PLACES)}?" for _ in range(n)]


def one_word_changed(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs: another verb."""
    first = [(draw.choice(ACTS), f"a {draw.choice(THINGS)} in {draw.choice(PLACES)}") for _ in range(n)]
    others = [draw.choice([act for act in ACTS if act != one]) for one, _ in first]
    return (
        _rows("a", [f"How do I {act} {what}?" for act, what in first]),
        _rows("b", [f"How do I {act} {what}?" for act, (_, what) in zip(others, first, strict=True)]),
    )


def one_word_changed_sorted(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs, another verb, in alphabetical order, so that a row is like its neighbours too."""
    first, second = one_word_changed(draw, n)
    rows = sorted(zip(first, second, strict=True), key=lambda pair: pair[0].text)
    return [one for one, _ in rows], [other for _, other in rows]


def two_words_of_eight_kept(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs that share thing and place, in a question and an order."""
    first = [(draw.choice(THINGS), draw.choice(PLACES)) for _ in range(n)]
    return (
        _rows("a", [f"Where might I find a {thing} in {place}?" for thing, place in first]),
        _rows("b", [f"Bring me that {thing} from {place} now." for thing, place in first]),
    )


def said_politely(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs: the same request with a polite beginning."""
    first = _requests(draw, n)
    return _rows("a", first), _rows("b", [draw.choice(POLITE) + text[0].lower() + text[1:] for text in first])


def builtin_with_words(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs: a packaged request, and with five words after it."""
    first = [prompt.text for prompt in draw.sample(list(builtin_prompts("harmless")), n)]
    return _rows("a", first), _rows("b", [f"{text} Answer as a pirate would." for text in first])


def other_words(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """Pairs by meaning alone: no word of the request is kept."""
    first = [(draw.choice(THINGS), draw.choice(PLACES)) for _ in range(n)]
    told = {thing: f"object number {i}" for i, thing in enumerate(THINGS)}
    lands = {place: f"location {i}" for i, place in enumerate(PLACES)}
    return (
        _rows("a", [f"How do I make a {thing} in {place}?" for thing, place in first]),
        _rows("b", [f"Building {told[thing]}, at {lands[place]}: what steps?" for thing, place in first]),
    )


def one_pattern(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """No pairs: requests of one pattern on both sides."""
    return _rows("a", _requests(draw, n)), _rows("b", _requests(draw, n))


def builtin_apart(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """No pairs: packaged harmful and harmless requests, drawn apart."""
    sides = (draw.sample([p.text for p in builtin_prompts(name)], n) for name in ("harmful", "harmless"))
    first, second = sides
    return _rows("a", first), _rows("b", second)


def one_pattern_sorted(draw: random.Random, n: int) -> tuple[Rows, Rows]:
    """No pairs: requests of one pattern, each side in alphabetical order."""
    return _rows("a", sorted(_requests(draw, n))), _rows("b", sorted(_requests(draw, n)))


WORLDS: dict[str, tuple[bool, Callable[[random.Random, int], tuple[Rows, Rows]]]] = {
    "pairs, one word changed": (True, one_word_changed),
    "pairs, one word changed, sorted": (True, one_word_changed_sorted),
    "pairs, thing and place kept": (True, two_words_of_eight_kept),
    "pairs, a polite beginning": (True, said_politely),
    "pairs, packaged requests with a sentence more": (True, builtin_with_words),
    "pairs in other words": (True, other_words),
    "one pattern, no pairs": (False, one_pattern),
    "one pattern, each side sorted, no pairs": (False, one_pattern_sorted),
    "packaged requests, no pairs": (False, builtin_apart),
}
"""By name: whether rows are pairs, and one draw."""
