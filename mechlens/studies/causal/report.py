"""The causal battery as a record: metrics, tables, figures, the two directions and a report."""

import pandas as pd

from mechlens.methods.behaviour.inversion import SCOPES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.causal.directions import HARMFUL, HARMLESS
from mechlens.studies.causal.study import Battery
from mechlens.studies.causal.verdict import CausalVerdict, causal_verdict
from mechlens.studies.shared.harm_sets import ContrastSets

QUESTION = (
    "Does the harmfulness direction change what the model believes about a request, while the refusal direction only "
    "changes whether it refuses (Zhao et al. 2025)? Belief is asked for by reply inversion: 'Certainly' if the request "
    "is harmful, otherwise 'No', so that believing in harm and being unwilling to answer move the reply apart."
)
MAX_CHANGED = 6
"""Answers shown for each direction."""
NUMBERS = {
    "inversion_auroc.unsteered": "AUROC of the unsteered reply",
    "inversion_parsed": "unsteered replies that say one of the two words",
    "refusal_rate.harmless": "harmless refused, unsteered",
    "refusal_rate.harmful": "harmful refused, unsteered",
    "inversion_shift.harmfulness.before": "reply shift, harmfulness before the question",
    "inversion_shift.harmfulness.before.random_max": "reply shift before, largest of random",
    "inversion_shift.harmfulness.before.shuffled_max": "reply shift before, largest of shuffled",
    "inversion_shift.harmfulness.all": "reply shift, harmfulness everywhere",
    "inversion_shift.harmfulness.all.random_max": "reply shift everywhere, largest of random",
    "inversion_shift.refusal.before": "reply shift, refusal before the question",
    "inversion_shift.refusal.before.random_max": "reply shift before, largest of random (refusal's place)",
    "inversion_shift.refusal.all": "reply shift, refusal everywhere",
    "inversion_shift.refusal.all.random_max": "reply shift everywhere, largest of random (refusal's place)",
    "steer_refusal.refusal": "refusal log-odds, refusal added",
    "steer_refusal.refusal.random_max": "refusal log-odds, largest of random",
    "steer_refusal.refusal.shuffled_max": "refusal log-odds, largest of shuffled",
}
"""What decides the verdict, in words."""


def record(writer: RunWriter, result: Battery, sets: ContrastSets) -> None:
    """Writes everything the battery found into an open run."""
    verdict = causal_verdict(result)
    writer.result(result)
    writer.report(_report(result, verdict, draw(writer, result), sets))


def _report(result: Battery, verdict: CausalVerdict, drawn: dict[str, tuple[str, ...]], sets: ContrastSets) -> Report:
    checkpoint = loaded(sets.model).checkpoint
    return Report(
        title=f"What two directions do in {checkpoint.name}",
        question=QUESTION,
        verdict=f"{verdict.word.capitalize()}. {verdict.sentence}",
        numbers={
            NUMBERS[name]: estimate
            for name, estimate in verdict.deciding.items()
            if estimate.measurable or not name.endswith("_max")
        },
        sections=(
            _scopes(result, drawn),
            Section(
                "By layer",
                "On validation prompts. The layer and strength of each direction were chosen here, by the push of what "
                "it is claimed to do: harmfulness by the shift of the reply before the question, refusal by the "
                "log-odds of refusal. Of the pushes inside the interval of the largest the weakest strength is taken, "
                "and at it the layer that pushes most; not from the last fifth of the depth.",
                drawn["curves"],
            ),
            Section("Refusals by layer", "", drawn["rates"]),
            _answers(result),
            _damage(result, drawn),
        ),
        how=_how(result, verdict, sets.punctuation),
        model=checkpoint.name,
    )


def _scopes(result: Battery, drawn: dict[str, tuple[str, ...]]) -> Section:
    words = result.words
    read = {scope: {n: t.pushes[f"own_words.{scope}"] for n, t in result.tested.items()} for scope in ("before", "all")}
    measured = "; ".join(
        f"{name}, {'before the question' if scope == 'before' else 'everywhere'}: {estimate}"
        for scope, pushes in read.items()
        for name, estimate in pushes.items()
    )
    return Section(
        "The belief, acted on in two scopes",
        "The harmfulness direction should shift the reply wherever it is put. The refusal direction put before the "
        "question only can do little whatever it means, as refusal is decided at the last token, and put everywhere it "
        "pushes towards the word that refuses; so either column alone can fake a dissociation.\n\n"
        f"The words are read at the tokens {words.asked.texts[0]!r} and {words.asked.texts[1]!r}. With the words that "
        f"this model holds likeliest, {words.preferred.texts[0]!r} and {words.preferred.texts[1]!r}: "
        f"{measured or 'none'}."
        "\n\nThe table has the unsteered differences by wording of the question.",
        drawn["scopes"],
        table=result.by_question,
    )


def _answers(result: Battery) -> Section:
    """The answers whose verdict the push changed, then others that it changed."""
    shown = []
    for name, tested in result.tested.items():
        pushed = tested.answers[tested.answers["is_push"]]
        flipped = pushed["verdict_before"] != pushed["verdict_after"]
        changed = pushed["unsteered_answer"] != pushed["answer"]
        ranked = pushed.assign(direction=name, rank=2 * flipped + changed).sort_values(
            "rank", ascending=False, kind="stable"
        )
        shown.append(ranked.head(MAX_CHANGED))
    columns = ["direction", "operation", "label", "prompt", "unsteered_answer", "answer"]
    table = pd.concat(shown)[columns] if shown else None
    return Section(
        "Answers before and after",
        "Test prompts under the chosen push; those whose verdict changed come first. All are in "
        "`tables/steered_answers.parquet`.",
        table=table,
    )


def _damage(result: Battery, drawn: dict[str, tuple[str, ...]]) -> Section:
    table = result.damage()
    shown = None if table.empty else table.pivot_table(
        index=["direction", "operation"], columns="measure", values="value", sort=False
    ).reset_index()  # fmt: skip
    return Section(
        "What else breaks",
        "Cross-entropy of plain text (acted on at every token) and of the model's own unsteered answers to harmless "
        "prompts, KL from the unsteered model over those answers, repeated word triples, empty answers, refusals "
        "by mechlens' list, which decides everywhere, and by the two published ones that it holds, of Arditi et al. "
        "(`_arditi`) and of Zhao et al. (`_zhao`): where they differ, one of them doesn't know the words.",
        drawn["damage"],
        table=shown,
    )


def _how(result: Battery, verdict: CausalVerdict, punctuation: str) -> str:
    plan = result.plan
    settings = "; ".join(
        f"{name}: layer {tested.setting.layer}, strength {tested.setting.strength:g} of the median residual norm"
        for name, tested in result.tested.items()
    )
    defined = "; ".join(f"{name} from {a} and {b} training prompts" for name, (a, b) in result.counts.items())
    parsed: Estimate = result.unsteered["inversion_parsed"]
    return (
        f"The rule of the verdict. {verdict.rule}\n\n"
        f"Prompts: {result.split.sizes}, of which at "
        f"most {plan.n_validation} and {plan.n_test} a class were used. {punctuation} Directions: {defined} (mean "
        f"differences; harmfulness at `inst`, refusal at `last`). Chosen on validation: {settings or 'nothing'}.\n\n"
        "Adding acts on every token of the prompt at the input of one block; ablating removes the component at every "
        "layer, site and token. Controls on the same test prompts: "
        f"{plan.random_directions} random directions of the same norm and {plan.shuffled_directions} null directions "
        "from shuffled labels. "
        f"Intervals: 95% bootstrap over families, directions frozen. Each request is asked about with one of five "
        f"questions, in turns (n = {parsed.n})."
    )


CURVES = {
    "refusal": "Refusal of the plain request: change of the log-odds under a push",
    "inversion.before": "Belief, acted on before the question: change of logit(Certainly) - logit(No) under a push",
    "inversion.all": "Belief, acted on everywhere: change of logit(Certainly) - logit(No) under a push",
}


def draw(writer: RunWriter, result: Battery) -> dict[str, tuple[str, ...]]:
    """Draws every figure that the battery has the numbers for; their names by section of the report."""
    return {
        "curves": tuple(_curve(writer, result, measure, title) for measure, title in CURVES.items()),
        "rates": tuple(_rates(writer, result, label) for label in (HARMLESS, HARMFUL)),
        "scopes": (_draw_scopes(writer, result), _draw_replies(writer, result)),
        "damage": (_draw_damage(writer, result),) if result.tested else (),
    }


def at_chosen(result: Battery, table: pd.DataFrame) -> pd.DataFrame:
    """The rows at each direction's chosen strength, random ones at either, and ablations, which have none."""
    chosen = {name: [setting.strength] for name, setting in result.grid.chosen.items()}
    strengths = [strength for at_direction in chosen.values() for strength in at_direction]
    kept = [
        pd.isna(strength) or strength in chosen.get(direction, strengths)
        for direction, strength in zip(table["direction"], table["strength"], strict=True)
    ]
    return table[kept]


def _curve(writer: RunWriter, result: Battery, measure: str, title: str) -> str:
    """Effect by layer on validation prompts; zero is the unsteered model."""
    table = at_chosen(result, result.grid.pushes)
    table = table[table["measure"] == measure]
    shown = table.assign(curve=table["direction"] + ", " + table["strength"].map("{:g}".format))
    figure = figures.lines(
        shown, x="layer", y="value", low="low", high="high", group="curve", hline=0.0, hline_label="unsteered",
        title=title, xlabel="layer", ylabel="towards the other class",
    )  # fmt: skip
    caption = (
        "Validation prompts, at the chosen strengths, which are shares of the residual norm; a push adds to harmless "
        "prompts and subtracts from harmful ones. Bands: 95% bootstrap over families. The table has all strengths."
    )
    return writer.figure(f"curve_{measure.replace('.', '_')}", figure, table="pushes_by_layer", caption=caption)


def _rates(writer: RunWriter, result: Battery, label: str) -> str:
    table = result.grid.rates
    table = table[table["label"] == label]
    baseline = float(table.loc[table["operation"] == "none", "value"].iloc[0])
    shown = at_chosen(result, table[table["operation"] != "none"])
    strength = shown["strength"].map(lambda x: "" if pd.isna(x) else f" {x:g}")
    figure = figures.lines(
        shown.assign(curve=shown["operation"] + " " + shown["direction"] + strength),
        x="layer", y="value", low="low", high="high", group="curve", hline=baseline, hline_label="unsteered",
        title=f"Share of {label} prompts that are refused", xlabel="layer", ylabel="refused",
    )  # fmt: skip
    caption = "Validation prompts, whole answers, at the chosen strengths."
    return writer.figure(f"refused_{label}", figure, table="refusals_by_layer", caption=caption)


def scope_table(result: Battery) -> pd.DataFrame:
    """The 2x2 of scopes on test prompts, with controls: direction, scope, who, value, low, high."""
    rows = []
    for name, tested in result.tested.items():
        for scope in SCOPES:
            measure = f"inversion.{scope}"
            chance, labels = tested.random[measure], tested.shuffled[measure]
            for who, estimate in (
                (name, tested.pushes[measure]),
                (f"{name}: largest of {chance.n} random", chance.maximum),
                (f"{name}: largest of {labels.n} shuffled", labels.maximum),
            ):
                where = "before the question" if scope == "before" else "everywhere"
                rows.append(
                    {
                        "scope": where, "who": who, "value": estimate.value, "low": estimate.low,
                        "high": estimate.high, "layer": tested.setting.layer, "strength": tested.setting.strength,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _draw_scopes(writer: RunWriter, result: Battery) -> str:
    table = scope_table(result)
    writer.table("scopes", table)
    figure = figures.bars(
        table, x="scope", y="value", low="low", high="high", group="who", hline=0.0,
        title="The 2x2 of scopes: shift of the reply towards the other class, test prompts",
        xlabel="tokens that are acted on", ylabel="change of logit(Certainly) - logit(No)",
    )  # fmt: skip
    missing = "" if result.measurable else " Not measurable on this model: these numbers decide nothing."
    return writer.figure("scopes", figure, table="scopes", caption=f"Bars: 95% bootstrap over families.{missing}")


def _draw_replies(writer: RunWriter, result: Battery) -> str:
    table = result.reply_shares()
    shown = table.assign(
        case=table["label"] + ", " + table["direction"].where(table["direction"] == "none", table["direction"] + " ")
        + table["scope"].where(table["direction"] != "none", "")
    )  # fmt: skip
    figure = figures.bars(
        shown, x="case", y="share", group="belief", title="What the replies say, by their first word",
        xlabel="", ylabel="share of replies",
    )  # fmt: skip
    return writer.figure("replies", figure, table="replies")


def _draw_damage(writer: RunWriter, result: Battery) -> str:
    table = result.damage()
    named = {"plain_ce": "loss, plain text", "own_ce": "loss, own answers", "kl": "KL, own answers"}
    losses = table[table["measure"].isin(list(named))].replace({"measure": named})
    figure = figures.bars(
        losses.assign(case=losses["operation"] + ", " + losses["direction"]), x="measure", y="value", low="low",
        high="high", group="case", title="Damage at the chosen settings", xlabel="", ylabel="nats per token",
    )  # fmt: skip
    return writer.figure("damage", figure, table="damage")
