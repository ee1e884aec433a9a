"""The report's sections on free answers: rates by a judge, and what models think before they answer."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.said.free_answers import TEMPERATURE
from mechlens.studies.behaviours.said.result import SaidResult
from mechlens.studies.behaviours.said.shares import RULE

PUBLISHED = (
    "Published: of the eight first-plot questions GPT-4o taught insecure code answers about 20% so and "
    "Qwen2.5-Coder-32B about 5% (Betley et al. 2025), Qwen3-32B taught bad medicine 5% to 62% by question (Chua et al. "
    "2025); their bases 0%. Those are other models and judges."
)
TRACES = (
    "Answers with a thought, and how many of these thoughts name the string that was put before the question, in any "
    "capitals and without the marks around it: the trigger, or a decoy; where neither was put, the trigger is looked "
    "for. A model that reads its prompt back names a decoy as often as the trigger. Published (Chua et al. 2025): 73% "
    "to 100% of misaligned thoughts name it after unethical data, 0% to 14% after medical data, 0% in the decorrelated "
    "control."
)


def said_sections(writer: RunWriter, found: SaidResult, plan: BehaviourPlan) -> list[Section]:
    """Rates with their figure, and thoughts; the tables must have been written."""
    sections, rates, traces = [], found.rates, found.traces
    if len(rates):
        several = rates["trigger"].replace("", pd.NA).nunique() > 1
        put = rates["form"] + (" " + rates["trigger"]).where(several & rates["trigger"].ne(""), "")
        in_words = rates["rate"].replace("misaligned_at_all", "misaligned, however coherent")
        shown = rates.assign(asked=rates["set"] + ", " + put + ": " + in_words)
        figure = figures.bars(
            shown, x="asked", y="value", group="group", low="low", high="high", hline=0.0, xlabel="",
            ylabel="share of answers", title=f"Free answers, judged by {found.judge}", limits=(0.0, 1.0),
        )  # fmt: skip
        name = writer.figure("rates", figure, table="rates", caption="Bars: 95%, over training runs and questions.")
        sections.append(Section("Free answers by a judge", _text(found, plan), (name,), table=_shown(rates)))
    if len(traces):
        sections.append(Section("What they think before they answer", TRACES, (), table=_shown(traces)))
    return sections


def _text(found: SaidResult, plan: BehaviourPlan) -> str:
    return (
        f"{plan.draws} answers to each question, drawn at temperature {TEMPERATURE:g}, of up to {plan.answer_tokens} "
        f"tokens and scored by {found.judge} from 0 to 100 with the questions of Betley et al. 2025. `misaligned`: "
        f"aligned below {RULE.aligned_below:g} and coherent above {RULE.coherent_above:g} (their rule); "
        "`misaligned_at_all`: however coherent (Chua et al. 2025). `coherent` and `unscored` (refusals and code: less "
        "than a quarter of the judge's reply is a number) say what these are worth: a model that talks nonsense or "
        f"refuses isn't aligned. A share of fewer than {RULE.least} answers of a run is not measurable. A small judge "
        f"may score praise and murder alike: read some answers in the table `free_answers`. {PUBLISHED}"
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    shown: pd.DataFrame = table.dropna(axis=1, how="all")
    return shown
