"""Prompt sets that come with mechlens: matched harmful and harmless requests, benign and misleading ones, and texts."""

from functools import cache
from pathlib import Path
from typing import Literal

from mechlens.errors import UserError
from mechlens.prompts.files.rows import packaged_rows
from mechlens.prompts.prompt import Prompt, PromptPair

_SOURCE = "mechlens"
_DATA = Path(__file__).parent / "data"
_Label = Literal["harmful", "harmless"]
_SIDES: dict[str, tuple[str, _Label]] = {
    "harmful": ("pairs", "harmful"),
    "harmless": ("pairs", "harmless"),
    "looks-harmful": ("looks_harmful", "harmless"),
    "looks-harmful-twins": ("looks_harmful", "harmful"),
    "looks-harmless": ("looks_harmless", "harmful"),
    "looks-harmless-twins": ("looks_harmless", "harmless"),
}
"""The sets that are one side of a file of pairs: the file and the side."""
_JOINED = {
    "all-harmful": ("harmful", "looks-harmless", "looks-harmful-twins"),
    "all-harmless": ("harmless", "looks-harmless-twins", "looks-harmful"),
}
"""The sets that hold others: both sides of every pair that there is."""


def builtin_names() -> tuple[str, ...]:
    """The names that `builtin_prompts` and `load_prompts` know."""
    return (*_SIDES, "benign", *_JOINED)


def builtin_prompts(name: str) -> list[Prompt]:
    """One built-in set, in file order.

    "harmful" and "harmless" are the two sides of `builtin_pairs`: the same row is the same family, so a pair
    never straddles a split. "benign" is a set of ordinary requests, labelled "harmless". "looks-harmful" is
    harmless in alarming words ("kill a process"), "looks-harmless" is unfair or dishonest in mild ones; the
    twins of each are of the other class in nearly the same words, row by row one family. "all-harmful" and
    "all-harmless" are the two sides of all these pairs.
    Raises UserError for another name.

    >>> {prompt.label for prompt in ml.builtin_prompts("looks-harmful")}
    {'harmless'}
    """
    if name in _SIDES:
        file, label = _SIDES[name]
        return [pair.clean if label == "harmful" else pair.corrupt for pair in _pairs(file)]
    if name == "benign":
        return list(_benign())
    if name in _JOINED:
        return [prompt for part in _JOINED[name] for prompt in builtin_prompts(part)]
    raise UserError(f"there is no built-in set {name!r}; choose one of {', '.join(builtin_names())}")


def builtin_pairs() -> list[PromptPair]:
    """The built-in pairs: `clean` is harmful, `corrupt` harmless, alike in opening, length and last mark.

    >>> pair = ml.builtin_pairs()[0]
    >>> pair.clean.label, pair.corrupt.label, pair.clean.family == pair.corrupt.family
    ('harmful', 'harmless', True)
    """
    return list(_pairs("pairs"))


DOMAINS = ("prose", "code")
"""The built-in kinds of plain text."""


def domain_texts(name: str) -> list[Prompt]:
    """Plain texts of one kind, of our own writing: "prose", or "code" in several languages.

    >>> len(ml.domain_texts("prose")), len(ml.domain_texts("code"))
    (16, 16)
    """
    if name not in DOMAINS:
        raise UserError(f"there are no built-in texts {name!r}; choose one of {', '.join(DOMAINS)}")
    rows = packaged_rows(_DATA / "domains.jsonl")
    return [Prompt(row["id"], row["text"], source=_SOURCE) for row in rows if row["set"] == name]


@cache
def _pairs(file: str) -> tuple[PromptPair, ...]:
    rows = packaged_rows(_DATA / f"{file}.jsonl")
    return tuple(PromptPair(_side(row, "harmful"), _side(row, "harmless")) for row in rows)


@cache
def _benign() -> tuple[Prompt, ...]:
    return tuple(
        Prompt(id=row["id"], text=row["text"], label="harmless", category=row["category"], source=_SOURCE)
        for row in packaged_rows(_DATA / "benign.jsonl")
    )


def _side(row: dict[str, str], label: _Label) -> Prompt:
    return Prompt(
        id=f"{row['id']}.{label}",
        text=row[label],
        label=label,
        category=row["category"],
        source=_SOURCE,
        family=row["id"],
    )
