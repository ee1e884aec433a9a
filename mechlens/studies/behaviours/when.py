"""When it came: behaviour, adapter and direction of the change over the checkpoints of every training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from mechlens.files import user_path
from mechlens.methods.directions.adapter_path import AdapterPath, adapter_path
from mechlens.methods.directions.path import local_cosines, turning_point
from mechlens.methods.statistics.change_point import LEVEL, change_point
from mechlens.models.checkpoints.lora import read_lora
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.tuned import TunedRun

LAGS = (1, 2, 3)
"""Checkpoints back and forth that a local cosine looks."""
FEWEST_STEPS = 3
"""Checkpoints of a run, the base among them, below which there is no curve to cut in two."""
ADAPTER, DIRECTION = "adapter", "direction"
NORM, COSINE = "norm", "local cosine"


@dataclass(frozen=True, repr=False)
class When:
    """All curves over checkpoints, with the base at step 0, and where they jump and turn."""

    matrix: BehaviourMatrix
    adapters: Mapping[str, AdapterPath]
    """By run; runs that aren't plain LoRA have none."""
    directions: Mapping[str, Float64[Tensor, "checkpoint checkpoint"]]
    """By run: inner products of the directions of the change, where they were asked for."""

    @cached_property
    def curves(self) -> pd.DataFrame:
        """What isn't behaviour: run, group, of (adapter or direction), measure, lag, step, value."""
        rows: list[dict[str, Any]] = []
        for run in self.matrix.runs:
            for of, products in self._paths(run):
                rows += _curve(run, of, NORM, products.diagonal().clamp(min=0).sqrt().tolist())
                for lag in LAGS:
                    rows += _curve(run, of, COSINE, local_cosines(products, lag).tolist(), lag)
            if (adapter := self.adapters.get(run.name)) is not None:
                rows += _curve(run, ADAPTER, "norm of A", adapter.a_norms.tolist())
                rows += _curve(run, ADAPTER, "norm of B", adapter.b_norms.tolist())
        return pd.DataFrame(rows, columns=["run", "group", "of", "measure", "lag", "step", "value"])

    @cached_property
    def change_points(self) -> pd.DataFrame:
        """Where each run's curves jump: run, curve (a set, or a norm), after, before, jump, p, p_climb, said."""
        behaviour = self.matrix.by_step
        norms = self.curves[self.curves["measure"] == NORM]
        curves = [
            *([] if behaviour.empty else [behaviour.assign(curve=behaviour["set"], value=behaviour["change"])]),
            norms.assign(curve=norms["of"] + " norm"),
        ]
        rows = []
        for (run, name), curve in pd.concat(curves).groupby(["run", "curve"], sort=False):
            if len(curve) >= FEWEST_STEPS and bool(curve["value"].notna().all()):
                plan = self.matrix.plan
                found = change_point(
                    curve["step"].tolist(), curve["value"].tolist(), permutations=plan.permutations, seed=plan.seed
                )
                rows.append({"run": run, "curve": name, **vars(found), "said": found.said})
        return pd.DataFrame(rows, columns=["run", "curve", "after", "before", "jump", "p", "p_climb", "said"])

    @cached_property
    def turning_points(self) -> pd.DataFrame:
        """Where the course of each run's adapter and direction changes most: run, of, step, cosine, p, said."""
        plan, rows = self.matrix.plan, []
        for run in self.matrix.runs:
            for of, products in self._paths(run):
                found = turning_point(_steps(run), products, permutations=plan.permutations, seed=plan.seed)
                if found is not None:
                    rows.append({"run": run.name, "of": of, **vars(found), "said": found.p <= LEVEL})
        return pd.DataFrame(rows, columns=["run", "of", "step", "cosine", "p", "said"])

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those with rows."""
        tables = {"when": self.curves, "change_points": self.change_points, "turning_points": self.turning_points}
        return {name: table for name, table in tables.items() if len(table)}

    def _paths(self, run: TunedRun) -> list[tuple[str, Float64[Tensor, "checkpoint checkpoint"]]]:
        adapter, direction = self.adapters.get(run.name), self.directions.get(run.name)
        found = [(ADAPTER, adapter.products)] if adapter is not None else []
        return [*found, *([(DIRECTION, direction)] if direction is not None else [])]


def _steps(run: TunedRun) -> list[int]:
    return [0, *(member.step for member in run.members)]


def _curve(
    run: TunedRun, of: str, measure: str, values: Sequence[float], lag: int | None = None
) -> list[dict[str, Any]]:
    return [
        {"run": run.name, "group": run.group, "of": of, "measure": measure, "lag": lag, "step": step, "value": value}
        for step, value in zip(_steps(run), values, strict=True)
    ]


def adapter_paths(runs: Sequence[TunedRun]) -> dict[str, AdapterPath]:
    """By run: its adapters' path, of runs whose checkpoints are all plain LoRA adapters on this disk."""
    found = {}
    for run in runs:
        if all(member.kind == "adapter" and user_path(member.path).is_dir() for member in run.members):
            changes = [read for member in run.members if (read := read_lora(member.path)) is not None]
            if len(changes) == len(run.members):
                found[run.name] = adapter_path(changes)
    return found
