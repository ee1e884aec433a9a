"""Which colour a thing has: the same in all figures of all reports, and another shade of it on a dark screen."""

import re
from collections.abc import Iterable
from typing import NamedTuple

INK, QUIET, GRID, RULE = "#1f2933", "#5f6b7a", "#e9ecf0", "#8a8f98"
EDGE = "#c5cbd3"
PAPER = "#ffffff"
BOTH = "#7b4fa3"
GREY = "#7d8590"

# Tol's muted colours, the strong ones first: those of Okabe and Ito are kept for the things below.
PALETTE = ("#332288", "#cc6677", "#999933", "#882255", "#44aa99", "#aa4499")

AFTER = ("#332288", "#cc6677", "#44aa99", "#882255", "#117733", "#aa4499")
"""Of post[0], post[1], ...: none is near to the colour of `inst`, and none of their lines is solid, as its is."""

THINGS = {
    # Harm is one colour and refusal another; a prompt with both is a mixture of them, one with neither is green.
    "harm": "#d55e00", "harmful": "#d55e00", "harmfulness": "#d55e00", "refusal": "#0072b2", "refused": "#0072b2",
    "refused harmful": BOTH, "accepted harmful": "#d55e00", "refused harmless": "#0072b2",
    "accepted harmless": "#009e73", "harmless": "#009e73", "accepted": "#009e73",
    "inst": "#e69f00", "end of the instruction": "#e69f00", "last": "#56b4e9", "last token": "#56b4e9",
    "template": "#cc79a7", "instruction": "#4d4d4d", "words": "#4d4d4d",
    "latent guard": "#0072b2", "paper rule": "#56b4e9", "refusal direction": "#cc79a7", "own refusal": "#e69f00",
    "unsteered": "#4d4d4d", "base": "#4d4d4d", "direction fitted here": "#0072b2",
    "random": GREY, "control": GREY, "chance": GREY, "best of random": GREY, "largest of random": GREY,
}  # fmt: skip
"""By the words that the name of a curve, bar or point begins with; the longest beginning counts."""

DIVERGING = ((0.0, "#2166ac"), (0.25, "#92c5de"), (0.5, PAPER), (0.75, "#f4a582"), (1.0, "#b2182b"))
SEQUENTIAL = ((0.0, "#f7fbff"), (0.25, "#c6dbef"), (0.5, "#6baed6"), (0.75, "#2171b5"), (1.0, "#08306b"))

ON_DARK = {
    INK: "#e6e9ed", QUIET: "#a3adb9", GRID: "#2a313a", RULE: "#7d8692", EDGE: "#4a535f", PAPER: "#15191f",
    "#0072b2": "#4da6e8", "#d55e00": "#f0803c", "#009e73": "#2cc295", "#cc79a7": "#e59bc6", "#e69f00": "#f2b632",
    "#56b4e9": "#a5d8f7", "#4d4d4d": "#c3c9d1", BOTH: "#b28bdb", GREY: "#97a0ac",
    "#332288": "#9c8cf0", "#cc6677": "#e8909d", "#999933": "#c9c95e", "#882255": "#d06a9a", "#44aa99": "#6fd3c2",
    "#aa4499": "#d580cf", "#117733": "#5fbf7f",
    "#2166ac": "#58a9fb", "#92c5de": "#3c6e9e", "#f4a582": "#a3523f", "#b2182b": "#ff6450",
    "#f7fbff": "#18202a", "#c6dbef": "#1c3a5a", "#6baed6": "#27608f", "#2171b5": "#3b8bcc", "#08306b": "#58b2ff",
}  # fmt: skip
"""What the report's script puts in place of each colour on a dark screen.

The plain middle of a scale is the page there too and its ends are full colours, so captions say "plain as the page" and
"full red", which is true on both.
"""


class Look(NamedTuple):
    """How a group is drawn; groups of one colour differ in `turn`, their dash, hatch or symbol."""

    colour: str
    turn: int


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of every group of a figure: a thing's own colour, or the next of those that no thing has.

    A template's token has the look of its number, whatever stands beside it.
    """
    used: dict[str, int] = {}
    found, others = {}, 0
    for name in names:
        after = re.match(r"post\[(-?\d+)\]", name)
        colour = AFTER[int(after[1]) % len(AFTER)] if after else _of_thing(name)
        if colour is None:
            colour, others = PALETTE[others % len(PALETTE)], others + 1
        turn = 1 + int(after[1]) % 2 if after else 0
        own = after[0] if after else colour
        found[name] = Look(colour, turn + used.get(own, 0))
        used[own] = used.get(own, 0) + 1
    return found


def _of_thing(name: str) -> str | None:
    known = [beginning for beginning in THINGS if re.match(rf"{beginning}\b", name.lower())]
    return THINGS[max(known, key=len)] if known else None


def faded(colour: str, opacity: float) -> str:
    """The hex colour with its opacity as two more digits, for bands and areas that lie over each other."""
    return f"{colour}{round(255 * opacity):02x}"
