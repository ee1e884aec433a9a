"""Where the four quadrants lie in each checkpoint: as the base defines them, and as the checkpoint itself does.

Projections on the base's frozen directions, and beliefs of harmfulness (at `inst`) and of refusal (at the last
token) after Zhao et al. 2025, by centroids of refused harmful and accepted harmless training prompts.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import project
from mechlens.methods.probing.beliefs import Centroids, beliefs, centroids
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import QUADRANTS
from mechlens.studies.shared.two_beliefs import LEAST_FOR_A_POLE, POLES
from mechlens.studies.track.reference import Reference

BELIEFS = {"belief_harm": "inst", "belief_refusal": ""}
"""Beliefs with their positions; empty is the last token of the prompt."""


def quadrant_table(
    steps: Sequence[int],
    acts: Sequence[Activations],
    quadrants: Sequence[Sequence[str]],
    reference: Reference,
    *,
    seed: int,
    n_resamples: int,
) -> pd.DataFrame:
    """Mean of each number over the held-out prompts of each quadrant, with its interval: one row each.

    Columns step, by (reference or own), number, quadrant, mean, low, high, n. "reference": the base's quadrants and
    the base's directions and centroids; "own": quadrants by the checkpoint's own answers, with directions and
    centroids fitted on the checkpoint's own activations. A row with too few prompts has n and no mean.
    """
    held_out = sorted((*reference.split.validation, *reference.split.test))
    frozen = _centroids(acts[0], quadrants[0], reference.split)
    rows = []
    for k, step in enumerate(steps):
        part = acts[k].select(held_out)
        own = _centroids(acts[k], quadrants[k], reference.split)
        for by, labels, means, fitted in (
            ("reference", quadrants[0], frozen, acts[0]),
            ("own", quadrants[k], own, acts[k]),
        ):
            numbers = _projections(part, reference, fitted) | _beliefs(part, means)
            for name, values in numbers.items():
                for quadrant in QUADRANTS:
                    inside = [i for i, row in enumerate(held_out) if labels[row] == quadrant]
                    rows.append(
                        {"step": step, "by": by, "number": name, "quadrant": quadrant,
                         **_mean(values, inside, part.families, seed, n_resamples)}
                    )  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "by", "number", "quadrant", "mean", "low", "high", "n"])


def _centroids(acts: Activations, quadrants: Sequence[str], split: Split) -> dict[str, Centroids]:
    """By belief; none where a pole has too few training prompts."""
    train = replace(acts, labels=tuple(quadrants)).select(split.train)
    if min(train.labels.count(name) for name in POLES) < LEAST_FOR_A_POLE:
        return {}
    return {name: centroids(train, *POLES, position or acts.positions[-1]) for name, position in BELIEFS.items()}


def _projections(part: Activations, reference: Reference, fitted: Activations) -> dict[str, Tensor]:
    """Along each concept's direction at its home, in units of the residual stream."""
    found = {}
    for concept in reference.measurable:
        direction = concept.direction(fitted, reference.split)
        found[f"projection_{concept.name}"] = project(part.at(direction.level, direction.position), direction).double()
    return found


def _beliefs(part: Activations, means: dict[str, Centroids]) -> dict[str, Tensor]:
    found = {}
    for name in BELIEFS:
        if name in means:
            found[name] = beliefs(part, means[name], centered=False, skip_embedding=False)
            found[f"{name}.centered"] = beliefs(part, means[name], centered=True, skip_embedding=True)
    return found


def _mean(
    values: Tensor, inside: list[int], families: Sequence[str], seed: int, n_resamples: int
) -> dict[str, float | int]:
    if len(inside) < LEAST_FOR_A_POLE:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": len(inside)}
    found = mean_estimate(torch.as_tensor(values)[inside], [families[i] for i in inside], seed, n_resamples)
    return {"mean": found.value, "low": found.low, "high": found.high, "n": found.n}
