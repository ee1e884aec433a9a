"""Normal forms and final punctuation."""

import random

import pytest

from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import final_punctuation, match_punctuation, normalise_text


def test_normal_form() -> None:
    assert normalise_text("  Don’t  STOP\tthe “Ｗｅｌｌ-known” cake!? ") == "dont stop the well known cake"
    assert normalise_text("2+2") != normalise_text("2-2")
    once = normalise_text("Straße … İstanbul")
    assert normalise_text(once) == once


ONE_THING = [
    ("don't", "dont", "Don’t!"),
    ("Make a cake!", "make  a CAKE", "“Make a cake.”", "make a cake ..."),
    ("a well-known cake", "A well known cake?!", "a well‐known, cake"),
    ("¿Qué?", "qué"),
    ("什么？", "什么。"),
    ("from 3-5", "From 3–5."),
    ("it's 5", "Its 5."),
    ("in 5!", "in 5!.!"),
]
DIFFERENT = [
    "3-5", "3/5", "3*5", "3.5", "35", "3 5", "3:5", "3,5", "3+5", "3!5", "3 - 5", "1..5", "5!", "5", "5'", '5"', "- 5",
    "c", "c#", "c++", "c*", "<c>", "{c}", ".net", "net", "node.js", "nodejs", "f(x)", "f x", "f[x]", "f'(x)", "f' x",
    "x2", "x²", "x₂", "210", "2¹⁰", "½", "1/2",
    "x-y", "x y", "a_b", "a b", "a&b", "a|b", "a\\b", "a@b", "50%", "50", "#1", "1", "a != b", "a = b", "~", "-", "--",
]  # fmt: skip


@pytest.mark.parametrize("texts", ONE_THING)
def test_what_is_one_prompt(texts: tuple[str, ...]) -> None:
    assert len({normalise_text(text) for text in texts}) == 1


@pytest.mark.parametrize("before", ["", "What is "])
def test_what_are_different_prompts(before: str) -> None:
    assert len({normalise_text(before + text) for text in DIFFERENT}) == len(DIFFERENT)


def test_marks_alone_stay() -> None:
    assert len({normalise_text(text) for text in ("???", "!!!", "?!", '"', "...")}) == 5


def test_a_normal_form_is_its_own_and_found_quickly() -> None:
    draw = random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choice("aaBßİ'’\"“.!?-–—#/ 1 é\u0301ſﬁ\u2028…`³()_") for _ in range(draw.randint(0, 12)))
        assert normalise_text(normalise_text(text)) == normalise_text(text), text
    for unit in ("'", '."', "!", "5!", "5.", "aa-", "'.'!", "¿.", "a'-", "\u0301", " "):
        for text in (unit * 200_000, "aa" + unit * 200_000, unit * 200_000 + "a"):
            normalise_text(text)  # a pattern that goes back and forth would take hours


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a.", "."),
        ("a? \n", "?"),
        ("a!", "!"),
        ("a", ""),
        ("", ""),
        ("什么？", "?"),
        ("ما؟", "?"),
        ("a…", "."),
        ("a)", ""),
    ],
)
def test_final_punctuation(text: str, mark: str) -> None:
    assert final_punctuation(text) == mark


def _prompts(*texts: str) -> list[Prompt]:
    return [Prompt(id=str(place), text=text, label="l", family="f") for place, text in enumerate(texts)]


def test_matched_punctuation_tells_nothing() -> None:
    bare, dotted = _prompts("Make it", "Why?!"), _prompts("Bake it.", "Sing it ... ", "Why?")
    matched = match_punctuation(bare, dotted, "match")
    assert [prompt.text for prompt in matched.positive] == ["Make it", "Why"]
    assert [prompt.text for prompt in matched.negative] == ["Bake it", "Sing it", "Why"]
    assert matched.positive[1].family == "f"
    assert matched.note == (
        "final punctuation removed from all 2 + 3 prompts (it differed between the classes): "
        "positive ! 1, none 1; negative . 2, ? 1"
    )
    kept = match_punctuation(bare, dotted, "keep")
    assert (list(kept.positive), list(kept.negative)) == (bare, dotted)
    assert "though it differs" in kept.note


def test_alike_punctuation_stays() -> None:
    few, many = _prompts("a?", "b."), _prompts("c?", "d.", "e?", "f.")
    matched = match_punctuation(few, many, "match")
    assert (list(matched.positive), list(matched.negative)) == (few, many)
    assert matched.note.startswith("final punctuation kept (alike in both classes)")
    assert [p.text for p in match_punctuation(few, many, "strip").positive] == ["a", "b"]
    assert match_punctuation(_prompts("?!"), few, "strip").positive[0].text == "?!"
