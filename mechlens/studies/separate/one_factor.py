"""What one variable would give: worlds with a single factor, fitted to the data, and the same numbers in them.

In each world the residual at `inst` and at the last token is that of one latent number, along the axes that the data
have, with the data's own residuals shuffled over the prompts; whether a prompt is refused is drawn from that number
alone (logistic regression). Whatever D or an erasure gives there is what one variable gives here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.auroc import weighted_auroc
from mechlens.methods.statistics.resample import Fold, one_thread
from mechlens.studies.separate.dissociation import (
    ACCEPTED_HARMLESS,
    REFUSED_HARMFUL,
    Places,
    without_topics,
)
from mechlens.studies.shared.quadrants import QUADRANTS

WORLDS = 200
AT_ONCE = 50
"""Worlds read at once: all of them, with many prompts, would fill the memory."""


@dataclass(frozen=True)
class OneFactor:
    """The numbers in the data, and in each world of one variable; NaN where a quadrant came out empty."""

    observed: dict[str, float]
    """By name: D; erase_refusal.POSITION: AUROC of harm among accepted prompts once refusal is erased there;
    erase_harm.POSITION: AUROC of refusal among harmful prompts once harm is."""
    drawn: dict[str, Float[Tensor, " world"]]

    def quantile(self, name: str) -> float:
        """Nineteen worlds of twenty stay below."""
        return float(torch.nanquantile(self.drawn[name], 0.95))

    def p(self, name: str) -> float:
        """Share of worlds that reach the observed number, itself counted in."""
        worlds = self.drawn[name][~self.drawn[name].isnan()]
        return (1 + float((worlds >= self.observed[name]).sum())) / (1 + len(worlds))


class Labels(NamedTuple):
    """Which prompts are positive, and which take part in fitting."""

    positive: Bool[Tensor, " prompt"]
    member: Bool[Tensor, " prompt"]


@one_thread()
def one_factor_worlds(
    acts: Activations,
    levels: tuple[int, int],
    places: Places,
    paired: Bool[Tensor, " prompt"],
    folds: Sequence[Fold],
    latent: Float[Tensor, " prompt"],
    seed: int,
    n: int = WORLDS,
) -> OneFactor:
    """The observed numbers at fixed levels, of harm and of refusal, beside those of `n` one-variable worlds.

    `latent` estimates the one variable: the mean of both scaled scores. `paired` are the prompts that fit harm.
    """
    last = acts.positions[-1]
    values = tuple(acts.at(level, name).double() for level, name in zip(levels, ("inst", last), strict=True))
    harmful = torch.tensor([name.endswith("_harmful") for name in places.quadrants])
    placed = torch.tensor([name in QUADRANTS for name in places.quadrants])
    refused = torch.tensor([name.startswith("refused_") for name in places.quadrants])
    fold = torch.zeros(len(placed), dtype=torch.long)
    for number, one in enumerate(folds):
        fold[list(one.scored)] = number
    reader = _Reader(fold, len(folds), Labels(harmful, paired & placed), placed, places)
    worlds = _drawn(values, places, placed, latent, refused, seed, n)
    parts = [reader.read(worlds.some(slice(start, start + AT_ONCE))) for start in range(0, n, AT_ONCE)]
    return OneFactor(
        observed={name: float(value[0]) for name, value in reader.read(_as_it_is(values, refused)).items()},
        drawn={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
    )


class _Residual(NamedTuple):
    """The residual stream at one place in every world, but for a vector that all prompts share."""

    own: Float[Tensor, "prompt d_model"]
    """What prompts have beside the factor; a world hands it out in an order of its own."""
    axis: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class _Worlds:
    """Worlds with a single factor: a prompt has `latent` times the axis, and the `order`-th prompt's own residual."""

    places: tuple[_Residual, ...]
    latent: Float[Tensor, " prompt"]
    order: Int[Tensor, "world prompt"]
    refused: Bool[Tensor, "world prompt"]

    def some(self, worlds: slice) -> "_Worlds":
        """Some of the worlds."""
        return _Worlds(self.places, self.latent, self.order[worlds], self.refused[worlds])


def _as_it_is(values: Sequence[Float[Tensor, "prompt d_model"]], refused: Bool[Tensor, " prompt"]) -> _Worlds:
    """The data as a world of their own, without a factor."""
    places = tuple(_Residual(value - value.mean(dim=0), torch.zeros(value.shape[1]).double()) for value in values)
    return _Worlds(places, torch.zeros(len(refused)).double(), torch.arange(len(refused))[None], refused[None])


def _drawn(
    values: Sequence[Float[Tensor, "prompt d_model"]],
    places: Places,
    placed: Bool[Tensor, " prompt"],
    latent: Float[Tensor, " prompt"],
    refused: Bool[Tensor, " prompt"],
    seed: int,
    n: int,
) -> _Worlds:
    """Worlds with the data's axes and residuals, shuffled, and refusals drawn from the latent number alone."""
    model = LogisticRegression().fit(latent[placed, None].numpy(), refused[placed].numpy())
    chance = model.predict_proba(latent[:, None].numpy())[:, 1]
    up, down = places.inside(REFUSED_HARMFUL), places.inside(ACCEPTED_HARMLESS)
    residuals = []
    for value in values:
        left = value - value.mean(dim=0)
        for name in QUADRANTS:
            left[places.inside(name)] = value[places.inside(name)] - value[places.inside(name)].mean(dim=0)
        residuals.append(_Residual(left, (value[up].mean(dim=0) - value[down].mean(dim=0)) / 2))
    rng = np.random.default_rng(seed)
    draws = [(rng.permutation(len(latent)), rng.random(len(latent)) < chance) for _ in range(n)]
    order, refusals = (torch.from_numpy(np.stack(part)) for part in zip(*draws, strict=True))
    return _Worlds(tuple(residuals), latent, order, refusals)


@dataclass(frozen=True)
class _Reader:
    """Reads the numbers of many worlds at once: directions out of fold, at fixed places."""

    fold: Int[Tensor, " prompt"]
    """The fold that holds each prompt out."""
    n_folds: int
    harm: Labels
    placed: Bool[Tensor, " prompt"]
    places: Places

    def read(self, worlds: _Worlds) -> dict[str, Float[Tensor, " world"]]:
        refused = worlds.refused
        harm = Labels(*(flags.expand(refused.shape) for flags in self.harm))
        refusal = Labels(refused, self.placed.expand(refused.shape))
        fits = [(_Fits.of(worlds, i, self._shares(harm)), _Fits.of(worlds, i, self._shares(refusal))) for i in (0, 1)]
        first, second = (without_topics(self._scored(fits[i][i]), self.places) for i in (0, 1))
        found = {"D": self._contrast(first, second, refused)}
        accepted, among_harmful = self.placed & ~refused, (self.placed & self.harm.positive).expand(refused.shape)
        for position, (to_harm, to_refusal) in zip(("inst", "last"), fits, strict=True):
            for name, read, erased, positive, inside in (
                ("erase_refusal", to_harm, to_refusal, harm.positive, accepted),
                ("erase_harm", to_refusal, to_harm, refused, among_harmful),
            ):
                left = self._scored(read.without(erased))
                up, down = (inside & positive).double(), (inside & ~positive).double()
                found[f"{name}.{position}"] = weighted_auroc(left, up, down)
        return found

    def _shares(self, labels: Labels) -> tuple[Float[Tensor, "world fold prompt"], Float[Tensor, "world fold prompt"]]:
        """Each fold's class means as weights of its fitted prompts."""
        fitted = self.fold != torch.arange(self.n_folds)[:, None]
        sides = (labels.member & labels.positive, labels.member & ~labels.positive)
        up, down = ((side[:, None] & fitted).double() for side in sides)
        return up / up.sum(dim=2, keepdim=True), down / down.sum(dim=2, keepdim=True)

    def _scored(self, fits: "_Fits") -> Float[Tensor, "world prompt"]:
        """Each prompt's score by the fold that holds it out."""
        scores = fits.scores()
        own: Tensor = scores.gather(1, self.fold.expand(len(scores), 1, -1))
        return own[:, 0]

    def _contrast(
        self, harm: Float[Tensor, "world prompt"], refusal: Float[Tensor, "world prompt"], refused: Tensor
    ) -> Float[Tensor, " world"]:
        """D of every world, whose quadrants follow from who is refused there; NaN where one is empty."""
        side = self.harm.positive

        def gap(scores: Float[Tensor, "world prompt"]) -> Float[Tensor, " world"]:
            refused_harmful, accepted_harmful, refused_harmless, accepted_harmless = (
                (scores * (inside := self.placed & own)).sum(dim=1) / inside.sum(dim=1)
                for own in (refused & side, ~refused & side, refused & ~side, ~refused & ~side)
            )
            return (accepted_harmful - refused_harmless) / ((refused_harmful - accepted_harmless) / 2)

        return gap(harm) - gap(refusal)


class _Fits(NamedTuple):
    """Mean differences at one place, one for each world and fold, and where prompts lie along them."""

    directions: Float[Tensor, "world fold d_model"]
    raw: Float[Tensor, "world fold prompt"]
    halves: Float[Tensor, "world fold prompt"]
    """Weights whose sum is the middle of the two class means."""

    @classmethod
    def of(cls, worlds: _Worlds, place: int, shares: tuple[Float[Tensor, "world fold prompt"], ...]) -> "_Fits":
        own, axis = worlds.places[place]
        weights, halves = shares[0] - shares[1], (shares[0] + shares[1]) / 2
        order = worlds.order[:, None].expand(weights.shape)
        # By prompt of the data, not of the world: the worlds' residuals themselves are never made.
        directions = torch.zeros_like(weights).scatter_(2, order, weights) @ own
        directions = directions + (weights @ worlds.latent)[:, :, None] * axis
        raw = (directions @ own.T).gather(2, order) + (directions @ axis)[:, :, None] * worlds.latent
        return cls(directions, raw, halves)

    def without(self, others: "_Fits") -> "_Fits":
        """The same directions with those of others projected out; a score along them is a sum of both's."""
        lengths = others.directions.norm(dim=2, keepdim=True).clamp_min(1e-12)
        share = (self.directions * others.directions).sum(dim=2, keepdim=True) / lengths.square()
        return _Fits(self.directions - share * others.directions, self.raw - share * others.raw, self.halves)

    def scores(self) -> Float[Tensor, "world fold prompt"]:
        """Distance from the middle along the unit direction."""
        middles = (self.raw * self.halves).sum(dim=2, keepdim=True)
        lengths: Tensor = self.directions.norm(dim=2, keepdim=True)
        return (self.raw - middles) / lengths
