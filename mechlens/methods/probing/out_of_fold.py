"""Every prompt scored once by directions that never saw its family, the level chosen inside each fold.

A single split of few prompts says more about the split than about the model, so all prompts are scored: each by a
mean difference fitted to the other folds, at the level that does best where each of those is held out in turn.
Several fold seeds show how much is due to the folds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.nulls import TIE_RESOLUTION, LabelledVectors, PermutationNull
from mechlens.methods.probing.auroc import snap, weighted_auroc
from mechlens.methods.statistics.resample import Fold, one_thread, permuted_labels

FOLDS = 5
FOLD_SEEDS = 5


@dataclass(frozen=True)
class OutOfFoldScores:
    """How far along the contrast every prompt lies by directions that never saw its family (float64)."""

    by_level: Float[Tensor, "level position prompt"]
    """At each level, averaged over the fold seeds."""
    nested: Float[Tensor, "seed position prompt"]
    """At the level chosen within each fold, for each fold seed."""
    chosen: tuple[tuple[int, ...], ...]
    """Levels chosen, by position, then one for each seed and fold."""
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    last: str

    def at(self, position: str) -> Float[Tensor, " prompt"]:
        """Nested scores at one named position, averaged over the fold seeds."""
        return self.nested[:, self._column(position)].mean(dim=0)

    def by_seed(self, position: str) -> Float[Tensor, "seed prompt"]:
        """Nested scores at one named position by each fold seed."""
        return self.nested[:, self._column(position)]

    def level(self, position: str) -> int:
        """The level that most folds chose at a position; of equals the lowest."""
        chosen = self.chosen[self._column(position)]
        return max(sorted(set(chosen)), key=chosen.count)

    def _column(self, position: str) -> int:
        return column_of(position, self.positions, self.last)


@one_thread()
def out_of_fold_scores(
    acts: Activations,
    positive: Bool[Tensor, " prompt"],
    member: Bool[Tensor, " prompt"],
    folds: Sequence[Sequence[Fold]],
) -> OutOfFoldScores:
    """Scores of all prompts; directions are mean differences of the members, and only members choose levels.

    `folds` holds the folds of each fold seed, all over the rows of `acts`. A score is the distance from the midpoint of
    the fitted class means along the unit direction. Level 0, the embedding, is scored and never chosen where there
    is another. UserError where a fold's fitted part lacks a class.
    """
    acts.require_vectors()
    plan = _FitPlan.of(folds, positive, member)
    by_level = torch.empty(len(acts.levels), len(acts.positions), len(acts.ids), dtype=torch.float64)
    nested = torch.empty(len(folds), len(acts.positions), len(acts.ids), dtype=torch.float64)
    chosen = []
    for column in range(len(acts.positions)):
        scores = torch.stack([plan.scores(acts.values[:, row, column].double()) for row in range(len(acts.levels))])
        held_out = plan.held_out(scores)  # level seed prompt
        best = _best_levels(plan.inner_quality(scores), acts.levels)  # seed fold
        by_level[:, column] = held_out.mean(dim=1)
        nested[:, column] = held_out.gather(0, best.gather(1, plan.fold)[None])[0]
        chosen.append(tuple(acts.levels[row] for row in best.flatten().tolist()))
    return OutOfFoldScores(by_level, nested, tuple(chosen), acts.levels, acts.positions, acts.last)


def scores_along(
    directions: Float[Tensor, "fit d_model"],
    middles: Float[Tensor, "fit d_model"],
    values: Float[Tensor, "prompt d_model"],
    largest: float,
) -> Float[Tensor, "fit prompt"]:
    """Each fit's score of every prompt: how far from the middle along the unit direction it lies.

    `largest` is the length of the longest vector there: equal vectors tie exactly, and a difference of rounding errors
    is none.
    """
    norms = directions.norm(dim=1, keepdim=True)
    raw = directions @ values.T - (directions * middles).sum(dim=1, keepdim=True)
    tied = snap(raw, TIE_RESOLUTION * largest**2)
    return torch.where(norms > 1e-6 * largest, tied / norms, 0.0)


@one_thread()
def out_of_fold_null(
    vectors: LabelledVectors, folds: Sequence[Fold], observed: float, n: int, seed: int
) -> PermutationNull:
    """AUROCs of `n` permuted labels, each fitted and scored out of fold at one place as the real ones are.

    `folds` count the rows of `vectors`. Families stay whole (`permuted_labels`); p needs n >= 200 to mean much.
    """
    permuted = permuted_labels(vectors.positive, vectors.families, n, seed)
    if not bool((permuted != vectors.positive).any()) or math.isnan(observed):
        return PermutationNull(mean=math.nan, quantile_95=math.nan, p=math.nan, n=n)
    values, labels = vectors.values.double(), permuted.double()
    largest = float(values.norm(dim=1).max())
    rows = [list(fold.scored) for fold in folds]
    # A class's mean over the other folds is its sum over all of them less that over the one.
    up = torch.stack([labels[:, own] @ values[own] for own in rows])  # fold permutation d_model
    down = torch.stack([values[own].sum(dim=0) for own in rows])[:, None] - up
    n_up = torch.stack([labels[:, own].sum(dim=1) for own in rows])[:, :, None]
    n_down = torch.tensor([len(own) for own in rows])[:, None, None] - n_up
    up, down = (
        (sums.sum(dim=0) - sums) / (counts.sum(dim=0) - counts) for sums, counts in ((up, n_up), (down, n_down))
    )
    scores = torch.empty(permuted.shape, dtype=torch.float64)
    for own, high, low in zip(rows, up, down, strict=True):
        scores[:, own] = scores_along(high - low, (high + low) / 2, values[own], largest)
    areas = weighted_auroc(scores, labels, 1 - labels)
    areas = areas[~areas.isnan()]  # a permutation may leave a fold without a class
    as_good = int((areas >= observed - 1e-9).sum())
    return PermutationNull(float(areas.mean()), float(areas.quantile(0.95)), (1 + as_good) / (1 + len(areas)), n)


@dataclass(frozen=True)
class _FitPlan:
    """Every fit, to all folds but one (which it scores) or but two (whose levels are compared without the one).

    A seed's folds share all their prompts, so each class is summed once a fold, and a fit's class mean is what is left
    of the sum over all folds.
    """

    up: Float[Tensor, "seed_fold prompt"]
    """1 where a prompt of the first class is in the fold."""
    down: Float[Tensor, "seed_fold prompt"]
    pairs: Int[Tensor, "fit 2"]
    """The two folds that a fit leaves out, the same one twice where it leaves out one."""
    fit: Int[Tensor, "seed fold prompt"]
    """Which fit, of all seeds' ones, scores a prompt when the fold is left out as well as the prompt's own."""
    fold: Int[Tensor, "seed prompt"]
    """Each prompt's own fold."""
    positive: Bool[Tensor, " prompt"]
    member: Bool[Tensor, " prompt"]

    @classmethod
    def of(
        cls,
        folds: Sequence[Sequence[Fold]],
        positive: Bool[Tensor, " prompt"],
        member: Bool[Tensor, " prompt"],
    ) -> "_FitPlan":
        n_folds, n = len(folds[0]), len(positive)
        own_fold = torch.full((len(folds), n), -1)
        for seed, own in enumerate(folds):
            for k, one in enumerate(own):
                own_fold[seed, list(one.scored)] = k
        inside = torch.nn.functional.one_hot(own_fold, n_folds).bool().transpose(1, 2).flatten(0, 1)
        pairs = torch.combinations(torch.arange(n_folds), with_replacement=True)
        number = torch.empty(n_folds, n_folds, dtype=torch.long)
        number[pairs[:, 0], pairs[:, 1]] = number[pairs[:, 1], pairs[:, 0]] = torch.arange(len(pairs))
        fit = number[own_fold].transpose(1, 2) + len(pairs) * torch.arange(len(folds))[:, None, None]
        up, down = (inside & member & side for side in (positive, ~positive))
        plan = cls(up.double(), down.double(), pairs, fit, own_fold, positive, member)
        if not all(bool((plan._left(side.sum(dim=1, keepdim=True)) > 0).all()) for side in (plan.up, plan.down)):
            raise UserError(
                "a fold has no prompt of one class to fit a direction on; add prompt families of that class"
            )
        return plan

    def _left(self, sums: Float[Tensor, "seed_fold x"]) -> Float[Tensor, "seed_fit x"]:
        """Of each fit: the sum over the folds that it doesn't leave out."""
        by_seed = sums.reshape(*self.fit.shape[:2], -1)
        first, second = by_seed[:, self.pairs[:, 0]], by_seed[:, self.pairs[:, 1]]
        twice = (self.pairs[:, 0] == self.pairs[:, 1])[:, None]
        return (by_seed.sum(dim=1, keepdim=True) - first - torch.where(twice, 0.0, second)).flatten(0, 1)

    def scores(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "seed fold prompt"]:
        """Each prompt's score by the fit without its own fold and the given one; see `held_out`, `inner_quality`."""
        high, low = (
            self._left(side @ values) / self._left(side.sum(dim=1, keepdim=True)) for side in (self.up, self.down)
        )
        every = scores_along(high - low, (high + low) / 2, values, float(values.norm(dim=1).max()))
        return every.gather(0, self.fit.flatten(0, 1)).reshape(self.fit.shape)

    def held_out(self, scores: Float[Tensor, "level seed fold prompt"]) -> Float[Tensor, "level seed prompt"]:
        """Each prompt's score by the fold that holds it out, for each seed."""
        own = self.fold[None, :, None].expand(len(scores), -1, -1, -1)
        return scores.gather(2, own)[:, :, 0]

    def inner_quality(self, scores: Float[Tensor, "level seed fold prompt"]) -> Float[Tensor, "level seed fold"]:
        """AUROC among each fold's fitted prompts, each scored without its own fold; the separation breaks ties."""
        others = self.fold[:, None] != torch.arange(scores.shape[2])[:, None]  # seed fold prompt
        up, down = ((others & self.member & side).flatten(0, 1) for side in (self.positive, ~self.positive))
        quality = [_quality(level.flatten(0, 1), up, down) for level in scores]
        return torch.stack(quality).reshape(scores.shape[:3])


def _quality(
    scores: Float[Tensor, "row prompt"], positive: Bool[Tensor, "row prompt"], negative: Bool[Tensor, "row prompt"]
) -> Float[Tensor, " row"]:
    up, down = positive.double(), negative.double()
    (high, wide), (low, broad) = (_mean_and_variance(scores, side) for side in (up, down))
    apart = (high - low) / (wide + broad).sqrt().clamp_min(1e-12)
    return weighted_auroc(scores, up, down) + 1e-9 * apart.clamp(-1e3, 1e3)


def _mean_and_variance(
    scores: Float[Tensor, "row prompt"], weights: Float[Tensor, "row prompt"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    total = weights.sum(dim=1)
    mean = (weights * scores).sum(dim=1) / total
    return mean, (weights * (scores - mean[:, None]).square()).sum(dim=1) / total


def _best_levels(quality: Float[Tensor, "level seed fold"], levels: Sequence[int]) -> Int[Tensor, "seed fold"]:
    kept = torch.tensor([level != 0 or len(levels) == 1 for level in levels])
    # NumPy promises the first of equals, torch doesn't.
    return torch.from_numpy(np.argmax(torch.where(kept[:, None, None], quality, -torch.inf).numpy(), axis=0))
