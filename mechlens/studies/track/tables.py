"""How the base's readouts do on later checkpoints, cell by cell: frozen, refitted, and passed on between any two.

A[s, t] is the AUROC of the direction fitted at checkpoint s on the test prompts of checkpoint t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.nulls import TIE_RESOLUTION, largest_norm
from mechlens.methods.probing.auroc import auroc, auroc_bounds, auroc_estimate, snap
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.probing.readouts import (
    KINDS,
    Readouts,
    balanced_accuracy,
    brier,
    fit_lines,
    fit_readouts,
    thresholds,
)
from mechlens.methods.statistics.resample import interval, one_thread, sample_and_resamples
from mechlens.prompts.split import Split
from mechlens.studies.track.measures.reference import TrackedConcept

MEASURES = ("accuracy", "recalibrated", "brier")
"""Accuracy at the base's threshold and at one chosen anew, and the Brier score."""


@dataclass(frozen=True)
class _Test:
    """The test prompts of one checkpoint under one concept."""

    acts: Activations
    positive: Bool[Tensor, " prompt"]
    weights: Float[Tensor, "draw prompt"]
    """The sample itself first, then bootstrap resamples of families: the same for every checkpoint."""


@one_thread()
def readout_table(
    steps: Sequence[int],
    acts: Sequence[Activations],
    concept: TrackedConcept,
    split: Split,
    floor: Mapping[str, Float[Tensor, "level position"]],
    *,
    seed: int,
    resamples: int,
    random_directions: int,
) -> pd.DataFrame:
    """One row for each readout, checkpoint, level and position; the first checkpoint is the reference.

    `frozen` is the AUROC of the base's line, `own` that of the one fitted here, each number with its bounds (`_low`,
    `_high`). Beside them `random_blocks`, what is fitted on an untrained network reaches (`floor`, by kind), and the
    mean and maximum of random directions, each folded to max(a, 1 - a).
    """
    frames = []
    for kind in KINDS:
        frozen = fit_readouts(concept.relabelled(acts[0]), concept.contrast, split, kind)
        for step, part in zip(steps, acts, strict=True):
            labelled = concept.relabelled(part)
            test = _test_part(labelled, concept.contrast, split, seed, resamples)
            columns = _columns(frozen, labelled, concept.contrast, split, test)
            columns |= _random(test, random_directions, seed)
            if kind in floor:
                columns["random_blocks"] = floor[kind]
            frames.append(_frame(columns, test).assign(kind=kind, step=step))
    return pd.concat(frames, ignore_index=True).assign(concept=concept.name)


def _test_part(acts: Activations, contrast: tuple[str, str], split: Split, seed: int, resamples: int) -> _Test:
    test = contrast_part(acts, split.test, contrast)
    weights = sample_and_resamples(test.families, resamples, seed, test.labels)
    return _Test(test, is_positive(test, contrast), weights)


def _columns(
    frozen: Readouts, acts: Activations, contrast: tuple[str, str], split: Split, test: _Test
) -> dict[str, Float[Tensor, "level position"]]:
    refitted = fit_lines(acts, contrast, split, frozen.kind)
    again = thresholds(frozen.lines, acts, contrast, split)
    scores = score_grid(test.acts, frozen.lines)
    columns: dict[str, Tensor] = {}
    for name, values in (("frozen", scores), ("own", score_grid(test.acts, refitted))):
        bounds = auroc_bounds(values, test.positive, test.acts.families)
        columns |= {name: auroc(values, test.positive), f"{name}_low": bounds.low, f"{name}_high": bounds.high}
    draws = (
        balanced_accuracy(scores, frozen.thresholds, test.positive, test.weights),
        balanced_accuracy(scores, again, test.positive, test.weights),
        brier(frozen.probability(scores), test.positive, test.weights),
    )
    for name, drawn in zip(MEASURES, draws, strict=True):
        bounds = interval(drawn[..., 1:])
        columns |= {name: drawn[..., 0], f"{name}_low": bounds.low, f"{name}_high": bounds.high}
    return columns


def _random(test: _Test, n: int, seed: int) -> dict[str, Float[Tensor, "level position"]]:
    generator = torch.Generator().manual_seed(seed + 11)
    lines = torch.randn(test.acts.values.shape[-1], n, generator=generator, dtype=torch.float64)
    areas = torch.empty(*test.acts.values.shape[1:3], n, dtype=torch.float64)
    for row, column, values in test.acts.cells():
        exact = values.double()
        # Prompts that share one vector differ in the last bits of a product, and would be told apart by them.
        scores = snap((exact @ lines).T, TIE_RESOLUTION * largest_norm(exact) * lines.norm(dim=0))
        areas[row, column] = auroc(scores, test.positive)
    folded = torch.maximum(areas, 1 - areas)
    return {"random_mean": folded.mean(dim=-1), "random_maximum": folded.amax(dim=-1)}


def _frame(columns: dict[str, Tensor], test: _Test) -> pd.DataFrame:
    acts = test.acts
    where: dict[str, object] = {
        "level": np.repeat(acts.levels, len(acts.positions)),
        "position": list(acts.positions) * len(acts.levels),
    }
    return pd.DataFrame(where | {name: v.flatten().numpy() for name, v in columns.items()}).assign(n=len(acts.ids))


@one_thread()
def transfer_table(
    steps: Sequence[int], acts: Sequence[Activations], concept: TrackedConcept, split: Split
) -> pd.DataFrame:
    """A[s, t] of the mean difference at each position's chosen level, with bounds: one row for s, t and position."""
    labelled = [concept.relabelled(part) for part in acts]
    lines = [fit_lines(part, concept.contrast, split, "direction") for part in labelled]
    rows = []
    for step, part in zip(steps, labelled, strict=True):
        test = contrast_part(part, split.test, concept.contrast)
        positive = is_positive(test, concept.contrast)
        for fitted, line in zip(steps, lines, strict=True):
            for position in part.positions:
                level = concept.level(position)
                cell = replace(line, checkpoint=part.checkpoint).at(level, position)
                scores = test.at(level, position).double() @ cell.vector.double()
                area = auroc_estimate(scores, positive, test.families)
                where = {"fitted": fitted, "tested": step, "position": position, "level": level}
                rows.append({**where, **area.row("auroc")})
    return pd.DataFrame(rows).assign(concept=concept.name)
