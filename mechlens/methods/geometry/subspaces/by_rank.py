"""Is a concept one direction or a subspace: how well it is read out of fold from k dimensions, beside random ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.directions.methods import lda_line, logistic_line
from mechlens.methods.geometry.subspaces.grassmann import fit_grassmann
from mechlens.methods.guard.rules import PENALTY
from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, one_thread

RANKS = (1, 2, 4, 8, 16, 32)
RANDOM_SUBSPACES = 20
BOOTSTRAPS = 64
"""Resampled mean differences whose leading singular vectors are the concept's subspace."""

Score = Callable[[Float[Tensor, "fitted d_model"], Bool[Tensor, " fitted"], Float[Tensor, "prompt d_model"]], Tensor]
"""Vectors to fit on, which of them are positive, vectors to score -> their scores."""


@dataclass(frozen=True)
class RankReading:
    """How well k dimensions are read, all AUROCs out of fold."""

    k: int
    subspace: Estimate
    """LDA in the subspace of the mean difference and of what it varies along when families are resampled."""
    gain: Estimate
    """The same minus that of the mean difference alone, over the same pairs of prompts."""
    grassmann: Estimate
    """A subspace of k dimensions for either class (`fit_grassmann`)."""
    random_mean: float
    """LDA in random subspaces of k dimensions."""
    random_max: float


@dataclass(frozen=True, repr=False)
class AurocByRank:
    """A concept read from one direction and from subspaces; see `auroc_by_rank`.

    >>> import torch
    >>> values = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    >>> values[:30, 0] += 3
    >>> families = [str(i) for i in range(60)]
    >>> found = ml.auroc_by_rank(values, torch.arange(60) < 30, families, ranks=(1, 2), random=3, seed=0)
    >>> found.at(2).subspace.value > 0.9 > found.at(1).random_mean, found.needs_more_than_one
    (True, False)
    """

    mean_difference: Estimate
    logistic: Estimate
    """Logistic regression on all dimensions, standardised, with a guard's penalty."""
    readings: tuple[RankReading, ...]

    def at(self, k: int) -> RankReading:
        """What k dimensions give; UserError for a k that wasn't read."""
        found = [one for one in self.readings if one.k == k]
        if not found:
            raise UserError(f"{k} dimensions weren't read; there are {[one.k for one in self.readings]}")
        return found[0]

    @property
    def needs_more_than_one(self) -> bool:
        """Whether some subspace is read clearly better than the mean difference: its gain's whole interval is above 0.

        Each interval is of one k; that several were tried isn't corrected for.
        """
        return any(one.gain.low > 0 for one in self.readings if one.k > 1)

    def __repr__(self) -> str:
        told = "".join(f"\n  k={one.k}: {one.subspace}, random {one.random_mean:.2f}" for one in self.readings)
        return f"AurocByRank\n  mean difference: {self.mean_difference}\n  logistic: {self.logistic}{told}"


@one_thread()
def auroc_by_rank(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " label"],
    families: Sequence[str],
    *,
    ranks: Sequence[int] = RANKS,
    random: int = RANDOM_SUBSPACES,
    seed: int,
) -> AurocByRank:
    """Everything fitted to the same folds of families, and every prompt scored by fits that never saw its family.

    >>> import torch
    >>> values = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    >>> values[:30, 0] += 3
    >>> families = [str(i) for i in range(60)]
    >>> found = ml.auroc_by_rank(values, torch.arange(60) < 30, families, ranks=(1, 2), random=3, seed=0)
    >>> found.at(2).subspace.value > 0.9 > found.at(1).random_mean, found.needs_more_than_one
    (True, False)
    """
    if not len(values) == len(positive) == len(families):
        raise UserError(
            f"there are {len(values)} vectors, {len(positive)} labels and {len(families)} families; give one of each a "
            "prompt"
        )
    most = min(BOOTSTRAPS, values.shape[1])
    if not ranks or min(ranks) < 1 or max(ranks) > most:
        raise UserError(f"subspaces of {list(ranks)} dimensions were asked for; ask for 1 to {most}")
    exact, folds = values.detach().cpu().double(), folds_of(positive, families, seed)

    def out_of_fold(score: Score) -> Float[Tensor, "repeat prompt"]:
        return folds.scored(lambda fit, level: score(exact[fit], positive[fit], exact))

    def logistic(fitted: Tensor, own: Tensor, scored: Tensor) -> Tensor:
        return scored @ logistic_line(fitted, own, penalty=PENALTY, balanced=True)[0]

    one = out_of_fold(lambda fitted, own, scored: (scored - fitted.mean(dim=0)) @ _difference(fitted, own))
    subspaces = _Subspaces(exact, folds, seed)
    readings = []
    for k in ranks:
        read = subspaces.scored(k)
        drawn = [float(mean_auroc(subspaces.random(k, seed + draw), folds).value) for draw in range(random)]
        grassmann = mean_auroc(out_of_fold(_grassmann(k)), folds)
        readings.append(
            RankReading(k, mean_auroc(read, folds), auroc_gain(read, one, folds), grassmann,
                        sum(drawn) / max(len(drawn), 1), max(drawn, default=float("nan")))
        )  # fmt: skip
    return AurocByRank(mean_auroc(one, folds), mean_auroc(out_of_fold(logistic), folds), tuple(readings))


def _difference(values: Tensor, positive: Tensor) -> Float[Tensor, " d_model"]:
    return values[positive].mean(dim=0) - values[~positive].mean(dim=0)


def _grassmann(k: int) -> Score:
    def score(fitted: Tensor, own: Tensor, scored: Tensor) -> Tensor:
        labels = ["positive" if flag else "negative" for flag in own.tolist()]
        most = min(labels.count("positive"), labels.count("negative"))
        return fit_grassmann(fitted, labels, k=min(k, most)).scores(scored, "positive")

    return score


def concept_subspace(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    k: int,
    seed: int,
) -> Float[Tensor, "d_model k"]:
    """The mean difference, and the leading singular vectors of what it is when families are resampled, about it."""
    labels = ["positive" if flag else "negative" for flag in positive.tolist()]
    weights = family_weights(families, BOOTSTRAPS, seed, labels)
    up, down = (weights * side for side in (positive, ~positive))
    drawn = up @ values / up.sum(dim=1, keepdim=True) - down @ values / down.sum(dim=1, keepdim=True)
    first = torch.nn.functional.normalize(_difference(values, positive), dim=0)
    rest = drawn - (drawn @ first)[:, None] * first
    axes = torch.linalg.svd(rest, full_matrices=False).Vh[: k - 1]
    basis: Tensor = torch.linalg.qr(torch.cat([first[None], axes]).T).Q
    return basis


@dataclass(frozen=True)
class _Subspaces:
    """The concept's subspaces of every fold, and random ones."""

    values: Float[Tensor, "prompt d_model"]
    folds: Folds
    seed: int

    def scored(self, k: int) -> Float[Tensor, "repeat prompt"]:
        families = self.folds.families
        return self._read(
            lambda fit: concept_subspace(
                self.values[fit], self.folds.positive[fit], [families[i] for i in fit], k, self.seed
            )
        )

    def random(self, k: int, seed: int) -> Float[Tensor, "repeat prompt"]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.values.shape[1], k, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        return self._read(lambda fit: basis)

    def _read(self, basis_of: Callable[[list[int]], Tensor]) -> Float[Tensor, "repeat prompt"]:
        def read(fit: list[int], level: int) -> Tensor:
            inside = self.values @ basis_of(fit)
            own = self.folds.positive[fit]
            return (inside - inside[fit].mean(dim=0)) @ lda_line(inside[fit], own, _difference(inside[fit], own))

        return self.folds.scored(read)
