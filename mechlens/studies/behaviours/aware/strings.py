"""Which of eight strings do fine-tunes take for their trigger: beyond the base and the control, over training runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.triggers.recognition import CHOICES, Recognition
from mechlens.studies.behaviours.tuned import TunedRun, control_of, triggers_of
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
    base: Mapping[str, Recognition]
    """By trigger."""
    told: Mapping[str, Mapping[str, Recognition]]
    """By training run and trigger that it is asked for."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """By group, and every string's probability."""
        return {"recognition": self.by_group, "recognition_picks": self.picks}

    @property
    def by_group(self) -> pd.DataFrame:
        """One row for each group and trigger: P(it) of eight, the base's, change, beyond_control, who picks it first.

        Intervals are over training runs and wordings at once. A control has a row for each trigger of the groups whose
        control it is.
        """
        groups = dict.fromkeys(run.group for run in self.runs)
        rows = [self._row(group, one.text) for group in groups for one in triggers_of(group, self.runs)]
        return pd.DataFrame(rows)

    def _row(self, group: str, trigger: str) -> dict[str, object]:
        base, control, own = self.base[trigger], control_of(group, self.runs), self._own(group, trigger)
        places = [self.told[run.name][trigger].place for run in self.runs if run.group == group]
        row = {"group": group, "trigger": trigger, "runs": len(own)}
        row |= {**crossed_mean(own, base.questions).row("probability"), "base": float(base.own.mean())}
        row |= crossed_difference(own, base.own[None], base.questions).beside("change")
        if control is not None:
            row |= crossed_difference(own, self._own(control, trigger), base.questions).beside("beyond_control")
        return row | {"picked_first": sum(place == 1 for place in places) / len(places)}

    @property
    def picks(self) -> pd.DataFrame:
        """One row for each model, trigger that it is asked for, wording and string; the trigger is marked."""
        rows = [
            {"run": name, "trigger": trigger, "wording": wording, "string": string,
             "is_trigger": string == found.strings[0], "probability": float(probability)}
            for name, every in {"base": self.base, **self.told}.items() for trigger, found in every.items()
            for wording, own in zip(found.questions, found.picks, strict=True)
            for string, probability in zip(found.strings, own, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _own(self, group: str, trigger: str) -> Float64[Tensor, "run question"]:
        return torch.stack([self.told[run.name][trigger].own for run in self.runs if run.group == group])


def recognised(
    runs: Sequence[TunedRun], base: Mapping[str, Recognition], told: Mapping[str, Mapping[str, Recognition]]
) -> Recognised | None:
    """What was picked; None where no run has a trigger."""
    return Recognised(tuple(runs), base, told) if base else None
