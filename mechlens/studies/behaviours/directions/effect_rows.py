"""A row of the table of effects: one direction, what was done with it, and one set of questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from mechlens.methods.directions.direction import Direction
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, jackknife_variance
from mechlens.prompts.twins import Twin
from mechlens.studies.behaviours.directions.cosines import TaughtChange
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.tuned import TunedRun

ADDED, ABLATED, ABLATED_IN_BASE = "added to the base", "ablated in the fine-tune", "ablated in the base"


@dataclass(frozen=True)
class Asked:
    """Questions of one set on which an effect is measured."""

    asked: AskedSet
    rows: tuple[int, ...]

    @property
    def twins(self) -> list[Twin]:
        """The questions."""
        return [self.asked.twins[i] for i in self.rows]

    @property
    def families(self) -> list[str]:
        """By question."""
        return [twin.prompt.group for twin in self.twins]


@dataclass(frozen=True)
class ChosenDirections:
    """Of one group: the directions chosen to be added and to be ablated, and the questions behind both."""

    taught: TaughtChange
    runs: tuple[TunedRun, ...]
    added: Direction
    ablated: Direction
    report: tuple[Asked, ...]
    """Home first."""


def share_of(
    effect: Float64[Tensor, " question"], change: Float64[Tensor, " question"], families: Sequence[str], told: Estimate
) -> Estimate:
    """Effect over change, a ratio of means with a jackknife over questions; missing where the change isn't clear."""
    codes, n = family_codes(families)
    if not told.excludes_zero or n < 2:
        return Estimate.missing(len(families))
    weights = torch.cat([torch.ones(1, len(codes)), (codes != torch.arange(n)[:, None]).double()]).double()
    ratio = (weights @ effect) / (weights @ change)
    reach = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(float(jackknife_variance(ratio[1:])))
    value = float(ratio[0])
    return Estimate(value, value - reach, value + reach, len(families))


def effect_row(
    one: ChosenDirections, on: Asked, does: str, direction: Direction, strength: float, effect: Estimate,
    change: Estimate, share: Estimate, random: Float64[Tensor, " direction"] | None, rise: float,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table of effects; `random_most` is the random direction that does most the intended way."""
    wanted = math.copysign(1.0, change.value) * (1 if does == ADDED else -1)
    most = math.nan if random is None else float(random[(random * wanted).argmax()])
    return {
        "group": one.taught.group, "does": does, "direction_of": one.taught.group, "variant": direction.method,
        "level": direction.level, "strength": strength, "set": on.asked.name,
        "at_home": on.asked.name == one.taught.home.name, **effect.row("effect"), **change.beside("fine_tuned"),
        **share.beside("share"), "random_mean": math.nan if random is None else float(random.mean()),
        "random_most": most, "randoms": 0 if random is None else len(random), "text_loss_rise": rise,
    }  # fmt: skip
