"""What fine-tuning changed in each matrix, and whether it points along the concepts' directions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.geometry.edits import MatrixEdit, matrix_edit
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.effects import CosineCurve, Effect, cosine_curve
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept


@one_thread()
def angle_table(
    steps: Sequence[int], acts: Sequence[Activations], concept: TrackedConcept, *, seed: int
) -> pd.DataFrame:
    """One row for each checkpoint, other (reference, previous), level and position.

    `cosine` is as measured: prompts that both directions share inflate it. `corrected` comes from pairs of distinct
    prompt families only, and is divided by both directions' noise; `reliability` is the split-half cosine of the
    checkpoint's own direction. Jackknife intervals by family; all prompts count, since nothing here is scored.
    """
    rows = []
    for column, position in enumerate(acts[0].positions):
        effects = [_effect(found, column, concept) for found in acts]
        for k in range(1, len(steps)):
            others = {"reference": 0, "previous": k - 1}
            for name, j in others.items():
                if name == "previous" and j == 0:
                    continue  # the same as the reference
                curve = cosine_curve(effects[k], effects[j], acts[0].families, acts[0].levels, seed=seed)
                own, other = effects[k].norms(), effects[j].norms()
                # Where all prompts share a vector there is no direction, and no ratio.
                ratios = torch.where(other > 0, own / other, torch.nan).tolist()
                where: dict[str, int | str] = {"step": steps[k], "other": name, "to": steps[j], "position": position}
                rows += _rows(curve, ratios, own.tolist(), where)
    return pd.DataFrame(rows).assign(concept=concept.name)


def _effect(acts: Activations, column: int, concept: TrackedConcept) -> Effect:
    positive, negative = concept.contrast
    return Effect(acts.values[:, :, column], concept.labels, {positive: 1.0, negative: -1.0})


def _rows(
    curve: CosineCurve, ratios: list[float], norms: list[float], where: dict[str, int | str]
) -> list[dict[str, float | int | str]]:
    return [
        {
            **where,
            "level": level,
            "cosine": curve.measured[k].value,
            "low": curve.measured[k].low,
            "high": curve.measured[k].high,
            **curve.corrected[k].beside("corrected"),
            "reliability": curve.reliability_first[k],
            "other_reliability": curve.reliability_second[k],
            "norm": norms[k],
            "norm_ratio": ratios[k],
            "n": curve.measured[k].n,
        }
        for k, level in enumerate(curve.levels)
    ]


def matrix_rows(
    series: CheckpointSwapper, member: Member, reference: BaseReference, random_directions: int
) -> tuple[Mapping[str, Any], ...]:
    """One row for each changed linear layer of the blocks; the member's weights must be in place.

    Columns module, layer, side, norm, stable_rank, share, and for each concept `cos_CONCEPT`: the largest |cosine| of a
    leading singular direction with the base's direction at the concept's home. A matrix that writes to the residual
    stream is compared by what it writes with the direction at the level after its block, any other by what it
    reads with the direction at its block's own level. `random`: the same for the best of random directions.
    """
    low_rank = series.changes(member) if member.kind == "adapter" else None
    sides = series.linears()
    rows = []
    for module in progress_bar([m for m in sides if low_rank is None or m in low_rank], title="weights"):
        change = matrix_edit(series.difference(module) if low_rank is None else low_rank[module])
        if change.norm > 0:
            rows.append(_row(module, "writes" if sides[module] else "reads", change, reference, random_directions))
    return tuple(rows)


def _row(
    module: str, side: str, change: MatrixEdit, reference: BaseReference, random_directions: int
) -> dict[str, Any]:
    layer = int(match[1]) if (match := re.search(r"\.(\d+)\.", module)) else -1
    leading = change.outputs if side == "writes" else change.inputs
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(random_directions, len(leading), generator=generator, dtype=torch.float64)
    row = {
        "module": module,
        "layer": layer,
        "side": side,
        "norm": change.norm,
        "stable_rank": change.stable_rank,
        "share": change.share,
        "random": _nearest(random, leading),
    }
    for concept in reference.measurable:
        assert concept.detection is not None
        grid = concept.detection.directions
        level = layer + 1 if side == "writes" else layer
        if level in grid.levels and len(leading) == grid.vectors.shape[-1]:
            row[f"cos_{concept.name}"] = _nearest(grid.at(level, concept.home).vector.double()[None], leading)
    return row


def _nearest(vectors: Float[Tensor, "vector d"], leading: Float[Tensor, "d leading"]) -> float:
    """Largest |cosine| between any vector and any of the orthonormal leading directions."""
    return float((torch.nn.functional.normalize(vectors, dim=1) @ leading.double()).abs().max())
