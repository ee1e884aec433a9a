"""Contrasts of the separation study: what is told apart from what, held out, or why it can't be measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.direction import Direction, direction_grid, project
from mechlens.methods.probing.ahead import ahead_of_surface, surface_scores
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.baselines import (
    Contrast,
    length_auroc,
    mean_embedding_auroc,
    tfidf_auroc,
    token_identity_auroc,
)
from mechlens.methods.probing.confounds import Confound
from mechlens.methods.probing.detect import Detection, detect
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, token_embeddings
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import PARTS, Split, split_by_family
from mechlens.settings import Nulls

MIN_IN_A_CLASS = 10
"""A contrast with fewer prompts than this in one class has no direction and is called not measurable."""
MIN_IN_A_PART = 3
"""So is one with fewer than this in a part of the split."""


def best_direction(
    acts: Activations, positive: str, negative: str, position: str, seed: int, *, highest: int | None = None
) -> Direction | None:
    """Fitted to all prompts; the level from 1 to `highest` is chosen on three tenths of the families, by directions
    from the others. None where a class has too few prompts, or families, for that.
    """
    if min(acts.labels.count(label) for label in (positive, negative)) < MIN_IN_A_CLASS:
        return None
    kept = acts.select([i for i, label in enumerate(acts.labels) if label in (positive, negative)])
    try:
        split = split_by_family(kept.labels, kept.families, fractions=(0.7, 0.3, 0.0), seed=seed)
    except UserError:  # a class is of one family
        return None
    name = kept.positions[column_of(position, kept.positions, kept.last)]
    only = replace(kept, values=kept.values[:, :, kept.positions.index(name)][:, :, None], positions=(name,))
    grid = direction_grid(only.select(split.train), positive, negative)
    choose = only.select(split.validation)
    chosen = torch.tensor([label == positive for label in choose.labels])
    by_level = {
        level: float(auroc(project(choose.at(level, name).double(), grid.at(level, name)), chosen))
        for level in acts.levels
        if level > 0 and (highest is None or level <= highest)
    }
    best = max(by_level, key=lambda level: (by_level[level], -level))
    return direction_grid(only, positive, negative).at(best, name)


@dataclass(frozen=True)
class Surface:
    """What the prompts look like without a model: their words and the embeddings of their tokens."""

    texts: tuple[str, ...]
    mean_embeddings: Float[Tensor, "prompt d_model"]
    """Mean of the token embeddings over each instruction."""
    n_tokens: Int[Tensor, " prompt"]


@dataclass(frozen=True, repr=False)
class ContrastMeasurement:
    """One contrast: its detection at every cell with baselines, or the counts that were too small for it."""

    name: str
    positive: str
    negative: str
    counts: dict[str, int]
    detection: Detection | None
    baselines: dict[str, Estimate]
    """Surface baselines on the same split, by name."""

    def __repr__(self) -> str:
        sizes = " and ".join(f"{n} {label}" for label, n in self.counts.items())
        found = self.detection.in_words if self.detection else {"not measurable": f"{sizes} prompts are too few"}
        return lines(f"{self.name}: {self.positive} against {self.negative}", {**found, **self.baselines})

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.chosen())

    def auroc(self, position: str) -> Estimate:
        """Test AUROC at the level chosen on validation, missing where the contrast can't be measured."""
        if self.detection is None:
            return Estimate.missing(min(self.counts.values()))
        return self.detection.at(position).auroc

    def chosen(self) -> pd.DataFrame:
        """One row per position: the chosen level, AUROC and effect size with interval, both nulls."""
        choices = self.detection.chosen if self.detection else ()
        return pd.DataFrame(
            [
                {
                    "contrast": self.name,
                    "position": choice.position,
                    "level": choice.level,
                    **choice.auroc.row("auroc"),
                    **choice.effect.beside("effect_size"),
                    "permuted_mean": choice.permutation.mean,
                    "permutation_p": choice.permutation.p,
                    "random_mean": choice.random.mean,
                    "random_maximum": choice.random.maximum,
                }
                for choice in choices
            ]
        )

    def table(self) -> pd.DataFrame:
        """One row per level and position, and one per baseline."""
        frames = [] if self.detection is None else [self.detection.table()]
        return pd.concat(frames).assign(contrast=self.name) if frames else pd.DataFrame()


def measure(
    name: str,
    acts: Activations,
    labels: Sequence[str],
    contrast: tuple[str, str],
    split: Split,
    surface: Surface,
    plan: Nulls,
    confounds: Sequence[Confound] = (),
) -> ContrastMeasurement:
    """Detection of the first class against the second, with surface baselines on the same split and out of fold.

    `confounds` are of the prompts of the two classes. `labels` may name more classes than two; the others are
    left out. Nothing is raised where a class is small: the result says how many prompts there were.
    """
    counts = {label: sum(given == label for given in labels) for label in contrast}
    if not _enough(labels, contrast, split):
        return ContrastMeasurement(name, *contrast, counts, None, {})
    relabelled = replace(acts, labels=tuple(labels))
    found = detect(relabelled, *contrast, split, plan.detection)
    strongest = [choice.position for choice in found.by_strength]
    rows = [i for i, label in enumerate(labels) if label in contrast]
    told = surface_scores(
        [labels[i] == contrast[0] for i in rows], [acts.families[i] for i in rows], [surface.texts[i] for i in rows],
        surface.mean_embeddings[rows], surface.n_tokens[rows], confounds, plan.seed,
    )  # fmt: skip
    ahead = ahead_of_surface(relabelled.select(rows), contrast, strongest, told, plan.detection.method)
    return ContrastMeasurement(
        name,
        *contrast,
        counts,
        replace(found, ahead=ahead),
        _baselines(relabelled, contrast, split, surface, plan),
    )


def _enough(labels: Sequence[str], contrast: tuple[str, str], split: Split) -> bool:
    if min(sum(given == label for given in labels) for label in contrast) < MIN_IN_A_CLASS:
        return False
    return all(
        sum(labels[i] == label for i in split.part(name)) >= MIN_IN_A_PART for name in PARTS for label in contrast
    )


def _baselines(
    acts: Activations, contrast: tuple[str, str], split: Split, surface: Surface, plan: Nulls
) -> dict[str, Estimate]:
    inside = {i for i, label in enumerate(acts.labels) if label in contrast}
    train, validation, test = (tuple(i for i in split.part(name) if i in inside) for name in PARTS)
    kept = replace(split, train=train, validation=validation, test=test)
    positive = torch.tensor([label == contrast[0] for label in acts.labels])
    question = Contrast(positive, acts.families, kept)
    baselines = {
        "tfidf_auroc": tfidf_auroc(surface.texts, question),
        "mean_embedding_auroc": mean_embedding_auroc(surface.mean_embeddings, question),
        "length_auroc": length_auroc(surface.n_tokens, question),
    }
    if 0 in acts.levels:
        for position in acts.positions:
            baselines[f"token_identity_auroc.{position}"] = token_identity_auroc(acts.at(0, position), question)
    return baselines


def surface_of(model: LanguageModel, batch: TokenBatch) -> Surface:
    """The words of each prompt and the mean embedding of its instruction's tokens."""
    spans = batch.instruction.tolist()
    means = [
        token_embeddings(model, batch.tokens[i, start : end + 1]).mean(dim=0) for i, (start, end) in enumerate(spans)
    ]
    lengths = batch.instruction[:, 1] - batch.instruction[:, 0] + 1
    return Surface(tuple(prompt.text for prompt in batch.prompts), torch.stack(means), lengths)
