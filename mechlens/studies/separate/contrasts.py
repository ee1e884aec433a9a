"""Contrasts of the separation study, out of fold: what is told apart from what, and how much of that the words tell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.direction import DirectionGrid, direction_grid
from mechlens.methods.directions.nulls import LabelledVectors, random_null
from mechlens.methods.probing.auroc import MIN_FAMILIES, auroc, auroc_bounds, auroc_difference, auroc_estimate
from mechlens.methods.probing.baselines import mean_embedding_scores, tfidf_scores
from mechlens.methods.probing.out_of_fold import OutOfFoldScores, out_of_fold_null, out_of_fold_scores
from mechlens.methods.statistics.by_prompt import ByPrompt
from mechlens.methods.statistics.effect_size import effect_estimate, hedges_g
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, fewest_families
from mechlens.prompts.split import families_of_each
from mechlens.settings import Nulls
from mechlens.studies.shared.contrasts import Surface


@dataclass(frozen=True)
class Question:
    """Two classes of prompts to be told apart; the others are scored and count for nothing."""

    name: str
    positive_label: str
    negative_label: str
    labels: tuple[str, ...]

    @property
    def positive(self) -> Bool[Tensor, " prompt"]:
        """Prompts of the first class."""
        return torch.tensor([label == self.positive_label for label in self.labels])

    @property
    def member(self) -> Bool[Tensor, " prompt"]:
        """Prompts of either class."""
        return torch.tensor([label in (self.positive_label, self.negative_label) for label in self.labels])

    def counts(self) -> dict[str, int]:
        """Prompts of each class."""
        return {label: self.labels.count(label) for label in (self.positive_label, self.negative_label)}


@dataclass(frozen=True)
class OutOfFoldContrast:
    """One contrast with every prompt scored out of fold; without scores where a class has too few families."""

    question: Question
    scores: OutOfFoldScores | None
    directions: DirectionGrid | None
    """Fitted to all prompts of both classes: for use elsewhere, not for a number here."""
    grid: pd.DataFrame
    """One row per level and position: AUROC with interval, effect size (Hedges' g), the level the same in all folds."""
    chosen: pd.DataFrame
    """One row per position: AUROC and effect size at the level chosen within each fold, the AUROC's range over fold
    seeds, both nulls."""
    surface: dict[str, Float[Tensor, " prompt"]]
    """Scores of the surface baselines of all prompts, on the first fold seed."""
    families: tuple[str, ...]

    def auroc(self, position: str, inside: Bool[Tensor, " prompt"] | None = None) -> Estimate:
        """Nested AUROC at one position over the members, or over those of them that are `inside`."""
        kept = self.question.member if inside is None else self.question.member & inside
        if self.scores is None:
            return Estimate.missing(min(self.question.counts().values()))
        return self._estimate(self.scores.at(position), kept)

    def by_prompt(
        self, ids: Sequence[str], position: str, inside: Bool[Tensor, " prompt"] | None = None
    ) -> ByPrompt | None:
        """The scores behind `auroc`; None where there are none."""
        kept = self.question.member if inside is None else self.question.member & inside
        if self.scores is None:
            return None
        return ByPrompt(ids, self.families, self.scores.at(position), self.question.positive).only(kept)

    def baseline(self, name: str, inside: Bool[Tensor, " prompt"] | None = None) -> Estimate:
        """AUROC of one surface baseline over the same prompts."""
        kept = self.question.member if inside is None else self.question.member & inside
        if name not in self.surface:
            return self._missing(kept)
        return self._estimate(self.surface[name], kept)

    def gain(self, position: str, inside: Bool[Tensor, " prompt"] | None = None) -> tuple[Estimate, str]:
        """AUROC beyond the best surface baseline, paired over the same prompts and folds; and that baseline's name."""
        kept = self.question.member if inside is None else self.question.member & inside
        positive, families = self._cut(kept)
        if self.scores is None or not self.surface or fewest_families(positive, families) < MIN_FAMILIES:
            return self._missing(kept), ""
        own = {k: v for k, v in self.surface.items() if "." not in k or k.endswith(f".{position}")}
        best = max(own, key=lambda name: float(auroc(own[name][kept], positive)))
        first = self.scores.by_seed(position)[0]
        return auroc_difference(first[kept], own[best][kept], positive, families), best

    def baselines(self) -> pd.DataFrame:
        """One row per baseline: contrast, baseline, auroc, low, high, n."""
        names = {name: "_auroc.".join(name.split(".", 1)) if "." in name else f"{name}_auroc" for name in self.surface}
        return pd.DataFrame(
            [
                {"contrast": self.question.name, "baseline": shown, **self.baseline(name).row("auroc")}
                for name, shown in names.items()
            ]
        )

    def _estimate(self, scores: Float[Tensor, " prompt"], kept: Bool[Tensor, " prompt"]) -> Estimate:
        positive, families = self._cut(kept)
        if fewest_families(positive, families) < MIN_FAMILIES:
            return self._missing(kept)
        return auroc_estimate(scores[kept], positive, families)

    def _missing(self, kept: Bool[Tensor, " prompt"]) -> Estimate:
        """With the count of the smaller class, which is what there are too few of."""
        positive, _ = self._cut(kept)
        return Estimate.missing(min(int(positive.sum()), int((~positive).sum())))

    def _cut(self, kept: Bool[Tensor, " prompt"]) -> tuple[Bool[Tensor, " kept"], list[str]]:
        return self.question.positive[kept], [self.families[i] for i in kept.nonzero().flatten().tolist()]


def measure_contrast(
    question: Question, acts: Activations, folds: Sequence[Sequence[Fold]], surface: Surface, plan: Nulls
) -> OutOfFoldContrast:
    """Scores of all prompts, baselines and nulls; nothing is raised where a class is small."""
    if not _enough(question, acts, folds):
        return OutOfFoldContrast(question, None, None, pd.DataFrame(), pd.DataFrame(), {}, acts.families)
    scores = out_of_fold_scores(acts, question.positive, question.member, folds)
    directions = direction_grid(replace(acts, labels=question.labels), question.positive_label, question.negative_label)
    return OutOfFoldContrast(
        question=question,
        scores=scores,
        directions=directions,
        grid=_grid(question, scores, acts.families),
        chosen=_chosen(question, scores, directions, acts, folds[0], plan),
        surface=_surface_scores(question, scores, surface, folds[0]),
        families=acts.families,
    )


def _enough(question: Question, acts: Activations, folds: Sequence[Sequence[Fold]]) -> bool:
    families = families_of_each(question.labels, acts.families)
    fitted = [Counter(question.labels[i] for i in fold.fitted) for own in folds for fold in own]  # inner folds too
    return all(
        families[label] >= MIN_FAMILIES and all(part[label] >= MIN_FAMILIES // 2 for part in fitted)
        for label in question.counts()
    )


def _grid(question: Question, scores: OutOfFoldScores, families: Sequence[str]) -> pd.DataFrame:
    member = question.member
    positive = question.positive[member]
    own = [families[i] for i in member.nonzero().flatten().tolist()]
    cells = scores.by_level[:, :, member]
    values, bounds = auroc(cells, positive), auroc_bounds(cells, positive, own)
    effects = hedges_g(cells, positive, torch.ones(1, len(own)))[..., 0]
    return pd.DataFrame(
        [
            {"contrast": question.name, "level": level, "position": position, "auroc": float(values[i, j]),
             "low": float(bounds.low[i, j]), "high": float(bounds.high[i, j]), "n": len(own),
             "effect_size": float(effects[i, j])}
            for i, level in enumerate(scores.levels) for j, position in enumerate(scores.positions)
        ]
    )  # fmt: skip


def _chosen(
    question: Question,
    scores: OutOfFoldScores,
    directions: DirectionGrid,
    acts: Activations,
    folds: Sequence[Fold],
    plan: Nulls,
) -> pd.DataFrame:
    member = question.member
    rows = member.nonzero().flatten().tolist()
    number = {row: i for i, row in enumerate(rows)}
    inside = [Fold(*(tuple(number[i] for i in part if i in number) for part in fold)) for fold in folds]
    positive, families = question.positive[member], [acts.families[row] for row in rows]
    found = []
    for position in scores.positions:
        level = scores.level(position)
        vectors = LabelledVectors(acts.at(level, position)[member], positive, families)
        column = column_of(position, scores.positions, scores.last)
        fixed = float(auroc(scores.by_level[scores.levels.index(level), column][member], positive))
        permuted = out_of_fold_null(vectors, inside, fixed, plan.permutations, plan.seed + 2)
        drawn = random_null(directions.at(level, position), vectors, plan.random_directions, plan.seed + 4)
        by_seed = auroc(scores.by_seed(position)[:, member], positive)
        effect = effect_estimate(scores.at(position)[member], positive, families)
        found.append(
            {"contrast": question.name, "position": position, "level": level,
             **auroc_estimate(scores.at(position)[member], positive, families).row("auroc"),
             **effect.beside("effect_size"),
             "lowest_fold_seed": float(by_seed.min()), "highest_fold_seed": float(by_seed.max()),
             "permuted_mean": permuted.mean, "permutation_p": permuted.p,
             "random_mean": drawn.mean, "random_maximum": drawn.maximum}
        )  # fmt: skip
    return pd.DataFrame(found)


def _surface_scores(
    question: Question, scores: OutOfFoldScores, surface: Surface, folds: Sequence[Fold]
) -> dict[str, Float[Tensor, " prompt"]]:
    """Each baseline fitted to the members of the same folds; of those that can be."""
    positive, member = question.positive, question.member
    found = {
        "mean_embedding": torch.empty(len(member), dtype=torch.float64),
        "length": surface.n_tokens.double().clone(),
    }
    if all(any(surface.texts[i].strip() for i in fold.fitted if member[i]) for fold in folds):
        found["tfidf"] = torch.empty(len(member), dtype=torch.float64)
    for fold in folds:
        fitted, rows = [i for i in fold.fitted if member[i]], list(fold.scored)
        labels = positive[fitted]
        if "tfidf" in found:
            texts = [surface.texts[i] for i in fitted], [surface.texts[i] for i in rows]
            found["tfidf"][rows] = tfidf_scores(texts[0], labels, texts[1])
        means = surface.mean_embeddings[fitted], surface.mean_embeddings[rows]
        found["mean_embedding"][rows] = mean_embedding_scores(means[0], labels, means[1])
        lengths = surface.n_tokens[fitted].double()
        if float(lengths[labels].mean()) < float(lengths[~labels].mean()):
            found["length"][rows] *= -1
    if 0 in scores.levels:
        for column, position in enumerate(scores.positions):
            found[f"token_identity.{position}"] = scores.by_level[scores.levels.index(0), column]
    return found
