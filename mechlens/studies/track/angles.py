"""How far a concept's direction has turned: cosines to the base's and to the previous checkpoint's, without noise."""

from collections.abc import Sequence

import pandas as pd
import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.statistics.effects import CosineCurve, Effect, cosine_curve
from mechlens.methods.statistics.one_thread import one_thread
from mechlens.studies.track.reference import Concept


@one_thread()
def angle_table(steps: Sequence[int], acts: Sequence[Activations], concept: Concept, *, seed: int) -> pd.DataFrame:
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


def _effect(acts: Activations, column: int, concept: Concept) -> Effect:
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
            "corrected": curve.corrected[k].value,
            "corrected_low": curve.corrected[k].low,
            "corrected_high": curve.corrected[k].high,
            "reliability": curve.reliability_first[k],
            "other_reliability": curve.reliability_second[k],
            "norm": norms[k],
            "norm_ratio": ratios[k],
            "n": curve.measured[k].n,
        }
        for k, level in enumerate(curve.levels)
    ]
