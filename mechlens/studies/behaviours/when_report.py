"""The report's section on when it came: curves over checkpoints, and where they jump and turn."""

import pandas as pd

from mechlens.methods.statistics.change_point import FEWEST, LEVEL
from mechlens.runs.report import figures
from mechlens.runs.report.cells import rounded
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.when import ADAPTER, COSINE, DIRECTION, LAGS, NORM, When

MOST_CURVES = 5
TEXT = (
    "Change from the base on held-out questions by training step, and how far the adapter and the direction of the "
    "change have gone. The best cut of each curve into two levels: `p` is how often permuted orders have one as good, "
    "`p_climb` how often a smooth climb with the same errors has one that is as much better than the climb. A jump is "
    f"`said` where both are at most {LEVEL:g} (from {FEWEST} checkpoints on, the base among them): what grows "
    "steadily, slows down or gathers way has none. A curve that wanders may look as if it had one."
)
TURNS = (
    f"Local cosine at a checkpoint: between the ways back and forth, {LAGS[0]} to {LAGS[-1]} checkpoints long; -1 is "
    "straight on, 0 a right angle. Below, the checkpoint at which the mean course before and after differ most, their "
    "cosine, and how often permuted orders of the steps part them as well. The adapter's course is that of all its "
    "matrices' products, the direction's that of what moved on the answers that show the behaviour."
)


def when_sections(writer: RunWriter, when: When) -> list[Section]:
    """None where no run has checkpoints between the base and its result; the tables must have been written."""
    curves = when.matrix.by_step
    if not len(curves) or curves.groupby("run")["step"].nunique().max() <= 2:
        return []
    figure = figures.lines(
        rounded(_homes(when.matrix, curves)), x="step", y="change", group="curve", hline=0.0, xlabel="training step",
        ylabel="change from the base (nats)", title="Held-out questions by training step",
    )  # fmt: skip
    caption = "Means over each group's runs, on what it was taught. Where it rises at once, it came at once."
    names = [writer.figure("by_step", figure, table="by_step", caption=caption)]
    together = _together(when)
    if together["curve"].nunique() > 1:
        figure = figures.lines(
            together, x="step", y="value", group="curve", hline=0.0, xlabel="training step",
            ylabel="share of the largest; cosine", title=f"Behaviour, adapter and direction: {when.matrix.groups[0]}",
        )  # fmt: skip
        caption = "Means over runs. The behaviour and both norms are shares of the largest that they reach."
        names.append(writer.figure("when", figure, table="when", caption=caption))
    sections = [Section("When it came", TEXT, tuple(names), table=when.change_points)]
    if len(when.turning_points):
        sections.append(Section("Where its course changed", TURNS, (), table=when.turning_points))
    return sections


def _homes(matrix: BehaviourMatrix, curves: pd.DataFrame) -> pd.DataFrame:
    """The home of each group, or the first set where it has none; at most `MOST_CURVES`."""
    parts = []
    for group in matrix.groups[:MOST_CURVES]:
        home = matrix.home(group) or matrix.sets[0]
        own = curves[(curves["group"] == group) & (curves["set"] == home.name)]
        mean = own.groupby("step", as_index=False)["change"].mean()
        parts.append(mean.assign(curve=f"{group}: {home.name}"))
    joined: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return joined


def _together(when: When) -> pd.DataFrame:
    """Of the first group: what it was taught, both norms and local cosines at the shortest lag, means over runs."""
    group = when.matrix.groups[0]
    home = _homes(when.matrix, when.matrix.by_step)
    behaviour = home[home["curve"].str.startswith(f"{group}: ")]
    parts = [of_its_largest(behaviour.assign(value=behaviour["change"], curve="behaviour"))]
    curves = when.curves[when.curves["group"] == group]
    for of, word in ((ADAPTER, "adapter"), (DIRECTION, "direction")):
        own = curves[curves["of"] == of]
        norm = _mean(own[own["measure"] == NORM])
        turn = _mean(own[(own["measure"] == COSINE) & (own["lag"] == LAGS[0])])
        parts += [of_its_largest(norm.assign(curve=f"{word}'s norm")), turn.assign(curve=f"{word}'s local cosine")]
    joined: pd.DataFrame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return joined[["step", "curve", "value"]].dropna()


def _mean(curves: pd.DataFrame) -> pd.DataFrame:
    mean: pd.DataFrame = curves.groupby("step", as_index=False)[["value"]].mean()
    return mean


def of_its_largest(curve: pd.DataFrame) -> pd.DataFrame:
    """The end may be next to nothing, of which everything before it would be many times as much."""
    largest = float(rounded(curve)["value"].abs().max()) if len(curve) else 0.0
    return curve.assign(value=curve["value"] / largest) if largest else curve[:0]
