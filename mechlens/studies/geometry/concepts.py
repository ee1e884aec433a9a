"""Each concept at its home: one direction or more, AUROC against the number of dimensions, clusters nobody named."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.geometry.coding.clusters import rate_clusters
from mechlens.methods.geometry.subspaces.beyond_one import BeyondOne, beyond_one_direction
from mechlens.methods.geometry.subspaces.by_rank import AurocByRank, auroc_by_rank
from mechlens.methods.probing.beyond_words import levels_of
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading, varies
from mechlens.studies.shared.sink_positions import Asked

HOMES = {"harmful": "inst", "refused": "last"}
"""Where each concept is looked at: harm where the request ends, refusal where the answer starts."""
CLUSTERS = (2, 4)
"""As many as there are classes and quadrants."""


@dataclass(frozen=True)
class Concept:
    """A concept at one level and position of the first model; the same place is looked at in others."""

    name: str
    position: str
    level: int | None
    """None where a class has too few prompts."""
    beyond: tuple[BeyondOne | None, ...] = field(repr=False)
    """Of every model."""
    ranks: AurocByRank | None
    """Of the first model."""


def concepts_of(readings: Sequence[Reading], plan: GeometryPlan) -> tuple[Concept, ...]:
    """Harmfulness and refusal, each at the level that most folds of the first model choose."""
    return tuple(
        _concept(readings, k, one, plan)
        for k, one in enumerate(progress_bar(list(readings[0].asked), title="concepts", unit="concept"))
    )


@one_thread()
def _concept(readings: Sequence[Reading], k: int, asked: Asked, plan: GeometryPlan) -> Concept:
    position = HOMES[asked.name]
    level = home_level(readings[0], asked, position, plan.seed) if asked.measurable else None
    if level is None:
        return Concept(asked.name, position, None, tuple(None for _ in readings), None)
    beyond = tuple(_beyond(one, one.asked[k], level_in(one, readings[0], level), position, plan) for one in readings)
    values = readings[0].acts.at(level, position)[asked.rows]
    ranks = tuple(one for one in plan.ranks if one <= min(values.shape[1], _fewest(asked, plan.seed)))
    by_rank = auroc_by_rank(
        values, asked.positive, asked.families, ranks=ranks, random=plan.random_subspaces, seed=plan.seed
    )
    return Concept(asked.name, position, level, beyond, by_rank)


def _fewest(asked: Asked, seed: int) -> int:
    """Prompts of the smaller class that every fold fits on at least, and so the most dimensions of its subspace."""
    fits = [asked.positive[list(fold.fitted)] for part in asked.folds(seed).parts for fold in part]
    return min(min(int(own.sum()), int((~own).sum())) for own in fits)


def home_level(reading: Reading, asked: Asked, position: str, seed: int) -> int | None:
    """The level that most folds choose by the mean difference; of equals the lowest, and none where nothing varies."""
    acts = reading.acts
    cells = {level: acts.at(level, position)[asked.rows] for level in acts.levels}
    cells = {level: values for level, values in cells.items() if varies(values)}
    if not cells:
        return None
    stacked: Float[Tensor, "prompt level d_model"] = torch.stack(list(cells.values()), dim=1)
    rows = [row for part in levels_of(stacked, asked.folds(seed)) for row in part]
    return list(cells)[max(sorted(set(rows)), key=rows.count)]


def level_in(reading: Reading, first: Reading, level: int) -> int:
    """The level of a model that is as deep in it as `level` is in the first, among those that were read."""
    if reading.acts.levels == first.acts.levels:
        return level
    share = level / max(1, max(first.acts.levels))
    return min(reading.acts.levels, key=lambda one: abs(one / max(1, max(reading.acts.levels)) - share))


def _beyond(reading: Reading, asked: Asked, level: int, position: str, plan: GeometryPlan) -> BeyondOne | None:
    values = reading.acts.at(level, position)
    if not asked.measurable or not varies(values[asked.rows]):
        return None
    return beyond_one_direction(
        values[asked.rows], asked.positive, asked.families, k=min(plan.dimensions, values.shape[1] - 1),
        random=plan.random_subspaces, seed=plan.seed, words=reading.words[asked.rows],
    )  # fmt: skip


def concept_table(readings: Sequence[Reading], concepts: Sequence[Concept]) -> pd.DataFrame:
    """A row a model and concept: what one direction reads, what is left without it, and what the words have left."""
    rows = []
    for concept in concepts:
        for reading, found in zip(readings, concept.beyond, strict=True):
            if found is None or concept.level is None:
                continue
            place = {"model": reading.name, "step": reading.step, "concept": concept.name,
                     "position": concept.position, "level": level_in(reading, readings[0], concept.level)}  # fmt: skip
            numbers = found.line.beside("line") | found.left.beside("left") | found.words.beside("words")
            numbers |= found.beyond_words.beside("beyond_words") | {"n": found.line.n}
            rows.append(place | numbers | {"random_mean": found.random_mean, "random_max": found.random_max})
    return pd.DataFrame(rows)


def rank_table(concepts: Sequence[Concept]) -> pd.DataFrame:
    """A row a concept and number of dimensions: AUROC out of fold, and that of random subspaces."""
    rows = []
    for one in concepts:
        for reading in one.ranks.readings if one.ranks is not None else ():
            rows.append({"concept": one.name, "k": reading.k, **reading.subspace.beside("subspace"),
                         **reading.gain.beside("gain"), **reading.grassmann.beside("grassmann"),
                         "random_mean": reading.random_mean, "random_max": reading.random_max,
                         "n": reading.subspace.n})  # fmt: skip
    return pd.DataFrame(rows)


@one_thread()
def cluster_table(readings: Sequence[Reading], concepts: Sequence[Concept]) -> pd.DataFrame:
    """Adjusted Rand index of clusters found without labels, by coding rate and by k-means, with every labelling."""
    rows = []
    places = {(one.position, one.level) for one in concepts if one.level is not None}
    for reading in progress_bar(readings, title="clusters", unit="model"):
        for position, first in sorted(places):
            level = level_in(reading, readings[0], first)
            values = reading.acts.at(level, position)
            for k in CLUSTERS if varies(values) and len(values) > max(CLUSTERS) else ():
                found = rate_clusters(values, k=k)
                for name, (kept, labels) in reading.labellings().items():
                    rows.append({"model": reading.name, "step": reading.step, "position": position, "level": level,
                                 "k": k, "labels": name, "by_rate": found.agreement(labels, kept),
                                 "by_means": found.means_agreement(labels, kept), "n": len(kept)})  # fmt: skip
    return pd.DataFrame(rows)
