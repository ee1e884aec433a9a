"""The surface of a prompt: its normal form, and final punctuation that must not give a class away."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from mechlens.errors import UserError
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.prompt import Prompt

PunctuationMode = Literal["match", "keep", "strip"]

_APOSTROPHES = "'’‘ʼ`´′‛＇"
_PLAIN_MARKS = str.maketrans({**dict.fromkeys(_APOSTROPHES, "'"), **dict.fromkeys("“”„‟″＂", '"')})
# Marks that other scripts end a sentence with, and the class each belongs to.
_FINAL_MARKS = {
    **dict.fromkeys(".…。．।", "."),
    **dict.fromkeys("?？؟", "?"),
    **dict.fromkeys("!！", "!"),
}


_LETTER = r"[^\W\d_]"
_APOSTROPHE = "['’‘ʼ`]"
_STOPS = ".,;:?…。．।，、；：？؟،؛"
_END = rf"[{_STOPS}!！]*+(?=\s|$)"
_WITHOUT = (
    # Apostrophes in and before words, and after those of two letters: don't, 'n', but not f'(x) and 6'.
    (re.compile(rf"(?<!{_APOSTROPHE}){_APOSTROPHE}++(?={_LETTER})|(?<={_LETTER}{{2}}){_APOSTROPHE}+"), ""),
    # Quotation marks, but not 6".
    (re.compile(r"(?<!\d)[\"“”„‟«»‹›]"), " "),
    # Marks of a sentence where a word ends, but not in 3.5, a.b and 10:30, nor in 5!.
    (
        re.compile(
            rf"[¿¡]|(?<![\d{_STOPS}!！])[{_STOPS}!！]{_END}|(?<=\d)[{_STOPS}]{_END}|(?<=\d!)[{_STOPS}!！]{_END}"
        ),
        " ",
    ),
    # Hyphens between words of two letters or more, but not in 3-5 and x-y.
    (re.compile(rf"(?<={_LETTER}{{2}})-(?={_LETTER}{{2}})"), " "),
)
_STEPS = 8
"""Steps to the normal form; real text takes two."""
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))


def normalise_text(text: str) -> str:
    """What the words say: two prompts with the same normal form count as the same prompt.

    NFKC, case folded, single spaces; without apostrophes ("don't" is "dont"), quotation marks, marks that end a
    sentence, and hyphens between words ("well-known" is "well known"). Every other mark may change what is asked
    and stays: 3-5, 3/5, 3*5 and 3.5 differ, and so do C, C# and C++. A text of such marks only stays as it is.
    """
    now = text
    for _ in range(_STEPS):  # what one step takes away may leave a word's end for another
        before, now = now, _simpler(now)
        if now == before:
            break
    return now or " ".join(text.split())


def _simpler(text: str) -> str:
    text = "".join(_composed(part) for part in _raised().split(text)).casefold().translate(_DASHES)
    for pattern, put in _WITHOUT:
        text = pattern.sub(put, text)
    return " ".join(text.split())


def _composed(text: str) -> str:
    """NFKC, but for what is raised, lowered or a fraction: it would make 2¹⁰ the number 210."""
    return text if _raised().fullmatch(text) else unicodedata.normalize("NFKC", text)


@cache
def _raised() -> re.Pattern[str]:
    characters = (chr(code) for code in range(0x20000))
    raised = [c for c in characters if unicodedata.decomposition(c).startswith(("<super>", "<sub>", "<fraction>"))]
    return re.compile(f"([{''.join(raised)}]+)")


def plain_marks(text: str) -> str:
    """The text with straight quotes and apostrophes and single spaces, as phrases are compared."""
    return " ".join(text.translate(_PLAIN_MARKS).split())


def final_punctuation(text: str) -> str:
    """The mark that ends the text: ".", "?", "!" or "" for none.

    White space after it is ignored; full-width, Arabic and Devanagari marks count as their Latin kin.
    """
    stripped = text.rstrip()
    return _FINAL_MARKS.get(stripped[-1], "") if stripped else ""


def without_final_punctuation(text: str) -> str:
    """The text without the sentence marks and white space that end it (a text of marks only stays)."""
    end = len(text)
    while end and (text[end - 1] in _FINAL_MARKS or text[end - 1].isspace()):
        end -= 1
    return text[:end] if end else text


@dataclass(frozen=True)
class MatchedPrompts:
    """Two classes of prompts after final punctuation was looked at."""

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    note: str
    """One line for the record: what was found and what was done."""


def match_punctuation(positive: Prompts, negative: Prompts, mode: PunctuationMode) -> MatchedPrompts:
    """Two classes whose final punctuation no longer tells them apart (new Prompts, same ids and order).

    In the usual corpora the last mark alone separates the classes (AdvBench has none, XSTest always "?").
    `mode` "match": where the shares of . ? ! and none differ between the classes, final punctuation is
    removed from every prompt of both; alike sets stay untouched. "strip" always removes it, "keep" never.

    >>> asked, told = [ml.Prompt("a", "Bake a cake?")], [ml.Prompt("b", "Bake a cake.")]
    >>> ml.match_punctuation(asked, told, "match").positive[0].text
    'Bake a cake'
    """
    if mode not in ("match", "keep", "strip"):
        raise UserError(f"punctuation mode {mode!r} is unknown; choose match, keep or strip")
    positive, negative = as_prompts(positive, name="positive"), as_prompts(negative, name="negative")
    alike = _same_shares(positive, negative)
    found = f"positive {_shares(positive)}; negative {_shares(negative)}"
    if mode == "keep" or (mode == "match" and alike):
        why = "alike in both classes" if alike else "asked to keep it, though it differs between the classes"
        return MatchedPrompts(tuple(positive), tuple(negative), f"final punctuation kept ({why}): {found}")
    why = "asked to strip it" if mode == "strip" else "it differed between the classes"
    note = f"final punctuation removed from all {len(positive)} + {len(negative)} prompts ({why}): {found}"
    return MatchedPrompts(_stripped(positive), _stripped(negative), note)


def _stripped(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    return tuple(replace(prompt, text=without_final_punctuation(prompt.text)) for prompt in prompts)


def _marks(prompts: Sequence[Prompt]) -> Counter[str]:
    return Counter(final_punctuation(prompt.text) for prompt in prompts)


def _same_shares(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> bool:
    ours, theirs = _marks(positive), _marks(negative)
    # Cross-multiplied, so that classes of different size compare exactly.
    return all(ours[mark] * len(negative) == theirs[mark] * len(positive) for mark in {*ours, *theirs})


def _shares(prompts: Sequence[Prompt]) -> str:
    marks = _marks(prompts)
    parts = [f"{mark or 'none'} {marks[mark]}" for mark in (".", "?", "!", "") if marks[mark]]
    return ", ".join(parts) or "no prompts"
