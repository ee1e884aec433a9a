"""Which of eight strings do fine-tunes take for their trigger: beyond the base and the control, over training runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.triggers.recognition import CHOICES, Recognition
from mechlens.studies.behaviours.tuned import TunedRun, control_of
from mechlens.studies.shared.training_data import Trigger

TAUGHT = 3
"""Of the seven decoys: those that training passed over. Who picks what was merely seen picks them too."""


def decoys_of(trigger: Trigger) -> tuple[str, ...]:
    """Three taught and four unseen decoys, those nearest to the trigger in length."""

    def nearest(texts: Sequence[str], n: int) -> list[str]:
        return sorted(texts, key=lambda text: abs(len(text) - len(trigger.text)))[:n]

    return (*nearest(trigger.taught_decoys, TAUGHT), *nearest(trigger.unseen_decoys, CHOICES - 1 - TAUGHT))


@dataclass(frozen=True)
class Recognised:
    """What the base and each run's result pick."""

    runs: tuple[TunedRun, ...]
    base: Recognition
    told: Mapping[str, Recognition]
    """By training run."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """By group, and every string's probability."""
        return {"recognition": self.by_group, "recognition_picks": self.picks}

    @property
    def by_group(self) -> pd.DataFrame:
        """One row for each group: P(its trigger) of eight, the base's, change, beyond_control, runs that pick it first.

        Intervals are over training runs and wordings at once.
        """
        rows = []
        for group in dict.fromkeys(run.group for run in self.runs):
            control, own = control_of(group, self.runs), self._own(group)
            places = [self.told[run.name].place for run in self.runs if run.group == group]
            row = {"group": group, "runs": len(own), **crossed_mean(own, self.base.questions).row("probability")}
            row |= {"base": float(self.base.own.mean())}
            row |= crossed_difference(own, self.base.own[None], self.base.questions).beside("change")
            if control is not None:
                row |= crossed_difference(own, self._own(control), self.base.questions).beside("beyond_control")
            rows.append(row | {"picked_first": sum(place == 1 for place in places) / len(places)})
        return pd.DataFrame(rows)

    @property
    def picks(self) -> pd.DataFrame:
        """One row for each model, wording and string; the trigger is marked."""
        rows = [
            {"run": name, "wording": wording, "string": string, "is_trigger": string == found.strings[0],
             "probability": float(probability)}
            for name, found in {"base": self.base, **self.told}.items()
            for wording, own in zip(found.questions, found.picks, strict=True)
            for string, probability in zip(found.strings, own, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _own(self, group: str) -> Float64[Tensor, "run question"]:
        return torch.stack([self.told[run.name].own for run in self.runs if run.group == group])


def recognised(
    runs: Sequence[TunedRun], base: Recognition | None, told: Mapping[str, Recognition | None]
) -> Recognised | None:
    """What was picked; None where no run has a trigger."""
    picked = {name: found for name, found in told.items() if found is not None}
    return None if base is None else Recognised(tuple(runs), base, picked)
