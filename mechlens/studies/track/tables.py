"""How the base's readouts do on later checkpoints, cell by cell: frozen, refitted, and passed on between any two.

A[s, t] is the AUROC of the direction fitted at checkpoint s on the test prompts of checkpoint t.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.nulls import TIE_RESOLUTION
from mechlens.methods.probing.auroc import auroc, snap
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
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import interval, of_sample, one_thread, sample_and_resamples
from mechlens.prompts.split import Split
from mechlens.studies.track.measures.reference import TrackedConcept

MEASURES = ("frozen", "own", "accuracy", "recalibrated", "brier")
"""AUROC of the base's line and of the refitted one; accuracy at the frozen threshold and at one chosen anew; Brier."""
CHANGES = {
    "own_change": ("own", "own"),
    "frozen_change": ("frozen", "frozen"),
    "readout_gap": ("frozen", "own"),
    "threshold_gap": ("accuracy", "recalibrated"),
}
"""Paired differences: the first two from the base (same prompts), the last two within a checkpoint."""


@dataclass(frozen=True)
class ReadoutRows:
    """All numbers of one concept, readout, checkpoint, level and position."""

    row: "pd.Series[float]"

    def __getitem__(self, name: str) -> Estimate:
        n = int(self.row["n"])
        value = float(self.row[name])
        if np.isnan(value):
            return Estimate.missing(n)
        return Estimate(value, float(self.row[f"{name}_low"]), float(self.row[f"{name}_high"]), n)


@dataclass(frozen=True)
class _Test:
    """The test prompts of one checkpoint under one concept."""

    acts: Activations
    positive: Bool[Tensor, " prompt"]
    weights: Float[Tensor, "draw prompt"]
    """The sample itself first, then bootstrap resamples of families: the same for every checkpoint."""


@one_thread()
def readout_table(
    steps: Sequence[int], acts: Sequence[Activations], concept: TrackedConcept, split: Split, *, seed: int,
    resamples: int,
    random_directions: int,
) -> pd.DataFrame:  # fmt: skip
    """One row for each readout, checkpoint, level and position; the first checkpoint is the reference.

    Every number has its bounds (`_low`, `_high`), from one set of family resamples, so that differences are paired.
    Beside them the mean and maximum of random directions, each folded to max(a, 1 - a).
    """
    frames = []
    for kind in KINDS:
        frozen = fit_readouts(concept.relabelled(acts[0]), concept.contrast, split, kind)
        base: dict[str, Tensor] | None = None
        for step, part in zip(steps, acts, strict=True):
            labelled = concept.relabelled(part)
            test = _test_part(labelled, concept.contrast, split, seed, resamples)
            values = _measured(frozen, labelled, concept.contrast, split, test)
            base = base or values
            random = _random(test, random_directions, seed)
            frames.append(_frame(values, base, random, test).assign(kind=kind, step=step))
    return pd.concat(frames, ignore_index=True).assign(concept=concept.name)


def _test_part(acts: Activations, contrast: tuple[str, str], split: Split, seed: int, resamples: int) -> _Test:
    test = contrast_part(acts, split.test, contrast)
    weights = sample_and_resamples(test.families, resamples, seed, test.labels)
    return _Test(test, is_positive(test, contrast), weights)


def _measured(
    frozen: Readouts, acts: Activations, contrast: tuple[str, str], split: Split, test: _Test
) -> dict[str, Float[Tensor, "level position draw"]]:
    refitted = fit_lines(acts, contrast, split, frozen.kind)
    again = thresholds(frozen.lines, acts, contrast, split)
    scores = score_grid(test.acts, frozen.lines)
    return {
        "frozen": auroc(scores, test.positive, test.weights),
        "own": auroc(score_grid(test.acts, refitted), test.positive, test.weights),
        "accuracy": balanced_accuracy(scores, frozen.thresholds, test.positive, test.weights),
        "recalibrated": balanced_accuracy(scores, again, test.positive, test.weights),
        "brier": brier(frozen.probability(scores), test.positive, test.weights),
    }


def _random(test: _Test, n: int, seed: int) -> dict[str, Float[Tensor, "level position"]]:
    generator = torch.Generator().manual_seed(seed + 11)
    lines = torch.randn(test.acts.values.shape[-1], n, generator=generator, dtype=torch.float64)
    scores = torch.stack([level.double() @ lines for level in test.acts.values.unbind(1)]).permute(0, 2, 3, 1)
    # Prompts that share one vector differ in the last bits of a product, and would be told apart by them.
    longest = test.acts.values.double().norm(dim=-1).amax(dim=0)
    areas = auroc(snap(scores, TIE_RESOLUTION * longest[..., None] * lines.norm(dim=0)), test.positive)
    folded = torch.maximum(areas, 1 - areas)
    return {"random_mean": folded.mean(dim=-1), "random_maximum": folded.amax(dim=-1)}


def _frame(values: dict[str, Tensor], base: dict[str, Tensor], random: dict[str, Tensor], test: _Test) -> pd.DataFrame:
    draws = {name: values[name] for name in MEASURES}
    for name, (one, other) in CHANGES.items():
        draws[name] = values[one] - (base if name.endswith("change") else values)[other]
    acts = test.acts
    columns: dict[str, object] = {
        "level": np.repeat(acts.levels, len(acts.positions)),
        "position": list(acts.positions) * len(acts.levels),
    }
    for name, drawn in draws.items():
        bounds = interval(drawn[..., 1:])
        columns[name] = drawn[..., 0].flatten().numpy()
        columns[f"{name}_low"], columns[f"{name}_high"] = bounds.low.flatten().numpy(), bounds.high.flatten().numpy()
    columns |= {name: value.flatten().numpy() for name, value in random.items()}
    return pd.DataFrame(columns).assign(n=len(acts.ids))


@one_thread()
def transfer_table(
    steps: Sequence[int],
    acts: Sequence[Activations],
    concept: TrackedConcept,
    split: Split,
    *,
    seed: int,
    resamples: int,
) -> pd.DataFrame:
    """A[s, t] of the mean difference at each position's chosen level: columns fitted, tested, position, level, auroc.

    With bounds from test families, the direction frozen.
    """
    labelled = [concept.relabelled(part) for part in acts]
    lines = [fit_lines(part, concept.contrast, split, "direction") for part in labelled]
    rows = []
    for step, part in zip(steps, labelled, strict=True):
        test = _test_part(part, concept.contrast, split, seed, resamples)
        for fitted, line in zip(steps, lines, strict=True):
            for position in part.positions:
                level = concept.level(position)
                cell = replace(line, checkpoint=part.checkpoint).at(level, position)
                scores = test.acts.at(level, position).double() @ cell.vector.double()
                drawn = auroc(scores, test.positive, test.weights)
                where = {"fitted": fitted, "tested": step, "position": position, "level": level}
                rows.append({**where, **of_sample(drawn, len(test.acts.ids)).row("auroc")})
    return pd.DataFrame(rows).assign(concept=concept.name)


def cell_of(table: pd.DataFrame, concept: TrackedConcept, step: int, *, kind: str = "direction") -> ReadoutRows:
    """The numbers at the concept's home position and chosen level."""
    chosen = (table["concept"] == concept.name) & (table["kind"] == kind) & (table["step"] == step)
    chosen &= (table["level"] == concept.level(concept.home)) & (table["position"] == concept.home)
    return ReadoutRows(table[chosen].iloc[0])
