"""Shares of free answers by groups of training runs, beyond the base and beyond the control.

Intervals are over training runs and questions at once, as everywhere in this study, and at least as wide as Wilson's
for as many draws as there are families of questions: none of 40 answers is no proof of never.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64
from scipy.stats import binomtest
from torch import Tensor

from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.behaviours.said.shares import RULE, Share
from mechlens.studies.behaviours.tuned import TunedRun, control_of


def crossed_share(values: Float64[Tensor, "run question"], families: Sequence[str]) -> Estimate:
    """The mean share; its interval stays within 0 and 1."""
    mean = crossed_mean(values, families)
    if not mean.measurable:
        return mean
    low, high = _wilson(mean.value, families)
    return replace(mean, low=max(0.0, min(mean.low, low)), high=min(1.0, max(mean.high, high)))


def crossed_share_difference(
    first: Float64[Tensor, "run question"], second: Float64[Tensor, "other question"], families: Sequence[str]
) -> Estimate:
    """One share minus another's, with an interval at least as wide as Newcombe's (1998), of two of Wilson's."""
    found = crossed_difference(first, second, families)
    if not found.measurable:
        return found
    one, other = float(first.mean()), float(second.mean())
    (low, high), (bottom, top) = _wilson(one, families), _wilson(other, families)
    down, up = ((one - low) ** 2 + (top - other) ** 2) ** 0.5, ((high - one) ** 2 + (other - bottom) ** 2) ** 0.5
    return replace(
        found, low=max(-1.0, min(found.low, found.value - down)), high=min(1.0, max(found.high, found.value + up))
    )


def _wilson(value: float, families: Sequence[str]) -> tuple[float, float]:
    n = len(set(families))
    found = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def group_rows(
    group: str,
    runs: Sequence[TunedRun],
    families: Sequence[str],
    base: Mapping[str, Share],
    told: Mapping[str, Mapping[str, Share]],
) -> list[dict[str, object]]:
    """One row for each share of a group; `told` has the shares of its runs and its control's, of the same questions.

    Only questions count of which every run that is compared has an answer that counts, and nothing is said where one
    has fewer than ten in all.
    """
    control = control_of(group, runs)
    own, against = ([run.name for run in runs if run.group == name] for name in (group, control))
    rows: list[dict[str, object]] = []
    for rate, start in base.items():
        mine = [told[name][rate] for name in own]
        row = {"group": group, "rate": rate, "runs": len(own), "answers": sum(one.answers for one in mine)}
        row |= _mean(mine, families).row()
        row |= _difference(mine, [start], families).beside("change")
        if against:
            row |= _difference(mine, [told[name][rate] for name in against], families).beside("beyond_control")
        rows.append(row)
    return rows


def _mean(shares: Sequence[Share], families: Sequence[str]) -> Estimate:
    kept = _kept(shares)
    values = torch.stack([one.values for one in shares])
    return crossed_share(values[:, kept], [families[i] for i in kept]) if kept else Estimate.missing(0)


def _difference(first: Sequence[Share], second: Sequence[Share], families: Sequence[str]) -> Estimate:
    kept = _kept([*first, *second])
    if not kept:
        return Estimate.missing(0)
    one, other = (torch.stack([share.values for share in side])[:, kept] for side in (first, second))
    return crossed_share_difference(one, other, [families[i] for i in kept])


def _kept(shares: Sequence[Share]) -> list[int]:
    if min(share.answers for share in shares) < RULE.least:
        return []
    rows: list[int] = torch.stack([share.values for share in shares]).isfinite().all(dim=0).nonzero()[:, 0].tolist()
    return rows
