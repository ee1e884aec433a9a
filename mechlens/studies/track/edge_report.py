"""The numerical edge over a series, as a section of the report."""

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.report.cells import in_brief
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.track.figures import over_steps
from mechlens.studies.track.measures.edge import ANSWERS

WORDS = {
    "collapsed": "softmax of exactly 1", "zero_loss": "loss of exactly 0", "scale": "size of the logits",
    "gap": "right logit before the next",
}  # fmt: skip


def edge_section(writer: RunWriter, table: pd.DataFrame) -> Section:
    """Writes the table and figures; the section says what share of the last checkpoint's answers has collapsed."""
    writer.table("edge", table)
    shares, own = table[table["measure"] == "collapsed"], table["of"] == ANSWERS
    names = [
        over_steps(
            writer, "edge_collapsed", shares[own], table="edge", y="value", low="low", high="high", group="dtype",
            title="Tokens whose softmax is exactly 1", ylabel="share of its answers' tokens", limits=(0.0, 1.0),
            caption="In this type such a token has a loss and a gradient of exactly 0. Bands: 95% intervals over "
            "answers.",
        ),
        over_steps(
            writer, "edge_scale", table[table["measure"] == "scale"], table="edge", y="value", low="low", high="high",
            group="of", title="Size of the logits", ylabel="root mean square about their mean",
            caption="A training that goes on scaling its logits ends at the edge. Bands: 95% intervals over texts.",
        ),
    ]  # fmt: skip
    last = table[table["step"] == table["step"].max()]
    brief = in_brief(last.assign(measure=last["measure"].map(WORDS)), ("value",)).drop(columns="step")
    return Section(
        "The numerical edge",
        f"At the last checkpoint {_said(shares[own], last)}. What has collapsed in the type that training computes its "
        "softmax in teaches nothing any more (Prieto et al. 2025), and training says nothing of it. Logits are the "
        "checkpoint's own, taken into each type; the right tokens are those that were said.",
        tuple(names),
        table=brief,
    )


def _said(shares: pd.DataFrame, last: pd.DataFrame) -> str:
    first = shares[shares["step"] == shares["step"].min()].set_index("dtype")
    now = last[(last["measure"] == "collapsed") & (last["of"] == ANSWERS)].set_index("dtype")
    told = [
        f"{Estimate.of_row(now.loc[dtype]).brief} of its answers' tokens in {dtype} (base: {value:.2f})"
        for dtype, value in first["value"].items()
    ]
    return "a softmax of exactly 1 is had by " + ", ".join(told)
