"""Every other model beside the first, over the same prompts: in place, turned or other; units matched one to one."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from mechlens.methods.geometry.matching.one_to_one import match_units
from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.similarity.in_place import (
    RepresentationChange,
    in_place,
    representation_change,
)
from mechlens.methods.geometry.similarity.similarity import SIMILARITIES, similarity, without_massive
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.geometry.concepts import Concept, level_in
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading, varies


@dataclass(frozen=True)
class Changed:
    """Another model beside the first, at one concept's home."""

    model: str
    step: int
    concept: str
    position: str
    level: int
    """In the first model."""
    change: RepresentationChange


def changes(readings: Sequence[Reading], concepts: Sequence[Concept]) -> tuple[Changed, ...]:
    """At every concept's home, without massive dimensions of either model."""
    first, found = readings[0], []
    for other in readings[1:]:
        for one in concepts:
            if one.level is None:
                continue
            pair = plain_pair(first, other, one.level, one.position)
            if all(varies(side) for side in pair):
                change = representation_change(*pair, first.families, first.words)
                found.append(Changed(other.name, other.step, one.name, one.position, one.level, change))
    return tuple(found)


def pair_at(first: Reading, other: Reading, level: int, position: str) -> tuple[Tensor, Tensor]:
    """Vectors of both at one level of the first and as deep in the other."""
    return first.acts.at(level, position), other.acts.at(level_in(other, first, level), position)


def plain_pair(first: Reading, other: Reading, level: int, position: str) -> tuple[Tensor, Tensor]:
    """The same without dimensions that dwarf all others: in either model where they have as many."""
    one, two = pair_at(first, other, level, position)
    of_both = (one, two) if one.shape == two.shape else None
    return without_massive(one, *(of_both or (one,))), without_massive(two, *(of_both or (two,)))


def change_table(found: Sequence[Changed]) -> pd.DataFrame:
    """A row a model and concept."""
    rows = []
    for one in found:
        place = {"model": one.model, "step": one.step, "concept": one.concept, "position": one.position,
                 "level": one.level}  # fmt: skip
        names = ("in_place", "shape", "words", "beyond_words")
        numbers = {key: value for name in names for key, value in getattr(one.change, name).beside(name).items()}
        rows.append(place | numbers | {"n": one.change.shape.n})
    return pd.DataFrame(rows)


@one_thread()
def similarity_table(readings: Sequence[Reading], concepts: Sequence[Concept], plan: GeometryPlan) -> pd.DataFrame:
    """Four similarities at every concept's home with their nulls, with all dimensions and without massive ones."""
    rows, first = [], readings[0]
    homes = [one for one in concepts if one.level is not None]
    for other in progress_bar(readings[1:], title="similarity", unit="model"):
        for home in homes:
            assert home.level is not None
            for which, sides in (("all", pair_at), ("without massive", plain_pair)):
                pair = sides(first, other, home.level, home.position)
                for measure in SIMILARITIES if all(varies(side) for side in pair) else ():
                    found = similarity(measure, *pair, n=plan.shuffles, seed=plan.seed, families=first.families)
                    rows.append({"model": other.name, "step": other.step, "position": home.position,
                                 "level": home.level, "dimensions": which, "measure": measure, "value": found.value,
                                 "chance": found.mean, "highest": found.highest, "p": found.p})  # fmt: skip
    return pd.DataFrame(rows)


@one_thread()
def level_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """A row a model, position and level: alike in place and in shape, without massive dimensions."""
    rows, first = [], readings[0]
    for other in progress_bar(readings[1:], title="levels", unit="model"):
        for level in first.acts.levels:
            for position in (name for name in first.acts.positions if name in other.acts.positions):
                one, two = plain_pair(first, other, level, position)
                if varies(one) and varies(two):
                    alike = in_place(one, two) if one.shape == two.shape else float("nan")
                    rows.append({"model": other.name, "step": other.step, "position": position, "level": level,
                                 "in_place": alike, "shape": unbiased_cka(one, two)})  # fmt: skip
    return pd.DataFrame(rows)


@one_thread()
def matching_table(readings: Sequence[Reading], plan: GeometryPlan) -> pd.DataFrame:
    """Neurons and heads at the last position: how alike partners are, beside chance, and how many kept their number."""
    rows, first = [], readings[0]
    for other in progress_bar(readings[1:], title="matching", unit="model"):
        for kind in first.units:
            for place, *sides in unit_pairs(first, other, kind):
                found = match_units(*sides, n=plan.shuffles, seed=plan.seed, families=first.families)
                rows.append(place | {
                    "n_units": min(found.similarities.shape), "matched": found.matched.value,
                    "chance": found.matched.mean, "p": found.matched.p, "gap": found.gap,
                    "identity_rate": found.identity_rate,
                })  # fmt: skip
    return pd.DataFrame(rows)


def unit_pairs(first: Reading, other: Reading, kind: str) -> list[tuple[dict[str, object], Tensor, Tensor]]:
    """Both models' neurons or heads at every layer that was read, after what names a row of theirs."""
    one, two = first.units[kind], other.units[kind]
    return [
        ({"model": other.name, "step": other.step, "units": kind, "layer": layer, "other_layer": partner},
         one.values[:, one.levels.index(layer), 0], two.values[:, two.levels.index(partner), 0])
        for layer, partner in zip(one.levels, two.levels, strict=False)
    ]  # fmt: skip
