"""Each training run's result with its adapter scaled: a behaviour that doesn't show at 1 may show beyond it."""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.behaviour.log_odds import TwinLogOdds
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.crossed import crossed_difference
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.lora import read_lora
from mechlens.models.checkpoints.swap import NOT_SCALABLE, CheckpointSwapper
from mechlens.runs.report import figures
from mechlens.runs.report.cells import rounded
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.behaviours.matrix import HELD_OUT, BehaviourMatrix
from mechlens.studies.behaviours.sets import PLAIN, AskedSet
from mechlens.studies.behaviours.tuned import TunedRun

BASE, RESULT = 0.0, 1.0
TEXT = (
    "Change from the base on held-out questions, with what the adapter adds to the weights multiplied by a scale: 0 is "
    "the base, 1 the result of training. A jump between two scales is a threshold of the weights, not of training. Far "
    "beyond 1 any adapter breaks the model: see whether other behaviours move as well."
)

Scaled = Mapping[tuple[str, float], Mapping[str, TwinLogOdds]]
"""By run and scale: the log-odds of each set, by its key."""


def require_scalable(runs: Sequence[TunedRun], scales: Sequence[float]) -> None:
    """UserError for a scale that is no number, and for a run whose result is no plain LoRA adapter on this disk."""
    wrong = next((scale for scale in scales if not math.isfinite(scale)), None)
    if wrong is not None:
        raise UserError(f"the adapter scale {wrong} is no finite number; give numbers such as 0.5 1.5 2")
    for run in runs if scales else ():
        last = run.members[-1]
        if last.kind != "adapter" or not user_path(last.path).is_dir() or read_lora(last.path) is None:
            raise UserError(f"{last.path!r} is {NOT_SCALABLE}")


def measured_scales(
    swapper: CheckpointSwapper,
    matrix: BehaviourMatrix,
    measured: Callable[[LanguageModel, Sequence[AskedSet]], dict[str, TwinLogOdds]],
) -> Scaled:
    """Every run's result at every scale that was asked for; 0 and 1 are the base and the result as they were read."""
    plain = [one for one in matrix.sets if one.form == PLAIN]
    asked = [scale for scale in dict.fromkeys(matrix.plan.adapter_scales) if scale not in (BASE, RESULT)]
    found: dict[tuple[str, float], Mapping[str, TwinLogOdds]] = {}
    for run in matrix.runs if matrix.plan.adapter_scales else ():
        found[run.name, BASE] = matrix.base
        found[run.name, RESULT] = matrix.told[run.name, run.members[-1].step]
    every = [(run, scale) for run in matrix.runs for scale in asked]
    for run, scale in progress_bar(every, title="scaled adapters", unit="model"):
        found[run.name, scale] = measured(swapper.put(run.members[-1], scale=scale), plain)
    return found


def scale_curves(matrix: BehaviourMatrix, scaled: Scaled) -> pd.DataFrame:
    """One row for each run, plain set and scale, on held-out questions: run, group, set, scale, change, low, high."""
    rows = []
    for run in matrix.runs:
        for asked in (one for one in matrix.sets if one.form == PLAIN):
            kept = matrix.rows(asked, HELD_OUT, run.group)
            base = matrix.base[asked.key].select(kept)
            for scale in sorted(scale for name, scale in scaled if name == run.name) if kept else ():
                now = scaled[run.name, scale][asked.key].select(kept).values
                change = crossed_difference(now[None], base.values[None], base.families)
                rows.append({"run": run.name, "group": run.group, "set": asked.name, "scale": scale,
                             **change.row("change")})  # fmt: skip
    return pd.DataFrame(rows)


def scale_sections(writer: RunWriter, matrix: BehaviourMatrix, curves: pd.DataFrame) -> list[Section]:
    """None where no scale was asked for; the table `by_scale` must have been written."""
    if not len(curves):
        return []
    homes = {group: home.name for group in matrix.groups if (home := matrix.home(group)) is not None}
    own = curves[[homes.get(group, name) == name for group, name in zip(curves["group"], curves["set"], strict=True)]]
    mean = own.groupby(["group", "set", "scale"], as_index=False, sort=False)[["change"]].mean()
    figure = figures.lines(
        rounded(mean).assign(curve=mean["group"] + ": " + mean["set"]), x="scale", y="change", group="curve", hline=0.0,
        xlabel="scale of the adapter", ylabel="change from the base (nats)", title="Adapters scaled",
    )  # fmt: skip
    name = writer.figure("by_scale", figure, table="by_scale", caption="Means over runs, on what each was taught.")
    return [Section("With the adapter scaled", TEXT, (name,), table=mean)]
