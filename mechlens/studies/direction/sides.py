"""The two sides of a concept: what they are called, their pairs, and whether there are enough of each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mechlens.errors import UserError, kind_of, many, quoted
from mechlens.prompts.asked import Prompts
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.files.rows import FILE_ENDINGS
from mechlens.prompts.prompt import Prompt

POSITIVE, NEGATIVE = "positive", "negative"
MIN_OF_A_SIDE = 15
"""So that a fifth of them, the validation part, is three."""


def require_in_order(model: object, positive: object, negative: object) -> None:
    """UserError where a model stands among the prompts."""
    given = next((one for one in (positive, negative) if hasattr(one, "cfg")), None)
    if given is not None or isinstance(model, list | tuple):
        raise UserError(
            f"the model comes first, and {kind_of(model)} was given there; "
            "write find_concept(model, positive, negative)"
        )


def names_given(positive: Prompts, negative: Prompts) -> tuple[str, str]:
    """What the two sides are called by whoever gives them, where that tells them apart."""
    first, second = (_name(given) for given in (positive, negative))
    return (first, second) if first and second and first != second else (POSITIVE, NEGATIVE)


def two_sides(given: object) -> tuple[str, str]:
    """The names of both sides; UserError for anything else than two different texts."""
    named = tuple(given) if isinstance(given, list | tuple) else ()
    if len(named) != 2 or not all(isinstance(one, str) and one for one in named) or named[0] == named[1]:
        raise UserError(
            f"sides is {quoted(given, 80)}; give the names of both sides, two different texts, such as "
            "sides=('harmful', 'harmless')"
        )
    return named


def _name(given: Prompts) -> str:
    """A column's name, or the label of every prompt."""
    name = getattr(given, "name", "")
    if isinstance(name, str) and name:
        return name
    rows = given if isinstance(given, list | tuple) else []
    labels = {row.label if isinstance(row, Prompt) else "" for row in rows}
    return labels.pop() if len(labels) == 1 else ""


def twins(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> list[Prompt]:
    """The negative prompts, each in the family of the positive one of its row."""
    if len(positive) != len(negative):
        raise UserError(
            f"there are {len(positive)} {POSITIVE} and {len(negative)} {NEGATIVE} prompts; --paired (paired=True) "
            "needs equally many, row i of both being a pair"
        )
    return [replace(twin, family=prompt.group) for prompt, twin in zip(positive, negative, strict=True)]


def require_enough(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> None:
    for name, prompts in ((POSITIVE, positive), (NEGATIVE, negative)):
        if len(prompts) < MIN_OF_A_SIDE:
            called = prompts[0].text if len(prompts) == 1 else ""
            if called in builtin_names():
                raise UserError(
                    f"{called!r} was given as the one prompt of the {name} side; the built-in set of that name is "
                    f"ml.builtin_prompts({called!r})"
                )
            if called.endswith(FILE_ENDINGS):
                raise UserError(
                    f"{called!r} was given as the one prompt of the {name} side; the prompts in a file of that name "
                    f"are ml.load_prompts({called!r})"
                )
            raise UserError(
                f"the {name} side has {many(len(prompts), 'prompt')}; a direction with held-out evidence needs at "
                f"least {MIN_OF_A_SIDE} of each side"
            )


def short_sides(positive: str, negative: str) -> tuple[str, str]:
    """What two sources are called: a file's name without its folder, unless both then look the same."""
    first, second = (Path(source).name if Path(source).is_file() else source for source in (positive, negative))
    return (positive, negative) if first == second else (first, second)
