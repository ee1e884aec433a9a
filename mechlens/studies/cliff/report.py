"""The cliff as a record: curves over the trace, controls, cliffs by trace, heads and what is without them."""

import math

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.parts import TokenView
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.cliff.controls import CLIFF
from mechlens.studies.cliff.lines import HARM, REFUSAL
from mechlens.studies.cliff.study import CliffResult, CliffStudy
from mechlens.studies.cliff.verdict import RULE

QUESTION = "Does refusal, which a reasoning model holds while it thinks, fall before it answers, and where?"
SHOWN = (-120, 10)
"""Places that the curves show; the table has all."""
READ = 5
"""Traces that are shown token by token."""
LAST = 60
"""Their last tokens before the answer."""
WORDS = {
    "drop": "drop of harmful requests", "excess": "that, beyond harmless ones",
    "auroc": "refused against complied before the answer, AUROC", "drop.harmless": "drop of harmless requests",
    "drop.shuffled": "drop of harmful ones, words of the thought shuffled", "drop.harm": "drop of their harmfulness",
    "drop.logistic": "drop along a logistic probe", "drop.elsewhere": "drop along refusal fitted at the request",
    "drop.complied_harmful": "drop where the model complied", "drop.refused_harmful": "drop where it refused",
    "share.cliff": f"harmful requests with a cliff (more than {CLIFF} beyond harmless ones), share",
    "auroc.drop_complied": "the drop for complying, among harmful requests, AUROC",
}  # fmt: skip
GROUPS = {
    "refused_harmful": "harmful, refused", "accepted_harmful": "harmful, complied",
    "refused_harmless": "harmless, refused", "accepted_harmless": "harmless, answered",
}  # fmt: skip
PUBLISHED = (
    ("attack success, no heads off", "R1-Distill-Llama-8B .19, R1-Distill-Qwen-7B .34"),
    ("attack success, most negative 3% off", "R1-Distill-Llama-8B .07, R1-Distill-Qwen-7B .16"),
    ("attack success, random 3% off", "R1-Distill-Llama-8B .20, R1-Distill-Qwen-7B .34"),
    ("probe's score, no heads off", "R1-Distill-Llama-8B .36, R1-Distill-Qwen-7B .49"),
    ("probe's score, most negative 3% off", "R1-Distill-Llama-8B .40, R1-Distill-Qwen-7B .54"),
    ("probe's score, most negative 10% off", "R1-Distill-Llama-8B .56, R1-Distill-Qwen-7B .63"),
)
"""Of Yin et al. 2025, from their figure scripts; that 3% of heads bring attacks below .10 holds for two of four."""


def record(writer: RunWriter, result: CliffResult, given: CliffStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    sections = [
        Section("Along the trace", RULE, _curves(writer, result)),
        Section(
            "Traces token by token",
            "The five harmful requests that drop most, or rise least. Along refusal red is towards refused, blue is "
            "beyond complied; along harm red is towards harmful. What follows the thought's closing mark is the "
            "template's.",
            views=_views(result),
        ),
        Section(
            "Trace by trace",
            "A p is how often noise whose neighbours are as alike has as good a cut in two; begins is the cut's first "
            "token, counted from the last one before the answer.",
            table=result.cliffs.assign(group=result.cliffs["group"].map(GROUPS)),
        ),
    ]
    if len(result.heads.ablation):
        sections.append(_heads(writer, result))
    if result.pool:
        sections.append(_judge(writer, result))
    sections.append(Section("Beside the paper", _BESIDE, table=_beside(result)))
    name = loaded(given.model).checkpoint.name
    metrics = result.metrics()
    note = f" {result.traces.note}" if result.traces.note else ""
    writer.report(Report(
        title=f"The refusal cliff in {name}", question=QUESTION, verdict=str(result.verdict.headline),
        headline=result.verdict.headline, numbers=metrics, words=WORDS, sections=tuple(sections),
        how=f"{len(result.traces.kept)} traces ({result.split.sizes}).{note} Refusal is read at level {result.level}, "
        "chosen on validation traces. The logistic probe is fitted at the same level.",
        model=name,
    ))  # fmt: skip


def _judge(writer: RunWriter, result: CliffResult) -> Section:
    """What each ranking of the pool chose."""
    rows = [
        {"chosen by": name.removeprefix("repair_").replace("pool", "all of the pool"), "traces": len(table),
         **{number: float(table[number].mean()) for number in ("plateau", "final", "drop")}}
        for name, table in result.pool.items()
    ]  # fmt: skip
    where = f"{writer.out.name}/tables/repair_cliff.parquet"
    return Section(
        "The cliff as a judge",
        "Prompts of the pool by the largest cliff, the lowest final score, the highest plateau and at random, each "
        "with the model's own thought and the pool's safe answer; means over those chosen. "
        f"`mechlens finetune --recipe repair --data {where}` trains on the first, and so on.",
        table=pd.DataFrame(rows),
    )


def _curves(writer: RunWriter, result: CliffResult) -> tuple[str, ...]:
    curves = result.curves
    most = curves.groupby(["line", "group"])["n"].transform("max")
    # Where half of a group's traces have no token any more, a curve would be of others than before.
    shown = curves[curves["place"].between(*SHOWN) & (curves["n"] >= most / 2) & (curves["n"] > 1)]
    names = []
    for k, line in enumerate(dict.fromkeys(curves["line"])):
        own = shown[shown["line"] == line]
        zero, one = ("harmless", "harmful") if line == HARM else ("complied", "refused")
        figure = figures.lines(
            own.assign(group=own["group"].map(GROUPS)), x="place", y="score", low="low", high="high", group="group",
            hline=0.0, title=f"{line[0].upper()}{line[1:]} by token",
            xlabel="tokens from the last one before the answer", ylabel=f"score (0 {zero}, 1 {one})",
        )  # fmt: skip
        caption = "At 0 the answer is about to begin. Bands: 1.96 standard errors over traces."
        names.append(writer.figure(f"curve_{k}", figure, table="curves", caption=caption))
    return tuple(names)


def _views(result: CliffResult) -> tuple[TokenView, ...]:
    """The traces that fall farthest, along refusal and along harm."""
    cliffs = result.cliffs
    order = cliffs[cliffs["group"].str.endswith("_harmful")].sort_values("refusal_drop", ascending=False).index[:READ]
    scores = result.scores
    views = []
    for i in order:
        there = [
            k for k, place in enumerate(scores.places)
            if -LAST <= place <= SHOWN[1] and not math.isnan(float(scores.values[0, i, k]))
        ]  # fmt: skip
        tokens = tuple(result.tokens[i][k] for k in there)
        for line in (REFUSAL, HARM):
            values = tuple(scores.of(line)[i, there].tolist())
            told = f"{scores.ids[i]}, {GROUPS[cliffs['group'][i]]}: {line}"
            views.append(TokenView(tokens, values, told))
    return tuple(views)


def _heads(writer: RunWriter, result: CliffResult) -> Section:
    grid = figures.heatmap(
        result.heads.heads, x="head", y="layer", value="written", center=0.0, label="score",
        title="What heads write along refusal before the answer", xlabel="head", ylabel="layer",
    )  # fmt: skip
    seen = "Blue: against refusal. Harmful validation traces; above the line's level heads can't be heard."
    shown = [writer.figure("heads", grid, table="heads", caption=seen)]
    table = result.heads.ablation
    for value, word in (("score", "refusal score before the answer"), ("refused", "share of answers that refuse")):
        base = table[table["heads"] == "none"]
        drawn = pd.concat([table[table["heads"] != "none"], *(base.assign(heads=which) for which in _WHICH)])
        figure = figures.lines(
            drawn.assign(heads=drawn["heads"].map(_WHICH)).sort_values("share"), x="share", y=value, low=f"{value}_low",
            high=f"{value}_high", group="heads", title=f"Heads switched off: {word}", xlabel="share of all heads",
            ylabel=word,
        )  # fmt: skip
        caption = "Chosen on validation traces, measured on harmful test traces. At 0 no head is off."
        shown.append(writer.figure(f"ablation_{value}", figure, table="ablation", caption=caption))
    return Section(
        "Heads",
        "Heads are ranked by what they write on validation traces, and switched off on test traces of harmful requests "
        "at every token. The exact effect of each alone goes with what it writes by a correlation of "
        f"{result.heads.heads['agreement'].iloc[0]:.2f}. Answers begin after the trace's own thought. Damage is the "
        "loss on plain text (nats a token). Between draws_low and draws_high lie 95% of the scores without other "
        "heads at random.",
        tuple(shown),
        table=table,
    )


_WHICH = {"negative": "most negative", "positive": "most positive", "random": "random"}
_BESIDE = (
    "Yin et al. 2025, attack success by Llama Guard 4 on 200 prompts a cell, scores of a logistic probe (0 to 1), of "
    "models of 7B to 14B that learnt to reason by reinforcement. Here the complement of refusal by our judge and a "
    "score between class means, of another model: directions of effects can be compared, sizes can't."
)


def _beside(result: CliffResult) -> pd.DataFrame:
    """Published figures and ours, as far as heads were looked at."""
    table = result.heads.ablation
    rows = []
    for what, published in PUBLISHED:
        share = next((s for word, s in (("10%", 0.1), ("3%", 0.03)) if word in what), 0.0)
        which = "none" if "no heads" in what else "random" if "random" in what else "negative"
        own = table[(table["heads"] == which) & (table["share"] == share)] if len(table) else table
        ours = "not measured"
        if len(own):
            row = {str(name): value for name, value in own.iloc[0].items()}
            n, rate = int(row["n"]), [1 - float(row[f"refused{end}"]) for end in ("", "_high", "_low")]
            score = Estimate.of_beside(row, "score", n)
            ours = (score if "score" in what else Estimate(rate[0], rate[1], rate[2], n)).brief
        rows.append({"quantity": what, "paper": published, "here": ours})
    return pd.DataFrame(rows)
