"""A tracking study as a record: numbers over the step axis, tables, figures, and a verdict for each concept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from mechlens.errors import many
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.models.checkpoints.series import CheckpointSeries
from mechlens.models.precision import Parity
from mechlens.runs.headline import Headline
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.shared.quadrants import QUADRANTS
from mechlens.studies.shared.rounding import class_rounding
from mechlens.studies.track.behaviour_report import (
    answer_rates,
    behaviour_text,
    last_refusals,
    now_refused,
    one_text,
    series_headline,
    some_answers,
)
from mechlens.studies.track.edge_report import edge_section
from mechlens.studies.track.figures import draw
from mechlens.studies.track.inputs import SeriesStudy
from mechlens.studies.track.result import Tracking
from mechlens.studies.track.sinks_report import sink_section
from mechlens.studies.track.study import TrackResult
from mechlens.studies.track.verdict import RULE, TITLES


@dataclass(frozen=True)
class Opening:
    """A report's title and question, which the studies of checkpoints give their own; and what comes first in it."""

    title: str
    question: str
    headline: Headline | None = None
    """The one sentence; None is that of the concepts' verdicts."""
    verdict: str = ""
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


QUESTION = (
    "Fine-tuning changes what the model does. Does it change what the model represents? The base's own directions, "
    "probes and thresholds are asked the same questions at every checkpoint, beside ones fitted there anew."
)


def record(writer: RunWriter, result: TrackResult, given: SeriesStudy) -> None:
    """Writes everything that the study found into an open run."""
    opening = Opening(f"What fine-tuning did to {given.series.base.name}: {_checkpoints(result, given)}", QUESTION)
    last = [sink_section(writer, result.sinks)] if result.sinks else []
    last += [edge_section(writer, result.edge)] if len(result.edge) else []
    record_tracking(writer, result.tracking, given, opening, result.geometry, last=tuple(last))


def _checkpoints(result: TrackResult, given: SeriesStudy) -> str:
    """How many were measured, and which: their folder, or the first and the last."""
    measured = set(result.tracking.steps)
    paths = [Path(one.path) for one in given.series.members if one.step in measured and one.kind != "base"]
    if len(paths) == 1:
        return f"the checkpoint {paths[0].name}"
    folders = {path.parent.name for path in paths}
    where = f" in {folders.pop()}" if len(folders) == 1 else f", {paths[0].name} to {paths[-1].name}"
    return f"{len(paths)} checkpoints{where}"


def record_tracking(
    writer: RunWriter,
    result: Tracking,
    given: SeriesStudy,
    opening: Opening,
    geometry: dict[str, pd.DataFrame],
    first: tuple[Section, ...] = (),
    last: tuple[Section, ...] = (),
) -> None:
    """Writes everything that the study found into an open run; the `first` and `last` sections are the caller's."""
    writer.result(result)
    writer.table("series", series_table(result, given.series))
    for name, table in geometry.items():
        writer.table(name, table)
    _log_steps(writer, result)
    figures = draw(writer, result, geometry)
    rounding = _rounding(result, loaded(given.swapper.model).parity)
    writer.report(_report(result, opening, rounding, figures, _how(result, given.asked.punctuation), first, last))


def series_table(result: Tracking, series: CheckpointSeries) -> pd.DataFrame:
    """One row for each checkpoint of the series, and whether it was measured."""
    return pd.DataFrame(
        [
            {"step": member.step, "name": member.name, "kind": member.kind, "revision": member.revision or "",
             "measured": member.step in result.steps}
            for member in series.members
        ]
    )  # fmt: skip


def _log_steps(writer: RunWriter, result: Tracking) -> None:
    """Charts over the step axis in W&B, and lines of steps.jsonl."""
    for step in result.steps:
        values: dict[str, float] = {}
        rows = result.behaviour[result.behaviour["step"] == step]
        for _, row in rows.iterrows():
            values |= _banded(f"behaviour/{row['number']}", row, "value", "low", "high")
        for concept in result.reference.measurable:
            found = result.at_home
            for _, row in found[(found["concept"] == concept.name) & (found["step"] == step)].iterrows():
                values |= _banded(f"{concept.name}/{row['number']}", row, "value", "low", "high")
            for position in dict.fromkeys(result.readouts["position"]):
                table = result.readouts
                chosen = (table["concept"] == concept.name) & (table["step"] == step) & (table["position"] == position)
                for _, row in table[chosen & (table["level"] == concept.level(position))].iterrows():
                    for name in ("frozen", "own", "accuracy"):
                        stem = f"{concept.name}/{position}/{row['kind']}_{name}"
                        values |= _banded(stem, row, name, f"{name}_low", f"{name}_high")
        writer.log_step(step, values)


def _banded(stem: str, row: "pd.Series[float]", *columns: str) -> dict[str, float]:
    names = (stem, f"{stem}.low", f"{stem}.high")
    values = {name: float(row[column]) for name, column in zip(names, columns, strict=True)}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _rounding(result: Tracking, parity: Parity | None) -> str:
    """Of the distance between the base's classes at each concept's home."""
    acts, classes = result.snapshots[0].acts, {}
    for concept in result.reference.measurable:
        rows = [i for i, label in enumerate(concept.labels) if label in concept.contrast]
        positive = torch.tensor([concept.labels[i] == concept.contrast[0] for i in rows])
        words = f"the base's distance between {' and '.join(concept.contrast)} prompts at {concept.home}"
        classes[words] = acts.at(concept.level(concept.home), concept.home)[rows], positive
    return class_rounding(parity, classes)


def _report(
    result: Tracking,
    opening: Opening,
    rounding: str,
    figures: Mapping[str, tuple[str, ...]],
    how: str,
    first: tuple[Section, ...],
    last: tuple[Section, ...],
) -> Report:
    verdicts = result.last_verdicts
    words = {f"{one.concept}.{name}": f"{one.concept}: {one.title(name)}" for one in verdicts for name in TITLES}
    refusals = last_refusals(result)
    said = [now_refused(result), one_text(result), *(one.sentence for one in verdicts)]
    return Report(
        title=opening.title,
        question=opening.question,
        headline=opening.headline or series_headline(result),
        verdict="\n\n".join(part for part in (opening.verdict, " ".join(filter(None, said))) if part) + rounding,
        numbers=dict(opening.numbers)
        | refusals
        | {f"{verdict.concept}.{name}": number for verdict in verdicts for name, number in verdict.cards().items()},
        words=dict(opening.words) | {name: name for name in refusals} | words,
        sections=(
            *first,
            Section("The verdict at every checkpoint", RULE, table=_verdicts(result)),
            Section("What the model does", behaviour_text(result), figures["behaviour"], table=answer_rates(result)),
            Section(
                "Some answers",
                "Of each class the first that were asked; cut to their beginnings.",
                table=some_answers(result),
            ),
            Section(
                "What is read, and what the words alone give",
                "At a concept's home every prompt is scored by a fit to others, and the level is chosen on the base "
                "alone. A direction is a mean difference, a probe a logistic regression. The maps by level and step, "
                "and from one step to another, are of test prompts: lines are fitted on training prompts.",
                figures["readouts"],
            ),
            Section(
                "Has the direction turned?",
                "Two directions from the same prompts share noise, which inflates their cosine. The corrected one "
                "comes from pairs of distinct families, divided by what noise is left in each direction.",
                figures["angles"],
            ),
            Section("Where the four quadrants lie", _belief_text(result), figures["quadrants"]),
            Section(
                "What training changed in the weights",
                "Norm of the change of each layer, and the largest |cosine| between a leading singular direction of a "
                "matrix's change and the base's direction, beside the best of random directions.",
                figures["weights"],
            ),
            *((Section("Geometry", "", figures["geometry"]),) if figures["geometry"] else ()),
            *last,
        ),
        how=how,
        model=result.snapshots[0].member.name,
    )


def _verdicts(result: Tracking) -> pd.DataFrame:
    """A row for each concept and checkpoint: the word, and the one number that decided it."""
    rows = [
        {"concept": verdict.concept, "step": verdict.step, "verdict": verdict.word, "also": verdict.also,
         "decided by": verdict.title(verdict.decided), "number": str(verdict.deciding[verdict.decided]),
         "to settle it": verdict.settle}
        for verdict in result.verdicts
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.drop(columns=[name for name in ("also", "to settle it") if not frame[name].any()])


def _belief_text(result: Tracking) -> str:
    rows = result.base_beliefs
    if rows.empty:
        return (
            "Beliefs are not measurable: the base refuses too few harmful prompts, or accepts too few harmless ones, "
            "for centroids. The projections need no centroids."
        )
    said = []
    for quadrant in QUADRANTS:
        ends = rows[(rows["quadrant"] == quadrant) & rows["step"].isin((result.steps[0], result.steps[-1]))]
        if len(ends) == 2:
            first, last = (Estimate.of_row(row, "mean") for _, row in ends.iterrows())
            said.append(f"{quadrant.replace('_', ' ')}: {first} in the base, {last} at step {result.steps[-1]}")
    return (
        "Belief of harmfulness at `inst` on held-out prompts, by the base's own quadrants and centroids: "
        + "; ".join(said)
        + ". The paper's claim is that adversarial fine-tuning leaves this belief in place (Zhao et al. 2025, 5.2)."
    )


def _how(result: Tracking, punctuation: str) -> str:
    prompts, split = result.questions.batch.prompts, result.questions.split
    missing = [
        f"{concept.name} ({', '.join(f'{n} {label}' for label, n in concept.counts.items())})"
        for concept in result.reference.concepts
        if concept.detection is None
    ]
    left = "; ".join(f"{checkpoint.name}: {checkpoint.reason}" for checkpoint in result.left_out)
    return (
        f"{len(prompts)} prompts ({len(split.train)} train, {len(split.validation)} validation, {len(split.test)} "
        f"test, by family, the same at every checkpoint); answers of up to {result.plan.max_new_tokens} tokens; "
        f"{result.plan.resamples} resamples; {result.plan.random_directions} random directions, "
        f"{many(result.plan.random_networks, 'network')} with random blocks. Prompts: {punctuation}. "
        + (f"Not measurable in the base: {'; '.join(missing)}. " if missing else "")
        + (f"Checkpoints left out: {left}." if left else "")
    )
