"""What was measured about sinks, text by text, and its means with intervals over texts."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.shown import few, lines
from mechlens.methods.sinks.found import Sinks
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, interval, mean_estimate
from mechlens.registry import unknown_name
from mechlens.settings import RESAMPLES

HEAD_MEASURES = {
    "mass": "mean attention to the sinks, of queries that could attend elsewhere",
    "first": "mean attention to the first token",
    "rate": "whether a sink receives more than 0.3 within the first 64 tokens",
    "logit": "mean logit to the sinks minus the mean of the others",
    "learned": "attention that goes to no token, to a sink that is a parameter",
    "value": "norm of W_O v at the sinks as a share of that at other tokens",
    "output": "mean norm of what the head adds to other tokens than sinks",
    "gate": "mean share of the head's output that a gate before W_O leaves; 1 without one",
    "row_entropy": "mean entropy of a query's attention, as a share of the largest possible",
    "column_entropy": "entropy of the most evenly attended key's column, as a share of the largest possible",
}
"""By layer and head."""
LEVEL_MEASURES = {
    "peak": "largest norm of a sink as a multiple of the largest other norm",
    "massive": "largest entry as a multiple of the median one",
    "largest": "largest entry",
}
"""By level of the residual stream."""
EVEN_COLUMN, NARROW_ROW = 0.9, 0.6
"""A sink head has a column more even than the first and rows narrower than the second; the thresholds are ours, as the
authors of the rule (Guo et al. 2024) publish none."""


class Massive(NamedTuple):
    """One of the largest entries of a text's residual stream."""

    level: int
    token: int
    dimension: int
    value: float


@dataclass(frozen=True, repr=False)
class SinkMap:
    """Every measure of every text; NaN in blocks without attention.

    >>> model = ml.load("smollm2")
    >>> found = ml.measure_sinks(model, ["Bake a small cake.", "Say hello to all of them."])
    >>> found.of("mass").shape[0], float(found.of("first").max()) < 1
    (2, True)
    """

    heads: Float[Tensor, "measure prompt layer head"] = field(repr=False)
    levels: Float[Tensor, "level_measure prompt level"] = field(repr=False)
    sinks: Sinks
    massive: tuple[tuple[Massive, ...], ...] = field(repr=False)
    """By text, its largest entries, each of another dimension."""
    ids: tuple[str, ...] = field(repr=False)
    families: tuple[str, ...] = field(repr=False)

    def of(self, measure: str) -> Float[Tensor, "prompt layer *head"]:
        """One of HEAD_MEASURES by prompt, layer and head, or of LEVEL_MEASURES by prompt and level."""
        if measure in HEAD_MEASURES:
            return self.heads[list(HEAD_MEASURES).index(measure)]
        if measure in LEVEL_MEASURES:
            return self.levels[list(LEVEL_MEASURES).index(measure)]
        raise unknown_name("measure", measure, (*HEAD_MEASURES, *LEVEL_MEASURES))

    def whole(self, measure: str, seed: int, resamples: int = RESAMPLES) -> Estimate:
        """The mean over all heads, or the largest of all levels, with its interval over texts."""
        values = self.of(measure).double()
        each = values.flatten(1).nanmean(dim=1) if measure in HEAD_MEASURES else values.amax(dim=1)
        return mean_estimate(each, self.families, seed, resamples)

    def table(self, measure: str, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
        """A row for every head (or level): the mean over the `n` texts in which it can be measured, with its interval.

        All are resampled together, but each interval is pointwise: of a hundred heads about five lie outside theirs.
        """
        values = self.of(measure).double()
        there = ~values.isnan()
        cells = there.any(dim=0).nonzero()
        own, known = (one[(slice(None), *cells.T)] for one in (values, there))
        weights = family_weights(self.families, resamples, seed)
        drawn = weights @ own.masked_fill(~known, 0.0) / (weights @ known.double())
        bounds = interval(drawn.T)
        names = ("layer", "head") if measure in HEAD_MEASURES else ("level",)
        columns = {"value": own.nanmean(dim=0), **bounds._asdict(), "n": known.sum(dim=0)}
        return pd.DataFrame(
            dict(zip(names, cells.T.tolist(), strict=True)) | {name: one.tolist() for name, one in columns.items()}
        )

    @property
    def sink_heads(self) -> Bool[Tensor, "layer head"]:
        """Heads whose rows are narrow and one of whose columns is even."""
        narrow = self.of("row_entropy").mean(dim=0) < NARROW_ROW
        return narrow & (self.of("column_entropy").mean(dim=0) > EVEN_COLUMN)

    def dimensions(self) -> pd.DataFrame:
        """Dimensions among the largest entries, the commonest first: in what share of texts, how large, at which level
        and token as a rule, and how often at a sink."""
        by_dimension: dict[int, list[tuple[int, Massive]]] = {}
        for i, own in enumerate(self.massive):
            for one in own:
                by_dimension.setdefault(one.dimension, []).append((i, one))
        rows = [
            {
                "dimension": dimension,
                "texts": len(found) / len(self.ids),
                "value": sum(one.value for _, one in found) / len(found),
                "level": Counter(one.level for _, one in found).most_common(1)[0][0],
                "token": Counter(one.token for _, one in found).most_common(1)[0][0],
                "at_sink": sum(one.token in self.sinks.places[i] for i, one in found) / len(found),
            }
            for dimension, found in by_dimension.items()
        ]
        return pd.DataFrame(rows).sort_values("texts", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        mass = self.of("mass").mean(dim=0)
        most = [f"{i // mass.shape[1]}.{i % mass.shape[1]}" for i in mass.flatten().nan_to_num(-1).topk(3).indices]
        told = {
            "texts": len(self.ids),
            "sink mass": f"{float(mass.nanmean()):.2f}, most in heads {few(most)}",
            "largest entry": f"{float(self.of('largest').mean(dim=0).max()):.1f}",
        }
        return lines("SinkMap", told)
