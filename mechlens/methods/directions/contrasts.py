"""Cosines between mean differences that may be of different prompts, models and positions, noise counted once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, cosine, direction_cosine, mean_difference
from mechlens.methods.directions.nulls import MIN_RELIABLE
from mechlens.methods.statistics.effects import CosineCurve, Effect, cosine_curve, jackknife
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes


@dataclass(frozen=True)
class Contrast:
    """The mean of one class minus that of another, at one position of some activations."""

    acts: Activations
    position: str
    up: str
    """The class that it points towards."""
    down: str


def contrast_cosine(first: Contrast, second: Contrast, levels: Sequence[int], *, seed: int) -> CosineCurve:
    """Cosine between two contrasts at some levels; see `cosine_curve`.

    Families that both have are the same questions, whose noise the two share: the corrected cosine counts products of
    different questions only.
    """
    parts = {(id(one.acts), one.position): one for one in (first, second)}
    names = {key: f"{i} " for i, key in enumerate(parts)}
    values = torch.cat([
        torch.stack([one.acts.at(level, one.position) for level in levels], dim=1) for one in parts.values()
    ])  # fmt: skip
    labels = tuple(names[key] + label for key, one in parts.items() for label in one.acts.labels)
    families = [family for one in parts.values() for family in one.acts.families]

    def effect(one: Contrast) -> Effect:
        name = names[id(one.acts), one.position]
        return Effect(values, labels, {name + one.up: 1.0, name + one.down: -1.0})

    return cosine_curve(effect(first), effect(second), families, tuple(levels), seed=seed)


def saved_contrast_cosine(contrast: Contrast, saved: Direction, reliability: float) -> tuple[Estimate, Estimate]:
    """Cosine of a contrast with a direction that other prompts gave, at its level: as measured, and corrected.

    Jackknife over families. Corrected for the noise of the contrast alone, by its reliability: a saved direction
    doesn't tell its own. UserError where weight regime, site, size or levels differ.
    """
    acts = contrast.acts
    direction = mean_difference(acts, contrast.up, contrast.down, saved.level, contrast.position)
    direction_cosine(direction, saved)  # whether they can be compared
    values = acts.at(saved.level, contrast.position)[:, None]
    effect = Effect(values, acts.labels, {contrast.up: 1.0, contrast.down: -1.0})
    codes, n = family_codes(acts.families)
    weights = torch.cat([torch.ones(1, len(codes)), (codes != torch.arange(n)[:, None]).double()])
    drawn = effect.directions(weights, 0)
    inside = {name for name, own in zip(acts.ids, acts.labels, strict=True) if own in (contrast.up, contrast.down)}
    measured = jackknife(cosine(drawn, saved.vector.to(drawn).expand_as(drawn)), len(inside))
    if not reliability >= MIN_RELIABLE:
        return measured, Estimate.missing(measured.n)
    by = math.sqrt(reliability)
    return measured, Estimate(measured.value / by, measured.low / by, measured.high / by, measured.n)
