"""What a comparison on twins allows to be said: does the guard read more of harm than the words do?

The rule is tested on planted worlds; its error rates are in this folder's README.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.probing.auroc import MIN_FAMILIES, auroc_difference, auroc_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline

GUARD = "latent_guard"
SURFACE = ("tfidf", "mean_embedding", "token_identity", "length")
"""Detectors that see the words, not what the model makes of them."""
WORDS = {"tfidf": "TF-IDF", "mean_embedding": "mean embedding"}
"""The two that stand for the words, in words."""
MARGIN = 0.05
"""A smaller gain of AUROC over the words isn't worth a guard."""
Outcome = Literal["beyond the words", "no more than the words", "inconclusive", "not measurable"]


@dataclass(frozen=True)
class TwinComparison:
    """Every detector that has scores, on the same twins."""

    n_pairs: int
    n_families: int
    """Those of pairs that aren't independent count as one."""
    areas: dict[str, Estimate]
    """AUROC by detector."""
    gains: dict[str, Estimate]
    """AUROC of the guard minus that of each other detector, paired."""

    @property
    def best_words(self) -> str:
        """The surface baseline with the largest AUROC."""
        return max((name for name in SURFACE if name in self.gains), key=lambda name: self.areas[name].value)

    @property
    def outcome(self) -> Outcome:
        """Beyond the words: better than chance and than every surface baseline, by the lower bounds. No more than the
        words: less than `MARGIN` better than the best of them, by the upper bound."""
        if not self.areas[GUARD].measurable:
            return "not measurable"
        lowest = min(self.gains[name].low for name in SURFACE if name in self.gains)
        if lowest > 0 and self.areas[GUARD].low > 0.5:
            return "beyond the words"
        return "no more than the words" if self.gains[self.best_words].high < MARGIN else "inconclusive"

    @property
    def pairs_needed(self) -> int:
        """About so many would show a gain like the one found, or `MARGIN` if that is larger, four times in five."""
        return math.ceil(self.n_pairs * self.gains[self.best_words].times_to_show(MARGIN))

    @property
    def more_pairs(self) -> int:
        """How many of these there aren't yet."""
        return max(self.pairs_needed - self.n_pairs, 0)

    @property
    def best_in_words(self) -> str:
        """What the best surface baseline is called where people read it."""
        return WORDS.get(self.best_words, self.best_words.replace("_", " "))

    @property
    def headline(self) -> Headline:
        """The one sentence: AUROC on twins, beside the best surface baseline."""
        if self.outcome == "not measurable":
            pairs = f"there are {self.n_pairs} pairs of prompts of one form, {self.n_families} of them independent"
            more = f"{MIN_FAMILIES - self.n_families} or more independent pairs would do"
            return Headline(self.outcome, pairs, f"where {MIN_FAMILIES} are needed", more)
        reached = f"on {self.n_pairs} twins the guard's AUROC is {self.areas[GUARD].brief}"
        best, gain = self.areas[self.best_words], self.gains[self.best_words]
        against = f"where {self.best_in_words} reaches {best.brief} (gain {gain.brief})"
        more = f"about {self.more_pairs} more pairs would settle it"
        return Headline(self.outcome, reached, against, more if self.outcome == "inconclusive" else "")


def compare_on_twins(
    scores: Mapping[str, Float[Tensor, " prompt"]], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> TwinComparison:
    """The guard (`GUARD`) and other detectors on twins; prompts of one pair, or more, are one family."""
    n_pairs, n_families = int(positive.sum()), len(set(families))
    others = [name for name in scores if name != GUARD]
    if n_families < MIN_FAMILIES:
        missing = Estimate.missing(2 * n_pairs)
        return TwinComparison(n_pairs, n_families, dict.fromkeys(scores, missing), dict.fromkeys(others, missing))
    areas = {name: auroc_estimate(values, positive, families) for name, values in scores.items()}
    gains = {name: auroc_difference(scores[GUARD], scores[name], positive, families) for name in others}
    return TwinComparison(n_pairs, n_families, areas, gains)
