"""The shape of representations: one direction or a subspace, collapse, clusters, dimension, and what another model or a
series of checkpoints has in common with the first.

Li et al. 2015 (Convergent Learning), Papyan et al. 2020 (neural collapse), Wang et al. 2023 (Grassmann classes), Yu et
al. 2020 (coding rate).
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase, progress_bar
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.checkpoints.series import Member, checkpoint_series, content_of
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.settings import ModelChoice
from mechlens.studies.driver import Preparation
from mechlens.studies.geometry.ablated import ablated_table
from mechlens.studies.geometry.between import (
    Changed,
    change_table,
    changes,
    level_table,
    matching_table,
    similarity_table,
)
from mechlens.studies.geometry.by_level import collapse_table, dimension_table
from mechlens.studies.geometry.concepts import Concept, cluster_table, concept_table, concepts_of, rank_table
from mechlens.studies.geometry.config import GeometryPlan, MeasureGeometry
from mechlens.studies.geometry.edited import edited_tables
from mechlens.studies.geometry.many_to_many import group_table, sparse_table
from mechlens.studies.geometry.reading import Reading, read_model
from mechlens.studies.geometry.verdict import ChangeVerdict, DimensionVerdict, change_verdict, dimension_verdict
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import asks, chosen_base, chosen_model, inputs_of, prepared

LEAST = 12
"""Prompts: each has its ten nearest among the others."""


@dataclass(frozen=True)
class Subject:
    """One of the models, with the prompts as its template writes them."""

    name: str
    step: int
    model: LanguageModel
    batch: TokenBatch
    member: Member | None = None
    """The checkpoint that is put into the model before it is read."""


@dataclass(frozen=True)
class GeometryStudy:
    """The models, the first of which the others are compared with."""

    subjects: tuple[Subject, ...]
    swapper: CheckpointSwapper | None = None


@dataclass(frozen=True)
class GeometryResult:
    """All that the study found."""

    verdicts: tuple[DimensionVerdict, ...]
    """On harmfulness and on refusal in the first model."""
    changed: tuple[ChangeVerdict, ...]
    """On every other model, where the request ends or, if harm can't be measured, where the answer starts."""
    concepts: tuple[Concept, ...]
    changes: tuple[Changed, ...]
    frames: dict[str, pd.DataFrame] = field(repr=False)

    def metrics(self) -> dict[str, Estimate]:
        """What decided: each concept's direction, what is left without it, and how every other model lies."""
        found: dict[str, Estimate] = {}
        for one in self.verdicts:
            if one.found is not None:
                parts = {"line": one.found.line, "left": one.found.left, "beyond_words": one.found.beyond_words}
                found |= {f"{name}.{one.concept}": value for name, value in parts.items()}
        for moved in self.changes:
            place = f"{moved.model}.{moved.concept}"
            found |= {f"in_place.{place}": moved.change.in_place, f"shape.{place}": moved.change.shape}
        for _, row in self.tables().get("ablated", pd.DataFrame()).iterrows():
            found[f"ablated.{row['concept']}.{row['k']}"] = Estimate.of_beside(row, "shift", row["n"])
        return {name: value for name, value in found.items() if not math.isnan(value.value)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        return {name: table for name, table in self.frames.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """None."""
        return {}


def prepare(config: MeasureGeometry) -> Preparation[GeometryStudy]:
    """Prompts and models; UserError for whatever can't be had."""
    series = (
        checkpoint_series(config.model, config.checkpoints, revision=config.revision) if config.checkpoints else None
    )
    adapters = [one.path for one in series.members if one.kind == "adapter"] if series else []
    trained = [*config.models, *(ModelChoice(model=config.model, adapter=path) for path in adapters)]
    sets = read_harm_sets(config, trained)
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    prompts = (*matched.positive, *matched.negative)
    if len(prompts) < LEAST:
        raise UserError(f"there are {len(prompts)} prompts, and nothing is compared by fewer than {LEAST}; give more")
    check = asks(prompts, config.read, new_tokens=config.max_new_tokens)
    if series is not None:
        swapper, template = chosen_base(config.as_base, check, series.chat_template)
        batch = tokenize(prompts, template)
        subjects = tuple(Subject(one.name, one.step, swapper.model, batch, one) for one in series.members)
        contents = {f"checkpoint {one.name}": content_of(one) for one in series.members[1:]}
        inputs = inputs_of(swapper.base, template, sets.data | contents)
        return prepared(GeometryStudy(subjects, swapper), swapper.model, inputs, prompts, sets.left_out)
    chosen = [chosen_model(one, check) for one in config.models]
    batches = [tokenize(prompts, one.template) for one in chosen]
    names = [loaded(one.model).checkpoint.name for one in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"both models are {names[0]}; give two that differ")
    subjects = tuple(
        Subject(name, step, one.model, batch)
        for step, (name, one, batch) in enumerate(zip(names, chosen, batches, strict=True))
    )
    fingerprints = [loaded(one.model).checkpoint.fingerprint for one in chosen]
    others = list(zip(names, fingerprints, strict=True))[1:]
    data = sets.data | {f"other {name}": fingerprint for name, fingerprint in others if fingerprint}
    return prepared(GeometryStudy(subjects), chosen[0].model, chosen[0].inputs(data), prompts, sets.left_out)


def execute(config: MeasureGeometry, given: GeometryStudy, writer: RunWriter) -> GeometryResult:
    """The study as configured."""
    with given.swapper or contextlib.nullcontext():
        readings = read_all(given, config, writer.cache)
        found = geometry_of(readings, config)
        first, more = given.subjects[0], {}
        members = [one.member for one in given.subjects if one.member is not None]
        if config.ablated:
            model = first.model if given.swapper is None else given.swapper.put(members[0])
            more["ablated"] = ablated_table(model, first.batch, readings[0], found.concepts, config, writer.cache)
        if given.swapper is not None:
            more |= edited_tables(given.swapper, members, first.batch, readings[0], found.concepts, config)
    return replace(found, frames=found.frames | more)


@phase("reading")
def read_all(given: GeometryStudy, plan: GeometryPlan, cache: Cache) -> list[Reading]:
    """Every model in its turn."""
    several, found = len(given.subjects) > 1, []
    for one in progress_bar(list(given.subjects), title="models", unit="model"):
        model = one.model if one.member is None or given.swapper is None else given.swapper.put(one.member)
        found.append(read_model(model, one.batch, one.name, one.step, plan, matched=several, cache=cache))
    return found


@phase("geometry")
def geometry_of(readings: Sequence[Reading], plan: GeometryPlan) -> GeometryResult:
    """Everything that needs no model any more."""
    concepts = concepts_of(readings, plan)
    moved = changes(readings, concepts)
    at_home = {one.model: one.change for one in reversed(moved)}  # harm comes first, and so stays
    frames = {
        "concepts": concept_table(readings, concepts),
        "ranks": rank_table(concepts),
        "collapse": collapse_table(readings, plan),
        "clusters": cluster_table(readings, concepts),
        "dimension": dimension_table(readings),
        "changes": change_table(moved),
        "similarity": similarity_table(readings, concepts, plan),
        "levels": level_table(readings),
        "matching": matching_table(readings, plan),
        "sparse": sparse_table(readings, plan),
        "groups": group_table(readings, plan),
        "answers": readings[0].judged.table(),
    }
    return GeometryResult(
        tuple(dimension_verdict(one.name, one.beyond[0]) for one in concepts),
        tuple(change_verdict(one.name, at_home.get(one.name)) for one in readings[1:]),
        concepts, moved, frames,
    )  # fmt: skip
