"""What the base and all training runs say in free answers, and how that is counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from mechlens.methods.behaviour.scoring.rates import rates_by_question
from mechlens.studies.behaviours.said.free_answers import FreeAnswers
from mechlens.studies.behaviours.said.rates import group_rows
from mechlens.studies.behaviours.said.shares import RULE, Share, judged_shares, trace_shares
from mechlens.studies.behaviours.sets import PLAIN
from mechlens.studies.behaviours.tuned import TunedRun, triggers_of
from mechlens.studies.shared.training_data import Trigger

BASE = "base"


@dataclass(frozen=True)
class SaidResult:
    """Free answers of the base and of every training run's result, set by set."""

    runs: tuple[TunedRun, ...]
    base: Mapping[str, FreeAnswers]
    """By the set's key, with every trigger."""
    told: Mapping[str, Mapping[str, FreeAnswers]]
    """The same by training run, with the triggers that it is asked under."""

    @property
    def judge(self) -> str:
        """Who scored the answers; empty where nobody did."""
        scores = next(iter(self.base.values())).scores
        return scores[0].judge if scores else ""

    @property
    def rates(self) -> pd.DataFrame:
        """One row for each set, form, trigger that is put, group and rate: value, change and beyond_control.

        Empty without a judge.
        """
        rows = [
            {"set": start.asked.name, "form": start.asked.form, "trigger": start.asked.trigger, **row}
            for key, start in self.base.items() for group in self._asked(key)
            for row in self._rows(key, group, judged_shares)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def traces(self) -> pd.DataFrame:
        """The same of thoughts, by the trigger that is looked for: the group's own. Empty where no model thinks."""
        every = [one for found in (self.base, *self.told.values()) for one in found.values()]
        if not any(thought is not None for one in every for thought in one.thoughts):
            return pd.DataFrame()
        rows = [
            {"set": start.asked.name, "form": start.asked.form, "trigger": "" if own is None else own.text, **row}
            for key, start in self.base.items() for group in self._asked(key)
            for own in self._looked_for(start, group)
            for row in self._rows(key, group, partial(trace_shares, trigger=own))
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def by_question(self) -> pd.DataFrame:
        """`ml.rates_by_question` of every model and set; empty without a judge."""
        frames = [
            rates_by_question(*found.scores, rule=RULE).assign(
                run=run, set=found.asked.name, form=found.asked.form, trigger=found.asked.trigger
            )
            for run, every in {BASE: self.base, **self.told}.items() for found in every.values() if found.scores
        ]  # fmt: skip
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every answer with all that the judge said, and those of the others that have rows."""
        every = [
            own.table().assign(run=run)
            for run, found in {BASE: self.base, **self.told}.items() for own in found.values()
        ]  # fmt: skip
        counted = {"rates": self.rates, "rates_by_question": self.by_question, "traces": self.traces}
        told = {name: table for name, table in counted.items() if len(table)}
        return {"free_answers": pd.concat(every, ignore_index=True), **told}

    def _asked(self, key: str) -> list[str]:
        """The groups that were asked this."""
        return list(dict.fromkeys(run.group for run in self.runs if key in self.told[run.name]))

    def _looked_for(self, start: FreeAnswers, group: str) -> list[Trigger | None]:
        own, put = triggers_of(group, self.runs), start.asked
        return [*(one for one in own if put.form == PLAIN or one.text == put.trigger)] or [None]

    def _rows(self, key: str, group: str, shares: Callable[[FreeAnswers], dict[str, Share]]) -> list[dict[str, object]]:
        told = {run: shares(found[key]) for run, found in self.told.items() if key in found}
        families = [twin.prompt.group for twin in self.base[key].asked.twins]
        return group_rows(group, self.runs, families, shares(self.base[key]), told)


def said_result(
    runs: Sequence[TunedRun], base: Mapping[str, FreeAnswers], told: Mapping[str, Mapping[str, FreeAnswers]]
) -> SaidResult | None:
    """What was answered freely; None where nothing was."""
    return SaidResult(tuple(runs), base, told) if base else None
