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
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.nulls import TIE_RESOLUTION, LabelledVectors, PermutationNull
from mechlens.methods.probing.auroc import auroc, snap, weighted_auroc
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
    n_seeds, n_folds = len(folds), len(folds[0])
    by_level = torch.empty(len(acts.levels), len(acts.positions), len(acts.ids), dtype=torch.float64)
    nested = torch.empty(n_seeds, len(acts.positions), len(acts.ids), dtype=torch.float64)
    chosen = []
    for column in range(len(acts.positions)):
        outer, quality = [], []
        for row in range(len(acts.levels)):
            scores = plan.scores(acts.values[:, row, column].double())
            outer.append(plan.pooled(scores))
            quality.append(plan.inner_quality(scores))
        stacked = torch.stack(outer)  # level seed prompt
        best = _best_levels(torch.stack(quality), acts.levels)  # seed * fold
        by_level[:, column] = stacked.mean(dim=1)
        for seed in range(n_seeds):
            for number, fold in enumerate(folds[seed]):
                rows = list(fold.scored)
                nested[seed, column, rows] = stacked[best[seed * n_folds + number], seed, rows]
        chosen.append(tuple(acts.levels[row] for row in best))
    return OutOfFoldScores(by_level, nested, tuple(chosen), acts.levels, acts.positions, acts.last)


def mean_difference_scores(
    values: Float[Tensor, "prompt d_model"], up: Float[Tensor, "fit prompt"], down: Float[Tensor, "fit prompt"]
) -> Float[Tensor, "fit prompt"]:
    """Each fit's score of every prompt; a row of `up` and of `down` holds a prompt's weight in either class mean."""
    directions, middles = (up - down) @ values, (up + down) @ values / 2
    norms = directions.norm(dim=1, keepdim=True)
    raw = directions @ values.T - (directions * middles).sum(dim=1, keepdim=True)
    largest = float(values.norm(dim=1).max())
    # Equal vectors tie exactly, and a difference of rounding errors is none.
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
    scores = torch.empty(permuted.shape, dtype=torch.float64)
    values = vectors.values.double()
    for fold in folds:
        fitted, rows = _mask(fold.fitted, len(values)), list(fold.scored)
        up, down = _shares(permuted & fitted), _shares(~permuted & fitted)
        scores[:, rows] = mean_difference_scores(values, up, down)[:, rows]
    areas = weighted_auroc(scores, permuted.double(), (~permuted).double())
    areas = areas[~areas.isnan()]  # a permutation may leave a fold without a class
    as_good = int((areas >= observed - 1e-9).sum())
    return PermutationNull(float(areas.mean()), float(areas.quantile(0.95)), (1 + as_good) / (1 + len(areas)), n)


@dataclass(frozen=True)
class _FitPlan:
    """The class weights of every fit: one for each seed and fold, and inner ones for each of these."""

    up: Float[Tensor, "fit prompt"]
    down: Float[Tensor, "fit prompt"]
    scored: Bool[Tensor, "seed fold prompt"]
    inner_scored: Bool[Tensor, "outer inner prompt"]
    positive: Bool[Tensor, " prompt"]
    member: Bool[Tensor, " prompt"]

    @classmethod
    def of(
        cls,
        folds: Sequence[Sequence[Fold]],
        positive: Bool[Tensor, " prompt"],
        member: Bool[Tensor, " prompt"],
    ) -> "_FitPlan":
        n = len(positive)
        fitted = [_mask(fold.fitted, n) for own in folds for fold in own]
        # A fold's fitted part is the other folds: these are its inner ones.
        inner_scored = [[_mask(other.scored, n) for other in own if other is not fold] for own in folds for fold in own]
        outer = torch.stack(fitted)
        held = torch.stack([torch.stack(part) for part in inner_scored])
        rows = torch.cat([outer, (outer[:, None] & ~held).flatten(0, 1)])
        up, down = rows & member & positive, rows & member & ~positive
        if not bool(up.any(dim=1).all() and down.any(dim=1).all()):
            raise UserError(
                "a fold has no prompt of one class to fit a direction on; add prompt families of that class"
            )
        by_seed = (~outer).reshape(len(folds), len(folds[0]), n)
        return cls(_shares(up), _shares(down), by_seed, held, positive, member)

    @property
    def n_outer(self) -> int:
        return len(self.inner_scored)

    def scores(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "fit prompt"]:
        return mean_difference_scores(values, self.up, self.down)

    def pooled(self, scores: Float[Tensor, "fit prompt"]) -> Float[Tensor, "seed prompt"]:
        """Each prompt's score by the fold that holds it out, for each seed."""
        outer = scores[: self.n_outer].reshape(self.scored.shape)
        return torch.where(self.scored, outer, 0.0).sum(dim=1)

    def inner_quality(self, scores: Float[Tensor, "fit prompt"]) -> Float[Tensor, " outer"]:
        """Inner AUROC of each outer fold's fitted part; the standardised separation breaks ties."""
        inner = scores[self.n_outer :].reshape(self.inner_scored.shape)
        pooled = torch.where(self.inner_scored, inner, 0.0).sum(dim=1)
        inside = self.inner_scored.any(dim=1) & self.member
        return torch.stack([_quality(row[kept], self.positive[kept]) for row, kept in zip(pooled, inside, strict=True)])


def _quality(scores: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"]) -> Float[Tensor, ""]:
    spread = (scores[positive].var(correction=0) + scores[~positive].var(correction=0)).sqrt()
    apart = (scores[positive].mean() - scores[~positive].mean()) / spread.clamp_min(1e-12)
    return auroc(scores, positive) + 1e-9 * apart.clamp(-1e3, 1e3)


def _best_levels(quality: Float[Tensor, "level outer"], levels: Sequence[int]) -> list[int]:
    kept = torch.tensor([level != 0 or len(levels) == 1 for level in levels])
    # NumPy promises the first of equals, torch doesn't.
    best: list[int] = np.argmax(torch.where(kept[:, None], quality, -torch.inf).numpy(), axis=0).tolist()
    return best


def _mask(rows: Sequence[int], n: int) -> Bool[Tensor, " prompt"]:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def _shares(mask: Bool[Tensor, "fit prompt"]) -> Float[Tensor, "fit prompt"]:
    return mask.double() / mask.double().sum(dim=1, keepdim=True)
