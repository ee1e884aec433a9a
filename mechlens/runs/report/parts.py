"""The small pieces of a report: numbers, table cells, paragraphs, coloured tokens; words, never HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate

# The ends of the colour scale, light enough for dark text.
BLUE, RED = (94, 154, 211), (224, 102, 90)


@dataclass(frozen=True)
class TokenView:
    """A text as tokens, each coloured by its value: blue below zero, red above."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """One a token; NaN is grey."""
    title: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.tokens)} tokens need as many values, not {len(self.values)}")

    @classmethod
    def centred(
        cls, tokens: Sequence[str], values: Sequence[float], title: str, *, most: int | None = None
    ) -> "TokenView":
        """The last tokens (all, or at most so many) with the mean over all of them taken off.

        The residual stream has a large part that all tokens share; without it they can be compared.
        """
        mean = sum(values) / len(values)
        shown = min(len(values), most or len(values))
        part = f", last {shown} of {len(values)} tokens" if shown < len(values) else ""
        apart = tuple(value - mean for value in values[-shown:])
        return cls(tuple(tokens[-shown:]), apart, f"{title}, mean {mean:.2f} taken off{part}")

    @property
    def reach(self) -> float:
        """The largest absolute value, where the colour is strongest."""
        return max((abs(value) for value in self.values if math.isfinite(value)), default=0.0)


class TokenSpan(NamedTuple):
    """One token ready to be shown."""

    text: str
    colour: str
    value: str
    line_end: bool
    """True if the token ends a line of the text."""


class EstimateText(NamedTuple):
    """A number in words: the value, and what stands below it."""

    value: str
    detail: str


def token_spans(view: TokenView) -> list[TokenSpan]:
    """The tokens with white space made visible, and their colours, symmetric about zero."""
    return [
        TokenSpan(_visible(token), _colour(value, view.reach), _number(value), token.endswith("\n"))
        for token, value in zip(view.tokens, view.values, strict=True)
    ]


def estimate_text(estimate: Estimate) -> EstimateText:
    """`0.982` over `[0.961, 0.995], n = 96`; a count has no interval."""
    if math.isnan(estimate.value):
        return EstimateText("not measurable", f"n = {estimate.n}")
    # A count has no interval; an AUROC of exactly 1 or 0 has one, if without width.
    if estimate.low == estimate.value == estimate.high and estimate.value > 1 and float(estimate.value).is_integer():
        return EstimateText(f"{int(estimate.value):,}", f"n = {estimate.n:,}")
    low, high = _fixed(estimate.low), _fixed(estimate.high)
    return EstimateText(_fixed(estimate.value), f"[{low}, {high}], n = {estimate.n:,}")


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """The table's cells as text: four digits, a dash for what is missing."""
    return [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]


def paragraphs(text: str) -> list[list[tuple[bool, str]]]:
    """Paragraphs, each as pieces of (is code, text), code being what stands between backticks."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    return [[(i % 2 == 1, piece) for i, piece in enumerate(part.split("`"))] for part in parts]


def _cell(value: Any) -> str:
    if value is None or value is pd.NaT or value is pd.NA:
        return "–"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def _fixed(value: float) -> str:
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", "−")


def _visible(token: str) -> str:
    """The token with the white space that would not be seen, or would break the line, as signs."""
    shown = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    # A space before a word is seen as a gap; a token of spaces alone would be an empty box.
    return shown if shown.strip() else shown.replace(" ", "␣") or "∅"


def _colour(value: float, reach: float) -> str:
    if not math.isfinite(value):
        return "rgb(229,231,235)"
    share = abs(value) / reach if reach else 0.0
    end = RED if value > 0 else BLUE
    red, green, blue = (round(255 + (channel - 255) * share) for channel in end)
    return f"rgb({red},{green},{blue})"
