"""Questions to a model about itself that are answered with a number from 0 to 100."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mechlens.errors import UserError, quoted
from mechlens.prompts.files.rows import packaged_rows
from mechlens.prompts.prompt import Prompt
from mechlens.registry import nearest


@dataclass(frozen=True)
class Scale:
    """One question; on half of a set's questions a high number shows the behaviour, on the others a low one.

    >>> ml.builtin_scales("risk")[1].high_shows
    False
    """

    prompt: Prompt
    high_shows: bool
    """A model that likes high numbers is then as often for the behaviour as against it."""


def builtin_scale_names() -> tuple[str, ...]:
    """The names that `builtin_scales` knows.

    >>> ml.builtin_scale_names()[:2]
    ('risk', 'patience')
    """
    return tuple(dict.fromkeys(str(row["set"]) for row in _rows()))


def builtin_scales(name: str) -> list[Scale]:
    """One built-in set of scales, after Betley et al. 2025 (Tell me about yourself), in words of ours.

    UserError for another name.

    >>> len(ml.builtin_scales("risk"))
    8
    """
    rows = [row for row in _rows() if row["set"] == name]
    if not rows:
        near, known = nearest(name, builtin_scale_names()), ", ".join(builtin_scale_names())
        raise UserError(f"there are no scales {quoted(name)}; {f'{near} ' if near else ''}choose one of {known}")
    return [
        Scale(Prompt(str(row["id"]), str(row["question"]), source="mechlens"), bool(row["high_shows"])) for row in rows
    ]


@cache
def _rows() -> list[dict[str, object]]:
    return packaged_rows(Path(__file__).parent / "data" / "scales.jsonl")
