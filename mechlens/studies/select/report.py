"""A selection as a record: the score table of every candidate, the chosen direction, figures and a report."""

import pandas as pd

from mechlens.errors import many
from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.select.study import Selection, rule_of
from mechlens.studies.select.verdict import KL, SelectionVerdict, selection_verdict
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.rounding import logit_rounding

QUESTION = (
    "Is there one direction whose removal stops this model from refusing, and whose addition makes it refuse? Every "
    "post-instruction position and level gives a candidate; which one does it with the least side effect, and does any "
    "random direction do as well (Arditi et al. 2024)?"
)
SCORES = {
    "bypass": "Refusal score of harmful prompts, direction ablated (lower is better)",
    "induce": "Refusal score of harmless prompts, direction added (higher is better)",
    "kl": "KL of harmless prompts, direction ablated (nats; lower is better)",
}
SEES = {
    "bypass": "Blue: taking the direction out ends the refusal of harmful prompts. A good candidate is full blue here.",
    "induce": "Red: adding the direction has harmless prompts refused. A good candidate is full red here.",
    "kl": "Full blue: taking the direction out changes harmless answers too. A good candidate is plain here.",
}
NUMBERS = {
    "bypass_shift": "harmful: change of the refusal score, direction ablated",
    "bypass_shift.beyond_chance": "harmful, direction ablated: score minus that under the best of random",
    "induce_shift": "harmless: change of the refusal score, direction added",
    "induce_shift.beyond_chance": "harmless, direction added: score minus that under the best of random",
    "refusal_score.harmful.ablated": "harmful: refusal score, direction ablated",
    "refusal_score.harmful.ablated.random_min": "harmful: lowest score, random directions ablated",
    "refusal_score.harmful.ablated.random_best": "harmful: score, best random candidate ablated",
    "refusal_score.harmless.added": "harmless: refusal score, direction added",
    "refusal_score.harmless.added.random_max": "harmless: highest score, random directions added",
    "refusal_score.harmless.added.random_best": "harmless: score, best random candidate added",
}

CONTROLS = (
    "the best random candidate, which is the one that bypasses most on validation where directions are ablated, and "
    "the one that induces most where they are added"
)
SHIFTS = {
    "bypass_shift": "the change of the refusal score with the direction taken out",
    "induce_shift": "the change of the refusal score with the direction added",
}
"""What rounding has to be small against."""


def record(writer: RunWriter, result: Selection, sets: ContrastSets) -> None:
    """Writes everything the selection found into an open run."""
    writer.result(result)
    names = _figures(writer, result, result.candidates())
    writer.report(_report(result, selection_verdict(result), names, sets))


def _figures(writer: RunWriter, result: Selection, candidates: pd.DataFrame) -> dict[str, str]:
    """Draws every figure that there are numbers for; their names by what they show."""
    real = candidates[candidates["kind"] == "candidate"]
    for score, title in SCORES.items():
        figure = figures.heatmap(
            real, x="position", y="level", value=score, title=title, xlabel="position", ylabel="level", label=score,
            center=None if score == "kl" else 0.0,
        )  # fmt: skip
        figure.update_layout(height=560)
        writer.figure(f"scores_{score}", figure, table="candidates", caption=SEES[score])
    scored = candidates.dropna(subset=["bypass", "induce"]).assign(
        group=candidates["kind"].where(candidates["status"] != "chosen", "chosen " + candidates["kind"])
    )
    figure = figures.scatter(
        scored, x="bypass", y="induce", group="group", hover=["position", "level", "kl", "status"],
        hline=0.0, vline=0.0,
        title="Every candidate beside as many random directions",
        xlabel="harmful, direction ablated: refusal score (log-odds)",
        ylabel="harmless, direction added: refusal score (log-odds)",
    )  # fmt: skip
    writer.figure(
        "candidates", figure, table="candidates",
        caption="Towards the top left: refusal goes when the direction is ablated, and comes when it is added.",
    )  # fmt: skip
    names = {score: f"scores_{score}" for score in SCORES} | {"candidates": "candidates"}
    return names | ({} if result.test is None else {"test": _test_figure(writer, result)})


def _test_figure(writer: RunWriter, result: Selection) -> str:
    assert result.test is not None
    metrics = result.test.metrics()
    rows = [
        {"prompts": prompts, "direction": shown, **score.row("score")}
        for prompts, name, extreme in (("harmful", "ablated", "min"), ("harmless", "added", "max"))
        for shown, suffix in (
            ("none", None), ("chosen", ""), ("best random candidate", ".random_best"), ("random, mean", ".random"),
            ("random, extreme", f".random_{extreme}"),
        )
        if (score := metrics[f"refusal_score.{prompts}" + ("" if suffix is None else f".{name}{suffix}")]).measurable
    ]  # fmt: skip
    table = pd.DataFrame(rows).drop(columns="n")
    writer.table("test_scores", table)
    figure = figures.bars(
        table, x="prompts", y="score", group="direction", low="low", high="high", hline=0.0,
        title="Test prompts: refusal score with the direction ablated (harmful) and added (harmless)", xlabel="",
        ylabel="refusal score (log-odds)",
    )  # fmt: skip
    caption = (
        "The chosen direction should be lower than random ones where it is ablated and higher where it is added. Bars: "
        "95% bootstrap over prompt families."
    )
    return writer.figure("test_scores", figure, table="test_scores", caption=caption)


def _report(result: Selection, verdict: SelectionVerdict, names: dict[str, str], sets: ContrastSets) -> Report:
    best = result.found.table().query("status == 'chosen' or status == 'kept'").sort_values("bypass").head(10)
    tested = [] if result.test is None else [_tested(result, names)]
    known = loaded(sets.model)
    shifts = {SHIFTS[name]: estimate for name, estimate in verdict.deciding.items() if name in SHIFTS}
    return Report(
        title=f"One direction for refusal in {known.checkpoint.name}",
        question=QUESTION,
        headline=verdict.headline,
        verdict=f"{verdict.word.capitalize()}. {verdict.sentence}" + logit_rounding(known.parity, shifts),
        numbers=verdict.deciding,
        words=NUMBERS | {KL: f"harmless: KL, direction ablated (limit {result.plan.highest_kl:g})"},
        main=(names["test"],) if "test" in names else (),
        sections=(
            Section(
                "Scores of every candidate",
                "Means over validation prompts. Bypass: refusal score of harmful prompts with the direction taken out "
                "of every site, layer and token. Induce: that of harmless prompts with the direction added once, at "
                "its own level. KL: how far ablating moves the next token of harmless prompts. These are "
                f"{result.found.scores.kl.shape[1]} harmless prompts with a refusal score below 0, and "
                "means without intervals: the KL on all test prompts, with its interval, stands with the verdict.",
                (names["bypass"], names["induce"], names["kl"]),
                table=best,
            ),
            Section(
                "What the filters left",
                f"{rule_of(result.plan).words} "
                f"As many random directions of the same lengths went through the same filters. {_controls(result)}",
                (names["candidates"],),
                table=result.filters(),
            ),
            *tested,
            Section(
                "Which prompts chose",
                "Harmful prompts with a refusal score above 0 and harmless ones with one below 0 make and choose the "
                "direction; on test every prompt counts.",
                table=result.sizes(),
            ),
        ),
        how=_how(result, verdict, sets),
        model=known.checkpoint.name,
    )


def _controls(result: Selection) -> str:
    """Where the best random candidate comes from, though the filters may keep none."""
    n = len(result.random.pool)
    if not n:
        return "None was left to compare with."
    return (
        "Few or none of them induce refusal, so the random controls need not pass the induce filter: of the "
        f"{many(n, 'random direction')} that passed the others, the test has {CONTROLS}."
    )


def _tested(result: Selection, names: dict[str, str]) -> Section:
    shown = result.steered_answers().groupby("done").head(4)
    return Section(
        "The chosen direction on test prompts",
        f"Beside it: {CONTROLS if result.random.pool else 'no random candidate, for none was left'}, and "
        f"{result.plan.random_directions} random directions of its own length at its own level. "
        "Answers below are greedy, before and after.",
        (names["test"],),
        table=shown,
    )


def _how(result: Selection, verdict: SelectionVerdict, sets: ContrastSets) -> str:
    tokens, known = result.first_token.tokens, loaded(sets.model)
    coverage = "" if tokens.coverage is None else f" with coverage {tokens.coverage:.2f}"
    return (
        f"The rule of the verdict. {verdict.rule}\n\nRefusal tokens: {tokens.named}, {tokens.origin}{coverage}. "
        f"Prompt families are shared out by class. Prompts: {sets.punctuation}.\n\nIntervals: 95% bootstrap over "
        f"prompt families ({result.plan.resamples} resamples), directions frozen. Refusal rates: the list "
        f"`{result.judged.judge}` on greedy answers of "
        f"{result.plan.max_new_tokens} tokens. Weights: {known.checkpoint.regime}, answers by the "
        f"{result.judged.answers.engine} engine."
    )
