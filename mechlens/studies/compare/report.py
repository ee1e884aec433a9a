"""A comparison of two checkpoints as a record: the tracking tables of the pair, and the grid of moved activations."""

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.report import figures
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.compare.study import Comparison, MovedActivations
from mechlens.studies.track.inputs import SeriesStudy
from mechlens.studies.track.report import Headline, record_tracking

QUESTION = (
    "Two checkpoints of one model. Does B represent what A represents, by A's own directions and by ones fitted on B? "
    "And where the two behave differently: at which layer and token does putting B's activation into A make A behave "
    "as B does? Where the rule and the figures below say the base, A is meant."
)


def record(writer: RunWriter, result: Comparison, given: SeriesStudy) -> None:
    """Writes the pair's tables and the moved activations into an open run."""
    moved = result.moved
    section = _not_moved(moved) if moved.result is None or moved.control is None else _moved(writer, moved)
    writer.metric("n.behave_differently", Estimate.exact(moved.differing, moved.of))
    a, b = (member.name for member in given.series.members)
    headline = Headline(f"{a} (A) and {b} (B): what B kept, and what A does with B's activations", QUESTION)
    record_tracking(writer, result.tracking, given, headline, {}, more=(section,))


def _not_moved(moved: MovedActivations) -> Section:
    return Section(
        "Where moving activations moves the behaviour",
        f"Not measurable: of {moved.of} harmful test prompts the two checkpoints refuse and accept different ones in "
        f"{moved.differing} cases only.",
    )


def _moved(writer: RunWriter, moved: MovedActivations) -> Section:
    assert moved.result is not None
    assert moved.control is not None
    seed = int(writer.run.seed or 0)
    names = []
    tables = {}
    for name, sweep, title in (
        ("moved", moved.result, "B's residual vector in A's run"),
        ("moved_control", moved.control, "Control: a random vector of the same length of difference in A's run"),
    ):
        tables[name] = sweep.table(seed=seed)
        writer.artifact(name, sweep)
        writer.table(name, tables[name])
        names.append(_grid(writer, name, tables[name], title))
    best = tables["moved"].sort_values("recovery", ascending=False).iloc[0]
    recovery = Estimate.of_row(best, "recovery")
    writer.metric("moved.best_recovery", recovery)
    random = float(tables["moved_control"]["recovery"].max())
    return Section(
        "Where moving activations moves the behaviour",
        "Recovery of B's refusal log-odds when one residual vector of B is put into A's run of the same prompt: 0 is "
        f"A's own, 1 is B's (mean change over mean gap). {moved.differing} of {moved.of} harmful test prompts are "
        f"refused by one and accepted by the other; {len(moved.result.pairs)} of them were patched. Largest: "
        f"{recovery} at layer {best['layer']}, {best['position']} (the largest of a grid, so flattered); the "
        f"control reaches {random:.2f}.",
        tuple(names),
    )


def _grid(writer: RunWriter, name: str, table: pd.DataFrame, title: str) -> str:
    order = {position: k for k, position in enumerate(dict.fromkeys(table["position"]))}
    shown = table.assign(
        column=[f"{order[p]}: {t!r} {p}" for p, t in zip(table["position"], table["token"], strict=True)]
    )
    figure = figures.heatmap(
        shown, x="column", y="layer", value="recovery", center=0.0, limits=(-1.0, 1.0), label="recovery", title=title,
        xlabel="token", ylabel="layer",
    )  # fmt: skip
    figure.update_layout(height=560)
    return writer.figure(name, figure, table=name)
