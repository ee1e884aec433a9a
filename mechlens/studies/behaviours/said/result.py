"""What the base and all training runs say in free answers, and how that is counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechlens.methods.behaviour.scoring.rates import rates_by_question
from mechlens.studies.behaviours.said.free_answers import FreeAnswers
from mechlens.studies.behaviours.said.rates import group_rows
from mechlens.studies.behaviours.said.shares import RULE, Share, judged_shares, trace_shares
from mechlens.studies.behaviours.tuned import TunedRun
from mechlens.studies.shared.training_data import Trigger

BASE = "base"


@dataclass(frozen=True)
class SaidResult:
    """Free answers of the base and of every training run's result, set by set."""

    runs: tuple[TunedRun, ...]
    base: tuple[FreeAnswers, ...]
    told: Mapping[str, tuple[FreeAnswers, ...]]
    """By training run, in the order of the base's."""
    trigger: Trigger | None

    @property
    def judge(self) -> str:
        """Who scored the answers; empty where nobody did."""
        scores = self.base[0].scores
        return scores[0].judge if scores else ""

    @property
    def rates(self) -> pd.DataFrame:
        """One row for each set, form, group and rate: value, change and beyond_control; empty without a judge."""
        return self._by_group(judged_shares)

    @property
    def traces(self) -> pd.DataFrame:
        """The same of thoughts; empty where no model thinks."""
        every = [one for found in (self.base, *self.told.values()) for one in found]
        thinks = any(thought is not None for one in every for thought in one.thoughts)
        return self._by_group(lambda found: trace_shares(found, self.trigger)) if thinks else pd.DataFrame()

    @property
    def by_question(self) -> pd.DataFrame:
        """`ml.rates_by_question` of every model and set; empty without a judge."""
        frames = [
            rates_by_question(*found.scores, rule=RULE).assign(run=run, set=found.asked.name, form=found.asked.form)
            for run, every in {BASE: self.base, **self.told}.items() for found in every if found.scores
        ]  # fmt: skip
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every answer with all that the judge said, and those of the others that have rows."""
        every = [
            own.table().assign(run=run) for run, found in {BASE: self.base, **self.told}.items() for own in found
        ]  # fmt: skip
        counted = {"rates": self.rates, "rates_by_question": self.by_question, "traces": self.traces}
        told = {name: table for name, table in counted.items() if len(table)}
        return {"free_answers": pd.concat(every, ignore_index=True), **told}

    def _by_group(self, shares: Callable[[FreeAnswers], Mapping[str, Share]]) -> pd.DataFrame:
        rows = []
        for i, start in enumerate(self.base):
            told = {run: shares(found[i]) for run, found in self.told.items()}
            families = [twin.prompt.group for twin in start.asked.twins]
            own = group_rows(self.runs, families, shares(start), told)
            rows += [{"set": start.asked.name, "form": start.asked.form, **row} for row in own]
        return pd.DataFrame(rows)


def said_result(
    runs: Sequence[TunedRun],
    base: tuple[FreeAnswers, ...],
    told: Mapping[str, tuple[FreeAnswers, ...]],
    trigger: Trigger | None,
) -> SaidResult | None:
    """What was answered freely; None where nothing was."""
    return SaidResult(tuple(runs), base, told, trigger) if base else None
