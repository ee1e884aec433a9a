"""What is done to heads and dimensions, each beside others drawn at random: off, on the sink, set to 0."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechlens.methods.patching.heads import Head
from mechlens.methods.sinks.contrast import DomainContrast
from mechlens.methods.sinks.interventions import Edit, all_on_sink, without_dimensions, zeroed
from mechlens.methods.sinks.result import SinkMap
from mechlens.models.attention.changes import Change
from mechlens.studies.sinks.config import SinkPlan

DIFFER, MOST, LARGEST, RANDOM = "differ most", "most sink mass", "largest", "random"
OFF, ON_SINK, GONE = "off", "all on the sink", "at 0"
DIMENSIONS = 2
"""Massive dimensions that are removed together."""


@dataclass(frozen=True)
class Experiment:
    """One change of every pass: heads off or on the sink, or dimensions at 0 at the sinks."""

    which: str
    """How they were chosen."""
    what: str
    heads: tuple[Head, ...] = ()
    dimensions: tuple[int, ...] = ()

    @property
    def named(self) -> str:
        """Heads as layer.head, dimensions by number."""
        return ", ".join([*(f"{layer}.{head}" for layer, head in self.heads), *map(str, self.dimensions)])

    def change(self, places: Sequence[int]) -> Change | None:
        """What it does to a text's attention; `places` are the text's sinks."""
        if not self.heads:
            return None
        return zeroed(self.heads) if self.what == OFF else all_on_sink(self.heads, places[0])

    def edit(self, places: Sequence[int]) -> Edit | None:
        """What it does to a text's residual stream."""
        return without_dimensions(self.dimensions, places) if self.dimensions else None


def single_heads(contrast: DomainContrast, plan: SinkPlan) -> tuple[tuple[str, Head], ...]:
    """The heads that differ most, then others at random, each with the word for how it was chosen."""
    chosen = contrast.strongest(plan.heads)
    drawn = _drawn(contrast, chosen, plan.random_heads, random.Random(plan.seed))
    return (*((DIFFER, head) for head in chosen), *((RANDOM, head) for head in drawn))


def one_by_one(heads: Sequence[tuple[str, Head]]) -> list[Experiment]:
    """Each head off, then on the sink."""
    return [Experiment(which, what, (head,)) for which, head in heads for what in (OFF, ON_SINK)]


def together(maps: Mapping[str, SinkMap], contrast: DomainContrast, plan: SinkPlan, d_model: int) -> list[Experiment]:
    """Sets: heads that differ most, heads with the most sink mass, the largest dimensions, and as many at random."""
    draw = random.Random(plan.seed)
    n = len(contrast.strongest(plan.heads))
    sets = [(DIFFER, contrast.strongest(plan.heads)), (MOST, most_mass(maps, n))]
    taken = [head for _, own in sets for head in own]
    sets += [(RANDOM, _drawn(contrast, taken, n, draw)) for _ in range(plan.random_sets)]
    found = [Experiment(which, what, own) for which, own in sets for what in (OFF, ON_SINK) if own]
    largest = list(dict.fromkeys(massive_of(maps)["dimension"].tolist()))[:DIMENSIONS]
    others = [one for one in range(d_model) if one not in largest]
    found.append(Experiment(LARGEST, GONE, dimensions=tuple(largest)))
    return found + [
        Experiment(RANDOM, GONE, dimensions=tuple(sorted(draw.sample(others, len(largest)))))
        for _ in range(plan.random_sets)
    ]


def most_mass(maps: Mapping[str, SinkMap], n: int) -> tuple[Head, ...]:
    """The heads whose sinks take most of their attention, the kinds of text weighing the same."""
    each = [one.of("mass").nanmean(dim=0) for one in maps.values()]
    mean = sum(each[1:], each[0]) / len(each)
    order = mean.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)[:n].tolist()
    return tuple((i // mean.shape[1], i % mean.shape[1]) for i in order)


def massive_of(maps: Mapping[str, SinkMap]) -> pd.DataFrame:
    """Of every kind the dimensions among the largest entries, those first that are in most texts of all kinds."""
    tables = [one.dimensions().assign(domain=name) for name, one in maps.items()]
    joined = pd.concat(tables, ignore_index=True)
    joined["rank"] = joined.groupby("dimension")["texts"].transform("sum")
    # Of equals the larger one: four dimensions may be in all texts.
    joined["size"] = joined.groupby("dimension")["value"].transform(lambda own: own.abs().max())
    order = joined.sort_values(["rank", "size", "domain"], ascending=[False, False, True], kind="stable")
    return order.drop(columns=["rank", "size"]).reset_index(drop=True)


def _drawn(contrast: DomainContrast, taken: Sequence[Head], n: int, draw: random.Random) -> tuple[Head, ...]:
    there = [(int(a), int(b)) for a, b in (~contrast.difference.isnan()).nonzero().tolist()]
    others = [head for head in there if head not in taken]
    return tuple(draw.sample(others, min(n, len(others))))
