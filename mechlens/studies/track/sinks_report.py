"""Attention sinks over a series, as a section of the report."""

import pandas as pd

from mechlens.methods.sinks.result import HEAD_MEASURES, LEVEL_MEASURES
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.track.figures import over_steps

DRAWN = ("mass", "value", "largest")
MOST = 10
"""Heads that are listed."""


def sink_section(writer: RunWriter, tables: dict[str, pd.DataFrame]) -> Section:
    """Writes the tables and figures; the section says what became of sinks, and which heads went dormant or woke."""
    for name, table in tables.items():
        writer.table(name, table)
    measures, words = tables["sinks"], HEAD_MEASURES | LEVEL_MEASURES
    names = [
        over_steps(
            writer, f"sinks_{measure}", measures[measures["measure"] == measure], table="sinks", y="value", low="low",
            high="high", group="domain", title=f"Sinks: {words[measure]}", ylabel=measure,
            caption="Mean over heads and texts, or the largest of all levels. Bands: 95% intervals over texts.",
        )
        for measure in DRAWN
    ]  # fmt: skip
    places = tables["sink_positions"]
    names.append(
        over_steps(
            writer, "sink_positions", places, table="sink_positions", y="mass", low="low", high="high",
            group="position", title="Attention of the answer to places of the prompt", ylabel="attention",
            caption="Mean over heads of a query in the answer; template before and words are means a token. The AUROC "
            "of every concept at these places stands beside it in the table.",
        )
    )  # fmt: skip
    heads = tables["sink_heads"]
    last = heads[heads["step"] == heads["step"].max()]
    clear = last[last["p"] <= 0.05]
    grew, fell = int((clear["change"] > 0).sum()), int((clear["change"] < 0).sum())
    order = last["change"].abs().sort_values(ascending=False, kind="stable").index
    return Section(
        "Attention sinks",
        f"Of {len(last)} heads {grew} attend to sinks more at the last checkpoint than in the base, so are more "
        f"dormant, and {fell} less (familywise p of .05 or less: the two models of a text change places, and the "
        "clearest change of any head is what each is held against). Below, the heads that changed most.",
        tuple(names),
        table=last.loc[order[:MOST]].drop(columns="step"),
    )
