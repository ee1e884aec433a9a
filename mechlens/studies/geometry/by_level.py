"""Collapse, coding rate and dimension at every level and position, for every way to sort prompts into classes."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.geometry.coding.rate import rate_reduction
from mechlens.methods.geometry.collapse.class_means import ClassMeans, class_means
from mechlens.methods.geometry.collapse.deviation import feature_deviation
from mechlens.methods.geometry.collapse.duality import mean_disagreement, self_duality
from mechlens.methods.geometry.collapse.simplex import simplex_errors
from mechlens.methods.geometry.collapse.variability import variability_collapse
from mechlens.methods.geometry.dimension.intrinsic import FEWEST, intrinsic_dimension
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading, varies

RIDGE = 0.1
"""Penalty of the linear probe behind NC3 and NC4, as a share of the mean squared length of the vectors."""


@one_thread()
def collapse_table(readings: Sequence[Reading], plan: GeometryPlan) -> pd.DataFrame:
    """A row a model, labelling, position and level: NC1 to NC4, and the coding rate beside permuted labels.

    Of other models also how far their features are from those of the first, where these have as many dimensions.
    """
    rows = []
    for reading in progress_bar(readings, title="collapse", unit="model"):
        for name, (kept, labels) in reading.labellings().items():
            families = [reading.families[i] for i in kept]
            for level, position, values in _cells(reading):
                found: dict[str, float] = {"classes": len(set(labels)), "n": len(kept)}
                found |= _collapse(values[kept], labels)
                rate = rate_reduction(
                    values[kept] - values[kept].mean(dim=0), labels, n=plan.shuffles, seed=plan.seed, families=families
                )
                found |= {"rate": rate.reduction.value, "rate_chance": rate.reduction.mean, "rate_p": rate.reduction.p}
                found |= _moved(readings[0], reading, kept, labels, level, position)
                place = {"model": reading.name, "step": reading.step, "labels": name}
                rows.append(place | {"position": position, "level": level} | found)
    return pd.DataFrame(rows)


def _cells(reading: Reading) -> list[tuple[int, str, Float[Tensor, "prompt d_model"]]]:
    acts = reading.acts
    cells = [(acts.levels[row], acts.positions[column], values) for row, column, values in acts.cells()]
    return [(level, position, values) for level, position, values in cells if varies(values)]


def _collapse(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> dict[str, float]:
    spread, means = variability_collapse(values, labels), class_means(values, labels)
    simplex = simplex_errors(values, labels)
    weight, bias = ridge_probe(values, means)
    duality = self_duality(means, weight)
    return {
        "nc1_trace": spread.trace, "nc1_svd": spread.svd, "nc1_cdnv": spread.cdnv, "nc1_quotient": spread.quotient,
        "nc2_norm_spread": simplex.norm_spread, "nc2_coherence": simplex.coherence, "nc2_etf": simplex.etf_error,
        "nc2_gnc2_excess": simplex.gnc2_excess, "nc3_distance": duality.distance, "nc3_cosine": duality.cosine,
        "nc4": mean_disagreement(means, values, weight, bias),
    }  # fmt: skip


def ridge_probe(
    values: Float[Tensor, "prompt d_model"], means: ClassMeans
) -> tuple[Float[Tensor, "class d_model"], Float[Tensor, " class"]]:
    """Weights and offsets of a ridge regression on the classes' indicators."""
    exact = values.double()
    centred, truth = exact - exact.mean(dim=0), torch.nn.functional.one_hot(means.of, len(means.classes)).double()
    kernel = centred @ centred.T
    penalty = RIDGE * float(kernel.diagonal().mean())
    solved = torch.linalg.solve(
        kernel + penalty * torch.eye(len(kernel), dtype=kernel.dtype), truth - truth.mean(dim=0)
    )
    weight = solved.T @ centred
    return weight, truth.mean(dim=0) - weight @ exact.mean(dim=0)


def _moved(
    first: Reading, other: Reading, rows: Sequence[int], labels: Sequence[str], level: int, position: str
) -> dict[str, float]:
    """The deviation from the first model's features; nothing for the first itself, or one of other places."""
    same = first.acts.values.shape == other.acts.values.shape and first.acts.positions == other.acts.positions
    if other is first or not same:
        return {}
    then, now = (one.acts.at(level, position)[rows] for one in (first, other))
    found = feature_deviation(now, then, labels)
    return {"moved_between": found.between, "moved_within": found.within, "within_kept": found.within_kept}


@one_thread()
def dimension_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """A row a model, position and level: three intrinsic dimensions of all prompts."""
    rows = []
    for reading in readings:
        for level, position, values in _cells(reading):
            if len(torch.unique(values, dim=0)) < FEWEST:
                continue
            found = intrinsic_dimension(values)
            measures = {name: getattr(found, name) for name in ("two_nn", "likelihood", "participation", "n")}
            rows.append({"model": reading.name, "step": reading.step, "position": position, "level": level} | measures)
    return pd.DataFrame(rows)
