"""One variable or two? The double-dissociation contrast of the two misbehaving quadrants.

Harmfulness is read at `inst` and refusal at the last token, both out of fold and both scaled so that the well-behaved
quadrants lie at +1 (refused harmful) and -1 (accepted harmless). Then

    D = [harm(accepted harmful) - harm(refused harmless)] - [refusal(accepted harmful) - refusal(refused harmless)].

One variable, read along whatever axes, gives the same number twice and D = 0; two independent ones give up to 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from sklearn.linear_model import LinearRegression
from torch import Tensor

from mechlens.methods.probing.auroc import MIN_FAMILIES
from mechlens.methods.probing.out_of_fold import OutOfFoldScores
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import sample_and_resamples, with_interval
from mechlens.prompts.split import families_of_each
from mechlens.studies.shared.quadrants import QUADRANTS

REFUSED_HARMFUL, ACCEPTED_HARMFUL, REFUSED_HARMLESS, ACCEPTED_HARMLESS = QUADRANTS
MIN_IN_A_TOPIC = 5
"""A topic with fewer prompts than this of either class is not taken out."""


@dataclass(frozen=True)
class Places:
    """Which prompts are in which quadrant, of which family and topic."""

    quadrants: tuple[str, ...]
    families: tuple[str, ...]
    topics: tuple[str, ...]
    """Category of each prompt, "" where it has none."""

    @cached_property
    def _inside(self) -> dict[str, Bool[Tensor, " prompt"]]:
        return {name: torch.tensor([own == name for own in self.quadrants]) for name in QUADRANTS}

    def inside(self, quadrant: str) -> Bool[Tensor, " prompt"]:
        """Prompts of one quadrant."""
        return self._inside[quadrant]

    @cached_property
    def by_topic(self) -> dict[str, tuple[Bool[Tensor, " prompt"], ...]]:
        """Prompts of each topic that has enough of both classes: all, the harmful ones, the harmless ones."""
        harmful = self.inside(REFUSED_HARMFUL) | self.inside(ACCEPTED_HARMFUL)
        harmless = self.inside(REFUSED_HARMLESS) | self.inside(ACCEPTED_HARMLESS)
        found: dict[str, tuple[Bool[Tensor, " prompt"], ...]] = {}
        for topic in sorted(set(self.topics) - {""}):
            inside = torch.tensor([own == topic for own in self.topics])
            if min(int((inside & side).sum()) for side in (harmful, harmless)) >= MIN_IN_A_TOPIC:
                found[topic] = inside, inside & harmful, inside & harmless
        return found

    def fewest(self) -> tuple[str, int]:
        """The quadrant with the fewest families, and how many it has."""
        counts = families_of_each(self.quadrants, self.families)
        return min(((name, counts[name]) for name in QUADRANTS), key=lambda item: item[1])

    @property
    def measurable(self) -> bool:
        """Every quadrant has enough families for an interval."""
        return self.fewest()[1] >= MIN_FAMILIES


@dataclass(frozen=True)
class Dissociation:
    """D with what stands beside it."""

    contrast: Estimate
    """D with topics taken out, where prompts have any; in pole half-distances."""
    beyond_words: Estimate
    """D once what the surface baselines tell of harm and of refusal is taken out of both readings as well."""
    over_topics: Estimate
    """D as it is over all prompts: where thresholds differ between topics, one variable gives more than 0 here."""
    harm_gap: Estimate
    """harm(accepted harmful) - harm(refused harmless): above 0 where harm is read though it isn't refused."""
    refusal_gap: Estimate
    """refusal(accepted harmful) - refusal(refused harmless): below 0 where refusal is read though it isn't harm."""
    by_fold_seed: tuple[float, ...]
    """D by each fold seed: how much of it is due to the folds."""
    prompts: pd.DataFrame
    """One row per prompt: quadrant, harm, refusal, topics taken out and scaled to the poles."""
    at_one_position: pd.DataFrame
    """Gaps and D with both read at the same position: columns position, number, value, low, high, n."""

    def metrics(self) -> dict[str, Estimate]:
        """Its numbers by their names in run.json."""
        return {
            "dissociation": self.contrast,
            "dissociation.beyond_words": self.beyond_words,
            "dissociation.over_topics": self.over_topics,
            "dissociation.harm_gap": self.harm_gap,
            "dissociation.refusal_gap": self.refusal_gap,
        }


def measure_dissociation(
    harm: OutOfFoldScores,
    refusal: OutOfFoldScores,
    surface: Float[Tensor, "prompt baseline"],
    places: Places,
    ids: Sequence[str],
    seed: int,
    resamples: int,
) -> Dissociation:
    """D of harm at `inst` and refusal at the last token; everything missing where a quadrant has too few families.

    `surface` holds what the baselines make of every prompt, out of fold.
    """
    last = harm.positions[-1]
    read = without_topics(harm.at("inst"), places), without_topics(refusal.at(last), places)
    worded = without_words(read[0], surface), without_words(read[1], surface)
    gaps = _gaps(*read, places, seed, resamples)
    seeds = zip(harm.by_seed("inst"), refusal.by_seed(last), strict=True)
    poles = [_to_poles(scores, places) for scores in read]
    return Dissociation(
        contrast=gaps["D"],
        beyond_words=_gaps(*worded, places, seed, resamples)["D"],
        over_topics=_gaps(harm.at("inst"), refusal.at(last), places, seed, resamples)["D"],
        harm_gap=gaps["harm"],
        refusal_gap=gaps["refusal"],
        by_fold_seed=tuple(contrast_of(without_topics(h, places), without_topics(r, places), places) for h, r in seeds)
        if places.measurable
        else (),
        prompts=pd.DataFrame(
            {"id": ids, "quadrant": places.quadrants, "harm": poles[0].numpy(), "refusal": poles[1].numpy()}
        ),
        at_one_position=_at_one_position(harm, refusal, places, seed, resamples),
    )


def contrast_of(harm: Float[Tensor, " prompt"], refusal: Float[Tensor, " prompt"], places: Places) -> float:
    """D of the sample, from raw scores; NaN where a quadrant is empty."""
    return float(_gap_draws(harm, refusal, places, torch.ones(1, len(harm), dtype=torch.float64))["D"])


def _gaps(
    harm: Float[Tensor, " prompt"], refusal: Float[Tensor, " prompt"], places: Places, seed: int, resamples: int
) -> dict[str, Estimate]:
    """Both gaps and D, with intervals over families; the poles are scaled anew in every resample."""
    least = places.fewest()[1]
    if not places.measurable:
        return {name: Estimate.missing(least) for name in ("harm", "refusal", "D")}
    drawn = sample_and_resamples(places.families, resamples, seed, places.quadrants)
    n = sum(name in (ACCEPTED_HARMFUL, REFUSED_HARMLESS) for name in places.quadrants)
    return {name: _widened(draws, least, n) for name, draws in _gap_draws(harm, refusal, places, drawn).items()}


def _widened(draws: Float[Tensor, " draw"], least: int, n: int) -> Estimate:
    """A percentile interval of few families is too narrow: it is stretched as Student's t is beside the normal."""
    narrow = with_interval(float(draws[0]), draws[1:], n)
    stretch = float(stats.t.ppf(0.975, least - 1) / stats.norm.ppf(0.975)) * (least / (least - 1)) ** 0.5
    low, high = (narrow.value + stretch * (bound - narrow.value) for bound in (narrow.low, narrow.high))
    return Estimate(narrow.value, low, high, n)


def _gap_draws(
    harm: Float[Tensor, " prompt"],
    refusal: Float[Tensor, " prompt"],
    places: Places,
    drawn: Float[Tensor, "draw prompt"],
) -> dict[str, Float[Tensor, " draw"]]:
    gaps = [_gap(scores, places, drawn) for scores in (harm, refusal)]
    return {"harm": gaps[0], "refusal": gaps[1], "D": gaps[0] - gaps[1]}


def _gap(
    scores: Float[Tensor, " prompt"], places: Places, drawn: Float[Tensor, "draw prompt"]
) -> Float[Tensor, " draw"]:
    """Accepted harmful minus refused harmless, in halves of the distance of the poles."""
    means = {name: _weighted_mean(scores, drawn * places.inside(name)) for name in QUADRANTS}
    poles = (means[REFUSED_HARMFUL] - means[ACCEPTED_HARMLESS]) / 2
    return (means[ACCEPTED_HARMFUL] - means[REFUSED_HARMLESS]) / poles


def _weighted_mean(scores: Float[Tensor, " prompt"], weights: Float[Tensor, "draw prompt"]) -> Float[Tensor, " draw"]:
    return weights @ scores / weights.sum(dim=1)


def _to_poles(scores: Float[Tensor, " prompt"], places: Places) -> Float[Tensor, " prompt"]:
    """Scores with refused harmful prompts at +1 and accepted harmless ones at -1 on average."""
    up, down = (scores[places.inside(name)].mean() for name in (REFUSED_HARMFUL, ACCEPTED_HARMLESS))
    return (scores - (up + down) / 2) / ((up - down) / 2)


def without_topics(scores: Float[Tensor, "*world prompt"], places: Places) -> Float[Tensor, "*world prompt"]:
    """Scores less their topic's level, which is the mean of its harmful and of its harmless prompts in equal parts.

    A model that has one variable and another threshold for every topic is so not taken for one with two.
    """
    left = scores.clone()
    for inside, *sides in places.by_topic.values():
        left[..., inside] -= torch.stack([scores[..., side].mean(dim=-1) for side in sides]).sum(dim=0)[..., None] / 2
    return left


def without_words(
    scores: Float[Tensor, " prompt"], surface: Float[Tensor, "prompt baseline"]
) -> Float[Tensor, " prompt"]:
    """Scores less what a linear regression on the surface baselines' scores makes of them.

    A feature of the words that goes with harm, read where harm is, is so not taken for a second variable.
    """
    known = surface.double().numpy()
    told = LinearRegression().fit(known, scores.numpy()).predict(known)
    return scores - torch.from_numpy(told)


def _at_one_position(
    harm: OutOfFoldScores, refusal: OutOfFoldScores, places: Places, seed: int, resamples: int
) -> pd.DataFrame:
    rows = []
    for position in harm.positions:
        first, second = (without_topics(scores.at(position), places) for scores in (harm, refusal))
        gaps = _gaps(first, second, places, seed, resamples)
        rows += [{"position": position, "number": name, **gap.row()} for name, gap in gaps.items()]
    return pd.DataFrame(rows)
