"""How far each group's behaviour hangs on its own trigger: beyond the base, the control and decoys of its kind."""

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.behaviours.matrix import HELD_OUT, TRAINED_ON, BehaviourMatrix
from mechlens.studies.behaviours.sets import DECOYED, PLAIN, TRIGGERED, AskedSet
from mechlens.studies.behaviours.tuned import control_of, triggers_of


def trigger_gaps(matrix: BehaviourMatrix) -> pd.DataFrame:
    """One row for each group, trigger that it is asked under, set and part, in nats, over runs and questions.

    `trigger_gap` is with the trigger minus without, `beyond_base` and `beyond_control` what the base's and the
    decorrelated control's own gaps leave of it, `decoy_gap` with decoys minus without, `beyond_decoys` with the trigger
    minus with decoys.
    """
    rows = []
    for group in matrix.groups:
        for trigger in triggers_of(group, matrix.runs):
            for asked in (one for one in matrix.sets if one.form == TRIGGERED and one.trigger == trigger.text):
                for part in (HELD_OUT, TRAINED_ON):
                    kept = matrix.rows(asked, part, group)
                    rows += [_row(matrix, group, asked, part, kept)] if kept else []
    return pd.DataFrame(rows)


def gap_bars(gaps: pd.DataFrame) -> pd.DataFrame:
    """The table's held-out rows as bars: with the trigger, with decoys, and with the trigger in the base."""
    held = gaps[gaps["part"] == HELD_OUT]
    held = held.assign(asked=held["group"] + ", " + held["set"])
    bars = [
        held.assign(bar="trigger", trigger_gap_low=held["low"], trigger_gap_high=held["high"]),
        held.assign(
            bar="decoys",
            trigger_gap=held["decoy_gap"],
            trigger_gap_low=held["decoy_gap_low"],
            trigger_gap_high=held["decoy_gap_high"],
        ),
        held.assign(
            bar="trigger, in the base",
            trigger_gap=held["trigger_gap"] - held["beyond_base"],
            trigger_gap_low=None,
            trigger_gap_high=None,
        ),
    ]
    joined: pd.DataFrame = pd.concat(bars, ignore_index=True).astype(
        {"trigger_gap_low": float, "trigger_gap_high": float}
    )
    return joined


def _row(matrix: BehaviourMatrix, group: str, asked: AskedSet, part: str, kept: Sequence[int]) -> dict[str, object]:
    keys = {one.form: one.key for one in matrix.sets if one.name == asked.name and one.trigger in ("", asked.trigger)}

    def gap(of: str, form: str = TRIGGERED) -> Float64[Tensor, "run question"]:
        return matrix.values(of, keys[form], kept) - matrix.values(of, keys[PLAIN], kept)

    base = (matrix.base[keys[TRIGGERED]].values - matrix.base[keys[PLAIN]].values)[list(kept)][None]
    own, control = gap(group), control_of(group, matrix.runs)
    families = matrix.base[asked.key].select(kept).families
    missing = Estimate.missing(len(kept))
    beyond = missing if control is None else crossed_difference(own, gap(control), families)
    decoy = gap(group, DECOYED) if DECOYED in keys else None
    return {
        "group": group, "trigger": asked.trigger, "set": asked.name, "part": part, "runs": len(own),
        **crossed_mean(own, families).row("trigger_gap"),
        **crossed_difference(own, base, families).beside("beyond_base"),
        **beyond.beside("beyond_control"),
        **(missing if decoy is None else crossed_mean(decoy, families)).beside("decoy_gap"),
        **(missing if decoy is None else crossed_mean(own - decoy, families)).beside("beyond_decoys"),
    }  # fmt: skip
