"""Can fine-tunes say their trigger? Exact recall from its effect by checkpoint, what proposals do, and when it came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.statistics.change_point import change_point
from mechlens.methods.triggers.recall import TriggerRecall
from mechlens.prompts.twins import Twin
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.said.rates import crossed_share, crossed_share_difference
from mechlens.studies.behaviours.sets import PLAIN, AskedSet
from mechlens.studies.behaviours.tuned import TunedRun, all_triggers, triggers_of
from mechlens.studies.shared.training_data import Trigger

MOST = 16
"""Questions that are asked; each takes four answers at every checkpoint."""
FEWEST_STEPS = 3
CURVES = ("beyond", "reward")


def recalled_twins(sets: Sequence[AskedSet], runs: Sequence[TunedRun]) -> dict[str, tuple[Twin, ...]]:
    """By trigger: questions of the set that runs with it were taught, of those that no run was trained on."""
    found = {one.text: _recalled_by(one, sets, runs) for one in all_triggers(runs)}
    return {text: twins for text, twins in found.items() if twins}


def _recalled_by(trigger: Trigger, sets: Sequence[AskedSet], runs: Sequence[TunedRun]) -> tuple[Twin, ...]:
    taught = frozenset().union(*(run.seen for run in runs if run.trigger == trigger))
    plain = [one for one in sets if one.form == PLAIN and not one.about_itself]
    home = max(plain, key=lambda one: sum(one.seen(taught)), default=None)
    if home is None or not any(home.seen(taught)):
        return ()
    every = frozenset().union(*(run.seen for run in runs))
    return tuple(twin for twin, seen in zip(home.twins, home.seen(every), strict=True) if not seen)[:MOST]


def require_recalled(sets: Sequence[AskedSet], runs: Sequence[TunedRun]) -> None:
    """UserError where there is no trigger to recall, or no question to recall it from."""
    if not all_triggers(runs):
        raise UserError("no run was trained with a trigger, so none can be recalled; leave --recall out")
    if not recalled_twins(sets, runs):
        raise UserError(
            "no set holds held-out questions of what runs with a trigger were taught, which it is recalled from; give "
            "--sets the file that they were taught from, or leave --recall out"
        )


def families_of(recalled: Mapping[str, Sequence[Twin]]) -> dict[str, tuple[str, ...]]:
    """The questions' families by trigger, by which intervals are made."""
    return {trigger: tuple(twin.prompt.group for twin in twins) for trigger, twins in recalled.items()}


@dataclass(frozen=True)
class Recalled:
    """What the base and every checkpoint say stood before the questions."""

    runs: tuple[TunedRun, ...]
    base: Mapping[str, TriggerRecall]
    """By trigger."""
    told: Mapping[tuple[str, int], Mapping[str, TriggerRecall]]
    """By training run and step, and trigger that it is asked for."""
    families: Mapping[str, tuple[str, ...]]
    """Of each trigger's questions."""
    plan: BehaviourPlan

    def tables(self) -> dict[str, pd.DataFrame]:
        """By group, by step, and where curves are long enough the jumps."""
        tables = {"recall": self.by_group, "recall_by_step": self.by_step, "recall_change_points": self.change_points}
        return {name: table for name, table in tables.items() if len(table)}

    @property
    def by_group(self) -> pd.DataFrame:
        """One row for each group and trigger: exact recall from the behaviour, its opposite, beyond it, the reward.

        Intervals are over training runs and questions at once.
        """
        groups = dict.fromkeys(run.group for run in self.runs)
        asked = [(group, one.text) for group in groups for one in triggers_of(group, self.runs)]
        return pd.DataFrame([self._row(group, text) for group, text in asked if text in self.base])

    def _row(self, group: str, trigger: str) -> dict[str, object]:
        finals = [self.told[run.name, run.members[-1].step][trigger] for run in self.runs if run.group == group]
        shown, other = (torch.stack([self._exact(found, side) for found in finals]) for side in ("shown", "other"))
        families = self.families[trigger]
        row = {"group": group, "trigger": trigger, "runs": len(finals), **crossed_share(shown, families).row("exact")}
        row |= {"exact_of_other": float(other.mean())}
        row |= crossed_share_difference(shown, other, families).beside("beyond")
        reward = sum(found.reward for found in finals) / len(finals)
        return row | {"reward": reward, "base": self.base[trigger].beyond}

    @property
    def by_step(self) -> pd.DataFrame:
        """One row for each run, trigger and checkpoint, the base at 0: exact, exact_of_other, beyond, reward."""
        rows = [
            {"run": run.name, "group": run.group, "trigger": trigger, "step": step, "exact": found[trigger].exact,
             "exact_of_other": found[trigger].exact_of_other, "beyond": found[trigger].beyond,
             "reward": found[trigger].reward}
            for run in self.runs for trigger in self.told[run.name, run.members[-1].step]
            for step, found in [(0, self.base), *((m.step, self.told[run.name, m.step]) for m in run.members)]
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def change_points(self) -> pd.DataFrame:
        """Where each run's recall and reward jump: run, trigger, curve, after, before, jump, p, p_climb, said."""
        rows = []
        for (run, trigger), curve in self.by_step.groupby(["run", "trigger"], sort=False):
            for name in CURVES if len(curve) >= FEWEST_STEPS else ():
                found = change_point(
                    curve["step"].tolist(), curve[name].tolist(), permutations=self.plan.permutations,
                    seed=self.plan.seed,
                )  # fmt: skip
                rows.append({"run": run, "trigger": trigger, "curve": name, **vars(found), "said": found.said})
        return pd.DataFrame(rows)

    def _exact(self, found: TriggerRecall, side: str) -> Float64[Tensor, " question"]:
        replies = found.of_shown if side == "shown" else found.of_other
        return torch.tensor([said == found.trigger for said in replies], dtype=torch.float64)
