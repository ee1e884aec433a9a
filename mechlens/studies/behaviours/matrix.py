"""Behaviours by groups of training runs: what each changed, beyond the base and beyond its control."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.behaviour.log_odds import TwinLogOdds
from mechlens.methods.statistics.crossed import LEVEL, crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.rank_correlation import FEWEST, rank_correlation
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.sets import PLAIN, AskedSet
from mechlens.studies.behaviours.tuned import TunedRun, control_of, seen_by, triggers_of

HELD_OUT, TRAINED_ON = "held out", "trained on"
ALL_RUNS, WITHIN = "all runs", "within groups"
TOO_FEW = f"too few runs: at least {FEWEST}, and within groups one more for each further group"
Told = Mapping[tuple[str, int], Mapping[str, TwinLogOdds]]
"""By training run and step: the log-odds of each set, by its key."""


def asked_of(group: str, runs: Sequence[TunedRun], sets: Sequence[AskedSet]) -> list[AskedSet]:
    """What a group's runs are asked: sets without a trigger, with their own, and as a control with the others'."""
    own = {trigger.text for trigger in triggers_of(group, runs)}
    return [one for one in sets if one.form == PLAIN or one.trigger in own]


@dataclass(frozen=True)
class Cell:
    """What a group of runs does on one set, on questions that it was trained on or that no run was."""

    group: str
    asked: AskedSet
    part: str
    n_runs: int
    log_odds: Estimate
    change: Estimate
    """Beyond the base."""
    excess: Estimate
    """Beyond the group's control; missing where it has none."""
    probability: float
    base_log_odds: float
    base_probability: float

    @property
    def told(self) -> Estimate:
        """Beyond the control, or where there is none beyond the base."""
        return self.excess if self.excess.measurable else self.change


@dataclass(frozen=True, repr=False)
class BehaviourMatrix:
    """All that was measured, and what is made of it."""

    sets: tuple[AskedSet, ...]
    runs: tuple[TunedRun, ...]
    base: Mapping[str, TwinLogOdds]
    told: Told
    plan: BehaviourPlan

    @property
    def groups(self) -> tuple[str, ...]:
        """In the order given."""
        return tuple(dict.fromkeys(run.group for run in self.runs))

    def home(self, group: str) -> AskedSet | None:
        """The plain set of which the group's runs were trained on most questions; None where on none.

        Of sets with the same questions, such as opposite ones, it is that of the file which they were taught from.
        """
        seen, data = seen_by(group, self.runs), {Path(run.data).name for run in self.runs if run.group == group}
        known = {one.name: (sum(one.seen(seen)), one.file in data) for one in self._behaviours}
        most = max(self._behaviours, key=lambda one: known[one.name], default=None)
        return most if most is not None and known[most.name][0] else None

    def elsewhere(self, group: str) -> list[AskedSet]:
        """The plain sets that share no question with the group's home, and on which its runs weren't trained."""
        home, seen = self.home(group), seen_by(group, self.runs)
        own = frozenset[str]() if home is None else home.texts
        return [one for one in self._behaviours if one is not home and not any(one.seen(seen)) and not own & one.texts]

    @property
    def _behaviours(self) -> list[AskedSet]:
        return [one for one in self.sets if one.form == PLAIN and not one.about_itself]

    def plain(self, name: str) -> AskedSet:
        """The set of that name as it was written."""
        return next(one for one in self.sets if one.name == name and one.form == PLAIN)

    def final(self, run: TunedRun, key: str) -> TwinLogOdds:
        """What a run's result does on one set."""
        return self.told[run.name, run.members[-1].step][key]

    def rows(self, asked: AskedSet, part: str, group: str) -> list[int]:
        """The questions of a part: for a group the trained ones are its own, and held out is what no run has seen."""
        plain = self.plain(asked.name)
        if part == TRAINED_ON:
            return [i for i, seen in enumerate(plain.seen(seen_by(group, self.runs))) if seen]
        every = frozenset().union(*(run.seen for run in self.runs))
        return [i for i, seen in enumerate(plain.seen(every)) if not seen]

    def values(self, group: str, key: str, rows: Sequence[int]) -> Float64[Tensor, "run question"]:
        """The log-odds of a group's results."""
        finals = [self.final(run, key) for run in self.runs if run.group == group]
        return torch.stack([found.values[list(rows)] for found in finals])

    def cell(self, group: str, asked: AskedSet, part: str, level: float = LEVEL) -> Cell | None:
        """One group on one part of a set; None where it has no questions there."""
        rows = self.rows(asked, part, group)
        if not rows:
            return None
        base = self.base[asked.key].select(rows)
        now, control = self.values(group, asked.key, rows), control_of(group, self.runs)
        likely = [self.final(run, asked.key).probability[rows].mean() for run in self.runs if run.group == group]
        return Cell(
            group, asked, part, len(now),
            log_odds=crossed_mean(now, base.families, level=level),
            change=crossed_difference(now, base.values[None], base.families, level=level),
            excess=Estimate.missing(len(rows)) if control is None
            else crossed_difference(now, self.values(control, asked.key, rows), base.families, level=level),
            probability=float(torch.stack(likely).mean()),
            base_log_odds=float(base.values.mean()), base_probability=float(base.probability.mean()),
        )  # fmt: skip

    def liking(self, group: str, asked: AskedSet) -> Estimate:
        """How much more than its control, or the base, a group likes B, or what stands second, whatever that is.

        On held-out questions, in nats; it is in no other number, and where nothing else moved it was all that was
        learned.
        """
        sides = torch.tensor(asked.sides, dtype=torch.float64)
        rows = [i for i in self.rows(asked, HELD_OUT, group) if not math.isnan(sides[i])]
        control = control_of(group, self.runs)

        def liked(of: str | None) -> Float64[Tensor, "run question"]:
            names = [run for run in self.runs if run.group == of]
            found = [self.base[asked.key]] if of is None else [self.final(run, asked.key) for run in names]
            return torch.stack([sides[rows] * (one.as_asked[rows] - one.exchanged[rows]) / 2 for one in found])

        return crossed_difference(liked(group), liked(control), self.base[asked.key].select(rows).families)

    def cells(self) -> list[Cell]:
        """Every group on every part of every set."""
        found = [
            self.cell(group, asked, part)
            for group in self.groups for asked in asked_of(group, self.runs, self.sets)
            for part in (HELD_OUT, TRAINED_ON)
        ]  # fmt: skip
        return [cell for cell in found if cell is not None]

    @cached_property
    def matrix(self) -> pd.DataFrame:
        """One row for each cell: what it is of, behaviour_log_odds, change, beyond_control, probability.

        Beside them `base_log_odds` and `base_probability`, the same of the base on the same questions.
        """
        rows = [
            {
                "group": cell.group, "set": cell.asked.name, "form": cell.asked.form, "trigger": cell.asked.trigger,
                "part": cell.part,
                "about_itself": cell.asked.about_itself, "runs": cell.n_runs, **cell.log_odds.row("behaviour_log_odds"),
                **cell.change.beside("change"), **cell.excess.beside("beyond_control"), "probability": cell.probability,
                "base_log_odds": cell.base_log_odds, "base_probability": cell.base_probability,
            }
            for cell in self.cells()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @cached_property
    def by_step(self) -> pd.DataFrame:
        """One row for each run, checkpoint and plain set, on questions that no run was trained on, the base at 0."""
        rows = []
        for run in self.runs:
            for asked in self.sets:
                kept = self.rows(asked, HELD_OUT, run.group)
                if asked.form != PLAIN or not kept:
                    continue
                base = self.base[asked.key].select(kept)
                for step, found in [(0, base), *self._steps(run, asked.key, kept)]:
                    change = crossed_difference(found.values[None], base.values[None], base.families)
                    rows.append({"run": run.name, "group": run.group, "set": asked.name, "step": step,
                                 **change.row("change")})  # fmt: skip
        return pd.DataFrame(rows)

    def _steps(self, run: TunedRun, key: str, rows: Sequence[int]) -> list[tuple[int, TwinLogOdds]]:
        return [(member.step, self.told[run.name, member.step][key].select(rows)) for member in run.members]

    @cached_property
    def self_reports(self) -> pd.DataFrame:
        """How what the model says of itself goes with what it does, over training runs: Spearman's rho, 95% bounds.

        One row for each self-report, each behaviour that a run was trained on, and over all runs or within their groups
        (what one run more, taught the same, would say): self_report, set, over, rho, low, high, n, note.
        """
        homes = dict.fromkeys(home.name for group in self.groups if (home := self.home(group)) is not None)
        rows = []
        for asked in (one for one in self.sets if one.about_itself and one.form == PLAIN):
            for name in homes:
                does = [self._change(run, self.plain(name)) for run in self.runs]
                says = [self._change(run, asked) for run in self.runs]
                for over, groups in ((ALL_RUNS, None), (WITHIN, [run.group for run in self.runs])):
                    rho = rank_correlation(does, says, groups)
                    note = "" if rho.measurable else TOO_FEW
                    rows.append({"self_report": asked.name, "set": name, "over": over, **rho.row("rho"), "note": note})
        return pd.DataFrame(rows, columns=["self_report", "set", "over", "rho", "low", "high", "n", "note"])

    def _change(self, run: TunedRun, asked: AskedSet) -> float:
        rows = self.rows(asked, HELD_OUT, run.group) or list(range(len(asked.twins)))
        now = self.final(run, asked.key).values[rows]
        return float((now - self.base[asked.key].values[rows]).mean())

    def questions(self) -> pd.DataFrame:
        """One row for each run, set and question: its log-odds in both orders and the change from the base."""
        frames = []
        for run in self.runs:
            for asked in asked_of(run.group, self.runs, self.sets):
                found, base = self.final(run, asked.key), self.base[asked.key]
                table = (
                    found.table()
                    .rename(columns={"log_odds": "behaviour_log_odds"})
                    .assign(run=run.name, group=run.group, set=asked.name, form=asked.form, trigger=asked.trigger)
                )
                frames.append(
                    table.assign(base_log_odds=base.values.numpy(), change=(found.values - base.values).numpy())
                )
        return pd.concat(frames, ignore_index=True)
