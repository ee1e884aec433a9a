"""A controller and its rivals as a record: who refuses what, what it costs, what the controller decides."""

from typing import Any

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.controllers.asked import Asked
from mechlens.studies.controllers.rivals import ABOUT, CONTROLLER
from mechlens.studies.controllers.study import ControllerResult
from mechlens.studies.controllers.verdict import RULE

QUESTION = (
    "Does steering that decides for each prompt, how strongly and at which layers, refuse more of what is harmful and "
    "less of what isn't than steering by a constant, and at what cost?"
)
WORDS = {
    "gap.controller": "controller: refused harmful minus refused harmless",
    "gap.constant": "constant steering: refused harmful minus refused harmless",
    "beyond_constant": "controller minus constant",
    "beyond_none": "controller minus no steering",
    "auroc.gate": "harmful among test prompts by the controller's gate, AUROC",
    "beyond_shuffled": "first token: own layer weights minus the same in other orders",
    "shuffled_p": "first token: p of the own layer weights among other orders",
}
PUBLISHED = (
    (
        "harmful prompts refused (ToxicChat), no steering",
        "Llama-3.1-8B .32",
        "another source",
        "harmful",
        "no steering",
    ),
    ("the same, controller", "Llama-3.1-8B .93", "another source", "harmful", "as published"),
    ("the same, uniform weights", "Llama-3.1-8B .72", "another source", "harmful", "uniform weights"),
    ("the same, conditional (CAST)", "Llama-3.1-8B .46", "another source", "harmful", "conditional"),
    ("the same, heads (ITI)", "Llama-3.1-8B .50", "another source", "harmful", "heads"),
    ("jailbreaks refused, no steering", "Llama-3.1-8B .12", "in jailbreak templates", "harmful", "no steering"),
    ("jailbreaks refused, controller", "Llama-3.1-8B .79", "in jailbreak templates", "harmful", "as published"),
)
"""Of Hegazy et al. 2025, version 3: the quantity, theirs, and where ours stands."""
_BESIDE = (
    "Hegazy et al. 2025 report refusals of an 8B model, judged by a language model, over all prompts of ToxicChat, "
    "toxic and not; they report no harmless prompts that look alarming. Ours are of another model and other harmful "
    "prompts, so the order of rivals can be compared and sizes can't."
)


def record(writer: RunWriter, result: ControllerResult, asked: Asked) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    name = loaded(asked.model).checkpoint.name
    n = {place: len(part) for place, part in asked.tests.items()}
    writer.report(Report(
        title=f"A steering controller for {name}", question=QUESTION, verdict=str(result.verdict.headline),
        headline=result.verdict.headline, numbers=result.metrics(), words=_words(result),
        sections=_sections(writer, result),
        how=f"Trained on {len(asked.split.train)} prompts; strengths, heads and the threshold chosen with "
        f"{len(asked.split.validation)}; tested on {', '.join(f'{many} {place}' for place, many in n.items())}. "
        f"{asked.punctuation}",
        model=name,
    ))  # fmt: skip


def _words(result: ControllerResult) -> dict[str, str]:
    refused = [name for name in result.metrics() if name.startswith("refused.")]
    told = {name: name.split(".") for name in refused}
    return WORDS | {
        name: f"controller: {label} prompts refused, {place.replace('_', ' ')}"
        for name, (_, place, label) in told.items()
    }


def _sections(writer: RunWriter, result: ControllerResult) -> tuple[Section, ...]:
    told = pd.DataFrame({"rival": list(result.rivals.at), "what it does": [ABOUT[name] for name in result.rivals.at]})
    return (
        Section("Who refuses what", RULE, _refused(writer, result), table=_wide(result)),
        Section("The rivals", result.rivals.left_out, table=told),
        Section(
            "What it costs",
            "Difference: refused harmful minus refused harmless test prompts. KL: of harmless test prompts, from the "
            "unsteered model, over its own answers (nats a token); plain: the same, and the loss, where the answer is "
            "plain text. Tokens and repetition: of answers to harmless prompts.",
            table=_costs(result),
        ),
        Section("What the controller decides", _DECIDES, _decided(writer, result)),
        Section(
            "Strengths",
            "Every rival's refusals of validation prompts at every strength, in shares of the residual norm that a "
            "layer adds at most; the weakest of the best is taken. Of heads, a strength of .1 is ten standard "
            "deviations.",
            table=result.choice,
        ),
        Section("Beside the paper", _BESIDE, table=_beside(result)),
    )  # fmt: skip


_DECIDES = (
    "Gates of test prompts: how strongly the controller steers each of them. The published gate is no probability: "
    "trained towards 0 and 1, it may lie beside them. Layer weights: means over test prompts."
)


def _refused(writer: RunWriter, result: ControllerResult) -> tuple[str, ...]:
    """A figure for each source of test prompts."""
    names = []
    for i, place in enumerate(dict.fromkeys(result.refusals["prompts"])):
        figure = figures.bars(
            result.refusals[result.refusals["prompts"] == place], x="rival", y="refused", group="label",
            low="refused_low", high="refused_high", limits=(0.0, 1.0),
            title=f"Share of test prompts that are refused: {place}", xlabel="", ylabel="share refused",
        )  # fmt: skip
        caption = "Harmful prompts should be refused, harmless ones answered. Bars: 95% bootstrap over prompt families."
        names.append(
            writer.figure("refusals" if i == 0 else f"refusals_{i}", figure, table="refusals", caption=caption)
        )
    return tuple(names)


def _wide(result: ControllerResult) -> pd.DataFrame:
    """A row a rival, a column a set of prompts."""
    table = result.refusals
    told = table.assign(
        set=table["label"] + ", " + table["prompts"],
        refused=[_brief(row, "refused") for _, row in table.iterrows()],
    )
    wide = told.pivot(index="rival", columns="set", values="refused")
    return wide.reindex(list(result.rivals.at))[list(dict.fromkeys(told["set"]))].reset_index()


COSTS = {
    "gap": "difference", "kl": "KL", "plain_kl": "KL, plain", "plain_loss": "loss, plain", "tokens": "tokens",
    "repetition": "repetition",
}  # fmt: skip


def _costs(result: ControllerResult) -> pd.DataFrame:
    """A row a rival, and its costs with their intervals."""
    return pd.DataFrame([
        {"rival": row["rival"], "strength": row["strength"]} | {said: _brief(row, name) for name, said in COSTS.items()}
        for _, row in result.totals.iterrows()
    ])  # fmt: skip


def _brief(row: "pd.Series[Any]", name: str) -> str:
    return Estimate.of_beside(row, name, 0).brief


def _decided(writer: RunWriter, result: ControllerResult) -> tuple[str, ...]:
    gates = figures.histogram(
        result.decisions, value="gate", group="label", title="Gates of test prompts", xlabel="gate"
    )
    weights = result.weights[result.weights["controller"] == CONTROLLER]
    lines = figures.lines(
        weights, x="layer", y="weight", group="label", hline=0.5, title="Layer weights", xlabel="layer", ylabel="weight"
    )
    return (
        writer.figure("gates", gates, table="decisions", caption="At 0 a prompt isn't steered, at 1 fully."),
        writer.figure("weights", lines, table="weights", caption="At .5 all layers weigh alike."),
    )


def _beside(result: ControllerResult) -> pd.DataFrame:
    rows = []
    for what, theirs, place, label, rival in PUBLISHED:
        table = result.refusals
        own = table[(table["prompts"] == place) & (table["label"] == label) & (table["rival"] == rival)]
        ours = "not measured"
        if len(own):
            ours = _brief(own.iloc[0], "refused")
        rows.append({"quantity": what, "paper": theirs, "here": ours})
    return pd.DataFrame(rows)
