"""What the first model does without each concept's subspace, against the number of dimensions taken out."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from mechlens.methods.activations.activations import one_cell
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, mean_difference
from mechlens.methods.geometry.subspaces.ablated import WithoutSubspace, concept_subspaces, without_subspaces
from mechlens.methods.progress import phase, progress_bar
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.geometry.concepts import Concept
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading
from mechlens.studies.shared.quadrants import refusal_tokens
from mechlens.studies.shared.sink_positions import Asked, first_of_each


@phase("without subspaces")
def ablated_table(
    model: LanguageModel,
    batch: TokenBatch,
    reading: Reading,
    concepts: Sequence[Concept],
    plan: GeometryPlan,
    cache: Cache,
) -> pd.DataFrame:
    """A row a concept and number of dimensions; subspaces are made of prompts of other families than are asked.

    At most half of the prompts of a class are asked. A concept with too few others has no rows.
    """
    labels = [one.label for one in reading.judged.prompts]
    half = min(labels.count(own) for own in ("harmful", "harmless")) // 2
    if not half:
        return pd.DataFrame()
    tested = first_of_each(labels, min(plan.ablated, half))
    harmful, harmless = ([i for i in tested if labels[i] == own] for own in ("harmful", "harmless"))
    tokens = refusal_tokens(reading.judged, range(len(labels)), loaded(model).tokenizer)
    held_out = {reading.families[i] for i in tested}
    rows = []
    for concept, asked in progress_bar(
        list(zip(concepts, reading.asked, strict=True)), title="without", unit="concept"
    ):
        others = without_families(asked, held_out)
        if concept.level is None or not others.measurable:
            continue
        values = reading.acts.at(concept.level, concept.position)[others.rows]
        fewest = min(int(others.positive.sum()), int((~others.positive).sum()), values.shape[1])
        found = without_subspaces(
            model, batch, harmful, harmless,
            concept_subspaces(values, others.positive, others.families, [k for k in plan.ranks if k <= fewest],
                              draws=plan.random_subspaces, seed=plan.seed),
            _like(reading, concept, others), tokens.ids, seed=plan.seed, cache=cache,
        )  # fmt: skip
        place = {"concept": concept.name, "position": concept.position, "level": concept.level}
        rows += [place | _row(one) for one in found]
    return pd.DataFrame(rows)


def without_families(asked: Asked, families: set[str]) -> Asked:
    """The concept's prompts of other families."""
    kept = [i for i, family in enumerate(asked.families) if family not in families]
    return replace(asked, rows=[asked.rows[i] for i in kept], positive=asked.positive[kept],
                   families=tuple(asked.families[i] for i in kept))  # fmt: skip


def _like(reading: Reading, concept: Concept, asked: Asked) -> Direction:
    """The concept's direction, of whose model and template the subspaces are."""
    assert concept.level is not None
    sides = (concept.name, f"not {concept.name}")
    acts = one_cell(reading.acts, concept.level, concept.position).select(asked.rows)
    labels = tuple(sides[0] if positive else sides[1] for positive in asked.positive.tolist())
    return mean_difference(replace(acts, labels=labels), *sides, concept.level, concept.position)


def _row(one: WithoutSubspace) -> dict[str, float]:
    numbers = one.shift.beside("shift") | one.gain.beside("gain") | one.beyond.beside("beyond") | one.kl.beside("kl")
    drawn = {"random": one.random, "within": one.within}
    for name, shifts in drawn.items():
        known = shifts or (math.nan,)
        numbers |= {f"{name}_mean": sum(known) / len(known), f"{name}_lowest": min(known)}
    return {"k": one.k} | numbers | {"random_kl": one.random_kl, "within_kl": one.within_kl, "n": one.shift.n}
