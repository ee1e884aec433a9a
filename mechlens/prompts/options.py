"""Choices written into a question ("Option A: ... Option B: ..."): their letters exchanged, or their words alone."""

import re
from typing import NamedTuple

LETTERS = {"A": "B", "B": "A"}
_STANDING = re.compile(r"(?<![\w'’-])[AB](?![\w'’-])")
"""A letter that stands alone; every B that does is an option's, and an A may be an article."""
_LIST = re.compile(r"""(?<![\w])['"‘“]?[AB]['"’”]?(?:\s*(?:or|and|/|,)\s*)['"‘“]?[AB]['"’”]?(?![\w])""")
"""Both letters by name, as in "(A or B)": the same whichever option has which."""
_NAMED = re.compile(r"(?i:\b([a-z]+))\s+([AB])(?![\w'’-])")
_MARKED = re.compile(r"""(?<![\w'’-])[AB](?=\s*[:).=]|\s+[-–—]\s)|(?<=[(\['"‘“*])[AB](?=[)\]'"’”*])""")
"""A letter that punctuation makes a label: "A:", "A)", "(A)", "'A'", "A - "."""
_NAME = re.compile(r"""([A-Za-z]*)\s*[(\['"‘“*]*$""")
"""What stands before a letter and may belong to it, such as "Option "."""
_COLON = re.compile(r"""[)\]'"’”*]*\s*[:).=,–—-]*\s*""")
_JOIN = re.compile(r"[,;(]*\s*\b(?:and|but|or|whereas|while)\s*$|[,;(\s]+$")
"""What joins an option to the next one, such as ", while"."""
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
_TASK = re.compile(
    r"\b(?:answer|choice|choose|decide|indicate|letter|make|only|opt|option|pick|please|preference|provide|remember|reply"
    r"|respond|select|state|type|which|you)\b",
    re.IGNORECASE,
)
"""What a sentence after the second option has that is no part of it: it asks for the choice."""
ASK = "Which one do you choose? Answer with its words."
FEWEST_WORDS = 2
"""Of an option; fewer come from a sentence that was read wrongly."""


class Options(NamedTuple):
    """A question without its request for a letter, and what each letter stands for."""

    question: str
    words: dict[str, str]


def exchanged_letters(text: str) -> str | None:
    """The text with A and B exchanged wherever they label an option; None where some letter's meaning isn't plain.

    Lists of both, such as "reply with A or B", stay as they are.
    """
    labels = _labels(text)
    if labels is None:
        return None
    return "".join(LETTERS[letter] if at in labels else letter for at, letter in enumerate(text))


def exchanged_places(text: str, one: str, other: str) -> str | None:
    """The text with two of its parts in each other's place; None where one is not there just once, or they overlap."""
    if not one or not other or text.count(one) != 1 or text.count(other) != 1:
        return None
    (start, first), (begin, second) = sorted((text.index(part), part) for part in (one, other))
    if start + len(first) > begin:
        return None
    return text[:start] + second + text[start + len(first) : begin] + first + text[begin + len(second) :]


def options_of(text: str) -> Options | None:
    """The words of each option, and the question asking for them instead of a letter; None where they aren't plain."""
    labels = _labels(text)
    if labels is None:
        return None
    first, second = sorted(min(at for at in labels if text[at] == letter) for letter in LETTERS)
    one = text[_begins(text, first) : second].rstrip("(['\"‘“* \n")
    if (name := _name_before(text, second)) and name == _name_before(text, first):
        one = one[: -len(name)].rstrip()
    if (whole := re.match(r".*[.!?;](?=\s|$)", one, re.DOTALL)) is not None:
        one = whole[0].strip()  # without what begins the next option's sentence, such as "Choosing"
    one = _JOIN.sub("", one)
    begin = _begins(text, second)
    sentences = _SENTENCES.split(text[begin:])
    kept = 1
    while kept < len(sentences) and not (_TASK.search(sentences[kept]) or _LIST.search(sentences[kept])):
        kept += 1
    two = " ".join(sentence.strip() for sentence in sentences[:kept]).strip()
    if min(len(one.split()), len(two.split())) < FEWEST_WORDS:
        return None
    end = text.index(sentences[kept - 1], begin) + len(sentences[kept - 1])
    return Options(f"{text[:end].strip()} {ASK}", {text[first]: one, text[second]: two})


def _begins(text: str, label: int) -> int:
    """Where an option's words begin after its letter."""
    colon = _COLON.match(text, label + 1)
    assert colon is not None  # it may be empty
    return colon.end()


def _name_before(text: str, label: int) -> str:
    """The word before a letter, which is the option's name where both have the same."""
    found = _NAME.search(text, endpos=label)
    return found[1].lower() if found else ""


def _labels(text: str) -> set[int] | None:
    """Where letters label options; None where a B can't be told, or one of the two has no label."""
    lists = [match.span() for match in _LIST.finditer(text)]

    def listed(at: int) -> bool:
        return any(start <= at < end for start, end in lists)

    named: dict[str, set[str]] = {}
    for match in _NAMED.finditer(text):
        named.setdefault(match[1].lower(), set()).add(match[2])
    labels = {match.start() for match in _MARKED.finditer(text)}
    labels |= {match.start(2) for match in _NAMED.finditer(text) if named[match[1].lower()] == {*LETTERS}}
    labels = {at for at in labels if not listed(at)}
    standing = {match.start() for match in _STANDING.finditer(text) if not listed(match.start())}
    unclear = {at for at in standing - labels if text[at] == "B"}
    return None if unclear or {text[at] for at in labels} != {*LETTERS} else labels
