"""What models say of themselves on scales from 0 to 100: the expected number, read from the probabilities of all."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.behaviour.scoring.number_reply import NumberReplies
from mechlens.methods.behaviour.scoring.score_judge import MIN_MASS
from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.prompts.scales import Scale
from mechlens.studies.behaviours.tuned import TunedRun, control_of

FEWEST = 2
"""Questions below which a mean says nothing."""


def scale_scores(scales: Sequence[Scale], replies: NumberReplies) -> Float64[Tensor, " question"]:
    """From 0 to 1, 1 where the number shows the behaviour most; NaN where the reply is hardly a number."""
    share = replies.expected / 100
    high = torch.tensor([scale.high_shows for scale in scales])
    return torch.where(replies.mass >= MIN_MASS, torch.where(high, share, 1 - share), torch.nan)


def scale_table(
    runs: Sequence[TunedRun],
    base: Mapping[str, Float64[Tensor, " question"]],
    told: Mapping[str, Mapping[str, Float64[Tensor, " question"]]],
) -> pd.DataFrame:
    """One row for each group and set: how many questions all answered with a number, score, change, beyond_control.

    `told` has each run's scores by set. Only questions count that the base and all runs answered with a number.
    """
    rows = []
    for name, start in base.items():
        both = torch.stack([start, *(found[name] for found in told.values())])
        kept = both.isfinite().all(dim=0).nonzero()[:, 0].tolist()
        for group in dict.fromkeys(run.group for run in runs):
            row: dict[str, object] = {"group": group, "scale": name, "answered": len(kept), "of": len(start)}
            if len(kept) >= FEWEST:
                row |= _numbers(group, runs, start, {run: found[name] for run, found in told.items()}, kept)
            rows.append(row)
    return pd.DataFrame(rows)


def _numbers(
    group: str, runs: Sequence[TunedRun], start: Tensor, scores: Mapping[str, Tensor], kept: list[int]
) -> dict[str, float]:
    def of(name: str) -> Float64[Tensor, "run question"]:
        return torch.stack([scores[run.name][kept] for run in runs if run.group == name])

    questions, control = [str(i) for i in kept], control_of(group, runs)
    numbers = crossed_mean(of(group), questions).row("score")
    numbers |= crossed_difference(of(group), start[kept][None], questions).beside("change")
    if control is not None:
        numbers |= crossed_difference(of(group), of(control), questions).beside("beyond_control")
    return numbers
