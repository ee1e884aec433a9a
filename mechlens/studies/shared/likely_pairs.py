"""Twins that nobody called twins: lists of one length whose rows share most of their words."""

from collections.abc import Sequence
from itertools import starmap

from mechlens.errors import warn
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import normalise_text

SHARED = 0.5
"""Share of its words that a row has in common with its twin, at least."""
AHEAD = 0.2
"""By how much that is more than with another row's: prompts of one pattern share words whatever their order."""


BY_OPTION = "give --paired (paired=True in Python), which keeps each whole"
BY_COLUMN = (
    "number them in a column of both files and name it as the family column (--family-column, family_column in "
    "Python), which keeps each whole; torn apart, a prompt is scored by what was fitted on its twin"
)
"""What is to be done, where sides come as lists and where as files."""


def warn_of_twins(positive: Sequence[Prompt], negative: Sequence[Prompt], remedy: str = BY_OPTION) -> None:
    """A UserWarning where row i of both sides looks like a pair, and isn't kept together."""
    kept = {one.group for one in positive} & {one.group for one in negative}
    if kept or len(positive) != len(negative):
        return
    ups, downs = ([set(normalise_text(one.text).split()) for one in side] for side in (positive, negative))
    twins = list(starmap(_overlap, zip(ups, downs, strict=True)))
    others = list(starmap(_overlap, zip(ups, [*downs[1:], downs[0]], strict=True)))
    alike = sum(share >= SHARED for share in twins) > len(twins) / 2
    if alike and sum(twins) - sum(others) >= AHEAD * len(twins):
        warn(
            "both sides have equally many prompts, and most share half of their words or more with the prompt of the "
            f"same row, as pairs do; if they are pairs, {remedy}",
        )


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(len(a | b), 1)
