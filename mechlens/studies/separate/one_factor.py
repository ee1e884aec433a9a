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
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.statistics.resample import Fold, one_thread
from mechlens.studies.separate.dissociation import (
    ACCEPTED_HARMLESS,
    REFUSED_HARMFUL,
    Places,
    contrast_of,
    without_topics,
)
from mechlens.studies.shared.quadrants import QUADRANTS

WORLDS = 200


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
    fitted = torch.zeros(len(folds), len(placed), dtype=torch.bool)
    for row, fold in zip(fitted, folds, strict=True):
        row[list(fold.fitted)] = True
    data = _Reader(fitted, Labels(harmful, paired & placed), placed, places)
    observed = data.read(values, refused)
    world = _fit(values, places, placed, latent, refused)
    del values  # a world takes as much memory
    rng = np.random.default_rng(seed)
    draws = [data.read(*world.draw(rng)) for _ in range(n)]
    return OneFactor(
        observed=observed,
        drawn={name: torch.tensor([draw[name] for draw in draws], dtype=torch.float64) for name in draws[0]},
    )


@dataclass(frozen=True)
class _World:
    """A single factor with the data's axes and residuals."""

    middles: tuple[Float[Tensor, " d_model"], ...]
    axes: tuple[Float[Tensor, " d_model"], ...]
    residuals: tuple[Float[Tensor, "prompt d_model"], ...]
    latent: Float[Tensor, " prompt"]
    refusal: Float[np.ndarray, " prompt"]
    """Chance of a refusal."""

    def draw(
        self, rng: np.random.Generator
    ) -> tuple[tuple[Float[Tensor, "prompt d_model"], ...], Bool[Tensor, " prompt"]]:
        """Residual streams at both places, and who is refused."""
        order = torch.from_numpy(rng.permutation(len(self.latent)))
        values = tuple(
            middle + self.latent[:, None] * axis + residual[order]
            for middle, axis, residual in zip(self.middles, self.axes, self.residuals, strict=True)
        )
        return values, torch.from_numpy(rng.random(len(self.refusal)) < self.refusal)


def _fit(
    values: tuple[Float[Tensor, "prompt d_model"], ...],
    places: Places,
    placed: Bool[Tensor, " prompt"],
    latent: Float[Tensor, " prompt"],
    refused: Bool[Tensor, " prompt"],
) -> _World:
    model = LogisticRegression().fit(latent[placed, None].numpy(), refused[placed].numpy())
    up, down = places.inside(REFUSED_HARMFUL), places.inside(ACCEPTED_HARMLESS)
    residuals = []
    for value in values:
        left = value - value.mean(dim=0)
        for name in QUADRANTS:
            left[places.inside(name)] = value[places.inside(name)] - value[places.inside(name)].mean(dim=0)
        residuals.append(left)
    return _World(
        middles=tuple((value[up].mean(dim=0) + value[down].mean(dim=0)) / 2 for value in values),
        axes=tuple((value[up].mean(dim=0) - value[down].mean(dim=0)) / 2 for value in values),
        residuals=tuple(residuals),
        latent=latent,
        refusal=model.predict_proba(latent[:, None].numpy())[:, 1],
    )


@dataclass(frozen=True)
class _Reader:
    """Reads the numbers of one world: directions out of fold, at fixed places."""

    fitted: Bool[Tensor, "fold prompt"]
    harm: Labels
    placed: Bool[Tensor, " prompt"]
    places: Places

    def read(
        self, values: tuple[Float[Tensor, "prompt d_model"], ...], refused: Bool[Tensor, " prompt"]
    ) -> dict[str, float]:
        names = tuple(
            f"{'refused' if r else 'accepted'}_{'harmful' if h else 'harmless'}" if inside else ""
            for r, h, inside in zip(refused.tolist(), self.harm.positive.tolist(), self.placed.tolist(), strict=True)
        )
        places = Places(names, self.places.families, self.places.topics)
        harm, refusal = self.harm, Labels(refused, self.placed)
        first = without_topics(self._scores(values[0], harm), places)
        second = without_topics(self._scores(values[1], refusal), places)
        found = {"D": contrast_of(first, second, places)}
        accepted, among_harmful = self.placed & ~refused, self.placed & harm.positive
        for position, value in zip(("inst", "last"), values, strict=True):
            for name, erased, read, inside in (
                ("erase_refusal", refusal, harm, accepted),
                ("erase_harm", harm, refusal, among_harmful),
            ):
                left = self._scores(value, read, erased)
                found[f"{name}.{position}"] = float(auroc(left[inside], read.positive[inside]))
        return found

    def _scores(
        self, values: Float[Tensor, "prompt d_model"], read: Labels, erased: Labels | None = None
    ) -> Float[Tensor, " prompt"]:
        """Out-of-fold scores along the mean difference, that of `erased` in the same fold being projected out first."""
        up, down = self._shares(read)
        directions, middles = (up - down) @ values, (up + down) @ values / 2
        if erased is not None:
            others = torch.nn.functional.normalize(torch.sub(*self._shares(erased)) @ values, dim=1)
            directions = directions - (directions * others).sum(dim=1, keepdim=True) * others
        raw = directions @ values.T - (directions * middles).sum(dim=1, keepdim=True)
        scores: Float[Tensor, " prompt"] = (raw / directions.norm(dim=1, keepdim=True) * ~self.fitted).sum(dim=0)
        return scores

    def _shares(self, labels: Labels) -> tuple[Float[Tensor, "fold prompt"], Float[Tensor, "fold prompt"]]:
        """Each fold's class means as weights of its fitted prompts."""
        up, down = ((self.fitted & labels.member & side).double() for side in (labels.positive, ~labels.positive))
        return up / up.sum(dim=1, keepdim=True), down / down.sum(dim=1, keepdim=True)
