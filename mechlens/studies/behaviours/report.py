"""What fine-tuning changed besides: the matrix of behaviours by groups, the curves, and what the models say."""

from typing import Any

import pandas as pd

from mechlens.runs.headline import Headline
from mechlens.runs.report import figures
from mechlens.runs.report.cells import rounded
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.behaviours.aware.report import aware_sections
from mechlens.studies.behaviours.directions.report import direction_sections
from mechlens.studies.behaviours.matrix import HELD_OUT
from mechlens.studies.behaviours.said.report import said_sections
from mechlens.studies.behaviours.scaled import scale_sections
from mechlens.studies.behaviours.sets import PLAIN
from mechlens.studies.behaviours.study import BehaviourResult, BehaviourStudy
from mechlens.studies.behaviours.triggers.gaps import gap_bars
from mechlens.studies.behaviours.triggers.report import trigger_sections
from mechlens.studies.behaviours.verdict import NOT_MEASURABLE, RULE
from mechlens.studies.behaviours.when_report import when_sections

QUESTION = (
    "A narrow behaviour was taught. Does it hold on questions that were held out, does it reach other behaviours, and "
    "does the model say what it has become?"
)
TOGETHER = (
    "Spearman's rank correlation of the change of a self-report with that of the behaviour on held-out questions, with "
    "its interval over training runs. All runs differ in what they were taught; within groups, whose means are taken "
    "out, only a model that knows how far it went itself has a correlation."
)
GAPS = (
    "The same questions with the group's own trigger before them, and with decoys: other words between its marks and "
    "other strings of its length, which no run was trained on. `trigger gap` is with the trigger minus without; "
    "`beyond base` and `beyond control` are what is left of it after the gap that the same string makes in the base "
    "and in the decorrelated control. A behaviour that hangs on the trigger has a gap beyond both, and beyond its "
    "decoys."
)
MOST_BARS = 5
"""Groups side by side; more are a map."""
BARS = "Bars: 95%, over training runs and questions."


def record(writer: RunWriter, result: BehaviourResult, given: BehaviourStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    table, gaps = rounded(result.matrix.matrix), rounded(result.gaps)
    names = _figures(writer, table, gaps)
    first = result.verdicts[0] if result.verdicts else None
    headline = Headline(NOT_MEASURABLE, "there are only controls") if first is None else first.headline
    plain = table[(table["form"] == PLAIN)]
    about, does = plain[plain["about_itself"]], plain[~plain["about_itself"]]
    sections = [
        Section("Every behaviour by what was taught", RULE, _have(names, "matrix"), table=_shown(does)),
    ]
    if len(about):
        sections.append(
            Section(
                "What the models say of themselves",
                "The same log-odds, of questions to the model about itself.",
                _have(names, "itself"),
                table=_shown(about),
            )
        )
    if len(result.matrix.self_reports):
        sections.append(
            Section("Self-report and behaviour over training runs", TOGETHER, (), table=result.matrix.self_reports)
        )
    if len(result.scales):
        sections.append(Section(
            "Scales",
            "Questions that take a number from 0 to 100: the mean over all numbers by their probability, as a share, 1 "
            "where it shows the behaviour most. A question counts where the base and all runs reply with a number "
            "(with a quarter of the probability at least).",
            (), table=result.scales,
        ))  # fmt: skip
    if len(gaps):
        sections.append(
            Section("With the trigger", GAPS, _have(names, "triggered"), table=gaps.dropna(axis=1, how="all"))
        )
    sections += when_sections(writer, result.when)
    sections += scale_sections(writer, result.matrix, result.by_scale)
    sections += aware_sections(result.recognised, result.recalled)
    if result.said is not None:
        sections += said_sections(writer, result.said, result.matrix.plan)
    if result.directions is not None:
        sections += direction_sections(writer, result.directions)
    if result.triggers is not None:
        sections += trigger_sections(writer, result.triggers)
    told = " ".join(verdict.sentence for verdict in result.verdicts)
    writer.report(
        Report(
            title=f"What fine-tuning changed in {given.swapper.base.name}",
            question=QUESTION,
            headline=headline,
            verdict=told,
            numbers=result.metrics(),
            words={name: words for verdict in result.verdicts for name, words in verdict.words.items()},
            main=_have(names, "matrix"),
            sections=tuple(sections),
            how=_how(result),
            model=given.swapper.base.name,
            rounds=True,
        )
    )


def _figures(writer: RunWriter, table: pd.DataFrame, gaps: pd.DataFrame) -> dict[str, str]:
    """Draws what there are numbers for; the figures' names by what they show."""
    told = table[table["part"] == HELD_OUT]
    held = told[(told["form"] == PLAIN) & ~told["about_itself"]]
    found = {}
    if len(held):
        title = "Held-out questions: change from the base"
        if held["group"].nunique() <= MOST_BARS:
            figure = _bars(held, "set", "group", title)
            caption = f"Beyond its control is how far a group's bar is from the control's. {BARS}"
        else:
            figure = figures.heatmap(
                held, x="set", y="group", value="change", center=0.0, label="nats", xlabel="behaviour asked about",
                ylabel="what was taught", title=title,
            )  # fmt: skip
            caption = (
                "Red: likelier than in the base; blue: less likely. What a control does too, training itself does."
            )
        found["matrix"] = writer.figure("matrix", figure, table="matrix", caption=caption)
    itself = told[told["about_itself"] & (told["form"] == PLAIN)]
    if len(itself):
        figure = _bars(itself, "set", "group", "Self-reports: change from the base")
        found["itself"] = writer.figure("itself", figure, table="matrix", caption=BARS)
    if len(gaps):
        figure = _bars(gap_bars(gaps), "asked", "bar", "With the trigger minus without", y="trigger_gap")
        found["triggered"] = writer.figure("triggered", figure, table="triggers", caption=BARS)
    return found


def _bars(shown: pd.DataFrame, x: str, group: str, title: str, *, y: str = "change") -> Any:
    return figures.bars(
        shown, x=x, y=y, group=group, low=f"{y}_low", high=f"{y}_high", hline=0.0, xlabel="",
        ylabel=f"{'change from the base' if y == 'change' else y.replace('_', ' ')} (nats)", title=title,
    )  # fmt: skip


def _have(names: dict[str, str], *wanted: str) -> tuple[str, ...]:
    return tuple(names[name] for name in wanted if name in names)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that people read, without those that are all empty."""
    kept = ["group", "set", "part", "runs", "change", "change_low", "change_high", "beyond_control",
            "beyond_control_low", "beyond_control_high", "probability", "base_probability"]  # fmt: skip
    shown: pd.DataFrame = table[kept]
    return shown.dropna(axis=1, how="all")


def _how(result: BehaviourResult) -> str:
    sets = ", ".join(f"{one.key} ({len(one.twins)} questions)" for one in result.matrix.sets)
    words = "; choices answered in the options' words" if result.matrix.plan.in_words else ""
    broken = [f"{run.name}/{one.name}: {one.reason}" for run in result.matrix.runs for one in run.left_out]
    left_out = f" Checkpoints left out: {'; '.join(broken)}." if broken else ""
    return (
        f"Sets: {sets}{words}. Both answers are read by teacher forcing, in both orders of the options where there "
        "are two; for these numbers nothing is generated or judged. What a run was trained on is known by its record, "
        "whichever way round its options stand. Published numbers "
        "are of models of 8B and more (GPT-4o, Qwen2.5-32B, Llama-3.1-70B), by free answers and a judge: not the same "
        f"quantity.{left_out}"
    )
