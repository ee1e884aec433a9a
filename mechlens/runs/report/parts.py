"""The small pieces of a report: numbers, table headings and cells, paragraphs, coloured tokens; words, never HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from mechlens.methods.statistics.estimate import NO_INTERVAL, Estimate

HEADINGS = {
    "auroc": "AUROC",
    "effect_size": "effect size (Hedges' g)",
    "text_loss_rise": "plain text more surprising by (nats a token)",
    "random_bound": "chance reaches",
    "difference_text": "how the sides differ",
    "auroc on twins": "AUROC on twins",
    "base_auroc": "AUROC in the base",
    "base_log_odds": "log-odds of the behaviour, base",
    "base_probability": "probability in the base",
    "behaviour_log_odds": "log-odds of the behaviour",
    "belief_harm": "harmfulness belief",
    "belief_refusal": "refusal belief",
    "brier": "Brier score",
    "centered": "centred",
    "change": "change from the base",
    "cka": "CKA",
    "corrected": "cosine, corrected for noise",
    "cos_harmful": "cosine with harmful",
    "cos_refused": "cosine with refused",
    "fpr": "false positives (FPR)",
    "frozen": "base's readout, AUROC",
    "frozen_change": "base's readout, change from the base",
    "gap": "refusal gap",
    "gap_change": "refusal gap, change from the base",
    "grad_norm": "gradient norm",
    "in_adapter_training": "in the adapter's training data",
    "in_earlier_source": "in an earlier source",
    "in_guard_fit": "in the guard's training data",
    "is_push": "moves towards the other class",
    "kappa": "Cohen's kappa",
    "kl": "KL (nats)",
    "log_odds": "refusal log-odds",
    "log_odds_change": "refusal log-odds, change",
    "low": "95% low",
    "high": "95% high",
    "highest_fold_seed": "highest over other folds",
    "lowest_fold_seed": "lowest over other folds",
    "n_tokens": "tokens",
    "one_variable_95": "one variable, 95% lie below",
    "one_variable_mean": "one variable, mean",
    "own_ce": "loss on own answers (nats)",
    "own": "readout fitted here, AUROC",
    "own_change": "readout fitted here, change from the base",
    "own_words_difference": "difference in the model's own words",
    "p_corrected": "p, corrected",
    "permuted_mean": "labels permuted within families, mean",
    "plain_ce": "loss on plain text (nats)",
    "probe_change": "probe fitted here, change from the base",
    "random_maximum": "random directions, maximum",
    "random_mean": "random directions, mean",
    "readout_gap": "base's readout minus the one fitted here",
    "recalibrated": "accuracy at a new threshold",
    "reliability_first": "reliability of the first direction",
    "reliability_second": "reliability of the second direction",
    "sha256": "SHA-256",
    "threshold_gap": "frozen threshold minus a new one",
    "tpr": "true positives (TPR)",
    "tpr_at_1pct_fpr": "TPR at 1% FPR",
    "tpr_at_5pct_fpr": "TPR at 5% FPR",
    "validation_auroc": "AUROC, validation prompts",
    "verdict_after": "verdict after",
    "verdict_before": "verdict before",
}
"""What a table's columns are called where taking the underscores out of the code name doesn't say it."""
_BEGINNINGS = {
    "verdict_after_": "verdict after, ", "verdict_before_": "verdict before, ", "verdict_": "verdict of ",
    "flagged.": "flagged by ", "plain.": "plain request: ", "score.": "score of ",
}  # fmt: skip
_ENDS = {"_low": ", 95% low", "_high": ", 95% high", ".centered": ", centred"}


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
    side: str
    """Which colour it has: "above", "below", or "missing"."""
    share: float
    """How much of it, from 0 to 1."""
    value: str
    line_end: bool
    """True if a new line of the text begins after the token, with more than white space."""


class EstimateText(NamedTuple):
    """A number in words: the value, and what stands below it."""

    value: str
    detail: str


def token_spans(view: TokenView) -> list[TokenSpan]:
    """The tokens with white space made visible, and their colours, symmetric about zero; no line is empty."""
    following = (*view.tokens[1:], "")
    return [
        TokenSpan(
            visible(token), *_colour(value, view.reach), _number(value), token.endswith("\n") and bool(after.strip())
        )
        for token, after, value in zip(view.tokens, following, view.values, strict=True)
    ]


def estimate_text(estimate: Estimate) -> EstimateText:
    """`0.982` over `[0.961, 0.995], n = 96`; a count has no interval."""
    if math.isnan(estimate.value):
        return EstimateText("not measurable", f"n = {estimate.n}")
    # A count or a quantile has no interval; an AUROC of exactly 1 or 0 has one, if without width.
    if estimate.low == estimate.value == estimate.high and estimate.value not in (0, 1):
        count = estimate.value > 1 and float(estimate.value).is_integer()
        return EstimateText(f"{int(estimate.value):,}" if count else _fixed(estimate.value), f"n = {estimate.n:,}")
    if not estimate.has_interval:
        return EstimateText(_fixed(estimate.value), f"{NO_INTERVAL}, n = {estimate.n:,}")
    low, high = _fixed(estimate.low), _fixed(estimate.high)
    return EstimateText(_fixed(estimate.value), f"[{low}, {high}], n = {estimate.n:,}")


def heading(column: str) -> str:
    """A column's name in words: ours by `HEADINGS`, any other with spaces for its underscores."""
    if column in HEADINGS:
        return HEADINGS[column]
    for beginning, words in _BEGINNINGS.items():
        if column.startswith(beginning):
            return words + heading(column.removeprefix(beginning))
    for end, words in _ENDS.items():
        if column.endswith(end):
            return heading(column.removesuffix(end)) + words
    return column.replace("_", " ")


def in_words(metric: str) -> str:
    """A metric's name in words, where a report gives it none: "n.checkpoints" is "number of checkpoints"."""
    first, *rest = metric.split(".")
    if first in ("n", "candidates"):
        return " ".join(["number of", *(["candidates"] if first != "n" else []), *map(heading, rest)])
    return ", ".join(map(heading, (first, *rest)))


ITEM = "- "
"""What a paragraph begins with that is an item of a list."""
Pieces = list[tuple[bool, str]]
"""A paragraph as (is code, text), code being what stands between backticks."""


def paragraphs(text: str) -> list[tuple[bool, list[Pieces]]]:
    """Paragraphs in runs of one kind, each with whether it is a list."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    runs = groupby(parts, key=lambda part: part.startswith(ITEM))
    return [(listed, [_pieces(part.removeprefix(ITEM)) for part in run]) for listed, run in runs]


def _pieces(part: str) -> Pieces:
    return [(i % 2 == 1, piece) for i, piece in enumerate(part.split("`"))]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def _fixed(value: float) -> str:
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", "−")


def visible(token: str) -> str:
    """The token with the white space that would not be seen, or would break the line, as signs; never empty."""
    signs = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in signs)
    # A space before a word is seen as a gap; a token of spaces alone would be an empty box.
    return shown if shown.strip() else shown.replace(" ", "␣") or "∅"


def _colour(value: float, reach: float) -> tuple[str, float]:
    if not math.isfinite(value):
        return "missing", 1.0
    return "above" if value > 0 else "below", round(abs(value) / reach, 3) if reach else 0.0
