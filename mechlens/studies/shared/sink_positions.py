"""Named positions twice over: the attention that the answer pays them, beside what can be read there."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.beyond_words import levels_of
from mechlens.methods.probing.within_folds import Folds, folds_of, mean_auroc
from mechlens.methods.sinks.positions import PositionMass
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import fewest_families, one_thread
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS

CONCEPTS = {"harmful": ("harmful", "harmless"), "refused": ("refused", "accepted")}


@dataclass(frozen=True)
class Asked:
    """A concept's prompts, and which of them have it."""

    name: str
    rows: list[int]
    positive: Bool[Tensor, " prompt"]
    """Of the rows."""
    families: tuple[str, ...]

    @property
    def measurable(self) -> bool:
        """Whether both classes have enough prompts, and families to be held out."""
        counts = (int(self.positive.sum()), int((~self.positive).sum()))
        return min(counts) >= MIN_IN_A_CLASS and fewest_families(self.positive, self.families) >= 2

    def folds(self, seed: int) -> Folds:
        """Of the rows, by whole families."""
        return folds_of(self.positive, self.families, seed)


def asked_about(name: str, labels: Sequence[str | None], contrast: tuple[str, str], families: Sequence[str]) -> Asked:
    """The prompts of both classes of a contrast."""
    rows = [i for i, label in enumerate(labels) if label in contrast]
    positive = torch.tensor([labels[i] == contrast[0] for i in rows], dtype=torch.bool)
    return Asked(name, rows, positive, tuple(families[i] for i in rows))


def asked_of(labels: Sequence[str | None], verdicts: Sequence[str], families: Sequence[str]) -> tuple[Asked, ...]:
    """Harmful against harmless requests, and refused against accepted ones."""
    both = zip(CONCEPTS.items(), (labels, verdicts), strict=True)
    return tuple(asked_about(name, own, contrast, families) for (name, contrast), own in both)


def first_of_each(labels: Sequence[str | None], n: int) -> list[int]:
    """The first `n` harmful prompts, and the first `n` others."""
    harmful = [i for i, label in enumerate(labels) if label == "harmful"][:n]
    return harmful + [i for i, label in enumerate(labels) if label != "harmful"][:n]


def along(
    fitted: Float[Tensor, "prompt level d"],
    values: Float[Tensor, "prompt level d"],
    folds: Folds,
    levels: Sequence[Sequence[int]],
) -> Float[Tensor, "repeat prompt"]:
    """Scores of `values` out of fold, along the mean differences of `fitted` and from the middle of its classes."""

    def read(fit: list[int], level: int) -> Tensor:
        own, wide = folds.positive[fit], fitted[fit, level].double()
        line = wide[own].mean(dim=0) - wide[~own].mean(dim=0)
        return values[:, level].double() @ line - folds.middle(fitted[:, level].double() @ line, fit)

    return folds.scored(read, levels)


@one_thread()
def position_table(
    mass: PositionMass, acts: Activations, asked: Sequence[Asked], *, seed: int, resamples: int
) -> pd.DataFrame:
    """A row a place: the attention of the answer, and the AUROC of every concept where activations were read.

    Every prompt is scored by a mean difference fitted to other families, at a level chosen on those.
    """
    table = mass.table(seed, resamples)
    for one in asked:
        folds = one.folds(seed) if one.measurable else None
        found = [_auroc(one, acts, position, folds) for position in table["position"]]
        table = pd.concat([table, pd.DataFrame([own.beside(f"auroc_{one.name}") for own in found])], axis=1)
    return table


def _auroc(one: Asked, acts: Activations, position: str, folds: Folds | None) -> Estimate:
    if position not in acts.positions or folds is None:
        return Estimate.missing(len(one.rows))
    values = acts.values[one.rows, :, acts.positions.index(position)]
    return mean_auroc(along(values, values, folds, levels_of(values, folds)), folds)
