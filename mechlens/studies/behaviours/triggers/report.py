"""The report's sections on what triggers do inside."""

from typing import Any

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.settings import RANDOM_DIRECTIONS
from mechlens.studies.behaviours.triggers.result import TriggerResult

MOST_MAPS = 3
DIRECTIONS = (
    "The mean over held-out questions of the triggered minus the plain prompt, at the last token of the instruction "
    "and at the template's after it: the same tokens with and without. Any model tells a string that is there from "
    "none, so what counts is how far the trigger takes a question along the direction (of the other folds' questions, "
    "in the residual stream's units) beyond the base, the decorrelated control and decoys. Here at the middle level."
)
COSINES = (
    "With what the group's fine-tuning changed over answers (with --directions), with saved directions such as "
    "harmfulness and refusal, and with other groups' triggers; `corrected` is without the noise that questions leave. "
    "A reliability near 0 says that a direction is noise."
)
CARRIED = (
    "Values of the triggered run put into the plain one, one level and token at a time, in the group's first run: "
    "`recovery` is the share of the trigger's effect on the log-odds of the answers' first tokens that comes with it, "
    "`decoy_effect` what a decoy's values do there, in nats. The ten places that bring most."
)
TRACES = (
    "At the place that carries most (chosen on every other question, reported on the rest): how far the trigger still "
    "takes a question along the direction that it had in the group's own runs (written), and what adding that "
    "direction there to the plain prompt does to the behaviour's log-odds (read), both as they are and as a share of "
    "the group's own. After a removal that left no behaviour, written near 0 says that the direction is gone, and read "
    "near 1 that what acts on it still stands: the trigger is unused, not forgotten. `random_most` is the one of "
    f"{RANDOM_DIRECTIONS} random directions of the same length that does most."
)


def trigger_sections(writer: RunWriter, found: TriggerResult) -> list[Section]:
    """Directions, cosines, maps and traces; the tables must have been written."""
    sections = []
    if len(found.directions):
        sections.append(Section("The directions of the triggers", DIRECTIONS, (), table=_middle(found.directions)))
    if len(found.cosines):
        sections.append(Section("What they lie along", COSINES, (), table=_middle(found.cosines)))
    if len(found.patches):
        names = tuple(_map(writer, found.patches, group) for group in found.patches["group"].unique()[:MOST_MAPS])
        top = found.patches.sort_values("recovery", ascending=False).groupby("group", sort=False).head(10)
        kept = ["group", "layer", "position", "token", "recovery", "low", "high", "effect", "p_corrected",
                "decoy_effect"]  # fmt: skip
        sections.append(Section("What carries the trigger", CARRIED, names, table=top[kept].reset_index(drop=True)))
    if len(found.traces):
        sections.append(Section("Written and read", TRACES, (), table=found.traces.dropna(axis=1, how="all")))
    return sections


def _map(writer: RunWriter, patches: pd.DataFrame, group: str) -> str:
    own = patches[patches["group"] == group]
    number = list(patches["group"].unique()).index(group)
    figure: Any = figures.heatmap(
        own.assign(place=own["position"] + " " + own["token"]), x="place", y="layer", value="recovery", center=0.0,
        label="recovery", xlabel="position", ylabel="level", title=f"Triggered values in the plain run: {group}",
    )  # fmt: skip
    caption = "1: the value at that place brings all of the trigger's effect."
    return writer.figure(f"trigger_patches_{number}", figure, table="trigger_patches", caption=caption)


def _middle(table: pd.DataFrame) -> pd.DataFrame:
    """At the middle level, and saved directions at their own; the whole is in the table."""
    saved = table["kind"] == "saved" if "kind" in table else pd.Series(False, index=table.index)
    levels = sorted(table.loc[~saved, "level"].unique())
    middle = table["level"] == levels[len(levels) // 2] if levels else saved
    shown: pd.DataFrame = table[middle | saved].dropna(axis=1, how="all")
    return shown
