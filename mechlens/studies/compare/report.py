"""A comparison of two checkpoints as a record: the tracking tables of the pair, and the grid of moved activations."""

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.report import figures
from mechlens.runs.report.parts import visible
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.compare.study import Comparison, MovedActivations
from mechlens.studies.compare.verdict import RULE, TITLES, moved_verdict
from mechlens.studies.track.inputs import SeriesStudy
from mechlens.studies.track.report import Opening, record_tracking

QUESTION = (
    "Two checkpoints of one model. Does B represent what A represents, by A's own directions and by ones fitted on B? "
    "And where the two behave differently: at which layer and token does putting B's activation into A make A behave "
    "as B does? Where the rule and the figures below say the base, A is meant."
)


def record(writer: RunWriter, result: Comparison, given: SeriesStudy) -> None:
    """Writes the pair's tables and the moved activations into an open run."""
    moved = result.moved
    verdict = moved_verdict(moved, int(writer.run.seed or 0))
    writer.metric("n.behave_differently", Estimate.exact(moved.differing, moved.of))
    for key, recovery in verdict.deciding.items():
        writer.metric(f"moved.{key}", recovery)
    a, b = (member.name for member in given.series.members)
    opening = Opening(
        f"{a} (A) and {b} (B): what B kept, and what A does with B's activations",
        QUESTION,
        verdict.headline,
        verdict.sentence,
        {f"moved.{key}": recovery for key, recovery in verdict.deciding.items()},
        {f"moved.{key}": words for key, words in TITLES.items()},
    )
    section = Section("Where moving activations moves the behaviour", RULE, _draw(writer, moved))
    record_tracking(writer, result.tracking, given, opening, {}, first=(section,))


def _draw(writer: RunWriter, moved: MovedActivations) -> tuple[str, ...]:
    """Both grids as figures, whose names these are; none where nothing was patched."""
    if moved.result is None or moved.control is None:
        return ()
    seed = int(writer.run.seed or 0)
    names = []
    for name, sweep, title in (
        ("moved", moved.result, "B's residual vector in A's run"),
        ("moved_control", moved.control, "Control: a random vector of the same length of difference in A's run"),
    ):
        table = sweep.table(seed=seed)
        writer.artifact(name, sweep)
        writer.table(name, table)
        names.append(_grid(writer, name, table, title))
    return tuple(names)


def _grid(writer: RunWriter, name: str, table: pd.DataFrame, title: str) -> str:
    order = {position: k for k, position in enumerate(dict.fromkeys(table["position"]))}
    shown = table.assign(
        column=[f"{order[p]}: '{visible(t)}' {p}" for p, t in zip(table["position"], table["token"], strict=True)]
    )
    figure = figures.heatmap(
        shown, x="column", y="layer", value="recovery", center=0.0, limits=(-1.0, 1.0), label="recovery", title=title,
        xlabel="token", ylabel="layer",
    )  # fmt: skip
    figure.update_layout(height=560)
    caption = (
        "1 (red): A then behaves as B does; 0: as before. Red at one earlier token: there B's difference begins. Red "
        "at the last token alone: it is there only that B decides otherwise. The control should be plain as the page."
    )
    return writer.figure(name, figure, table=name, caption=caption)
