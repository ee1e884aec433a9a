"""The figures of the causal battery."""

import pandas as pd

from mechlens.methods.behaviour.inversion import SCOPES
from mechlens.runs.report import figures
from mechlens.runs.writer import RunWriter
from mechlens.studies.causal.directions import HARMFUL, HARMLESS
from mechlens.studies.causal.study import Battery

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
        "scopes": (_scopes(writer, result), _replies(writer, result)),
        "damage": (_damage(writer, result),) if result.tested else (),
    }


def at_chosen(result: Battery, table: pd.DataFrame) -> pd.DataFrame:
    """The rows at each direction's chosen strength, random ones at either, and ablations, which have none."""
    chosen = {name: [setting.strength] for name, setting in result.grid.chosen.items()}
    strengths = [strength for own in chosen.values() for strength in own]
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


def _scopes(writer: RunWriter, result: Battery) -> str:
    table = scope_table(result)
    writer.table("scopes", table)
    figure = figures.bars(
        table, x="scope", y="value", low="low", high="high", group="who", hline=0.0,
        title="The 2x2 of scopes: shift of the reply towards the other class, test prompts",
        xlabel="tokens that are acted on", ylabel="change of logit(Certainly) - logit(No)",
    )  # fmt: skip
    missing = "" if result.measurable else " Not measurable on this model: these numbers decide nothing."
    return writer.figure("scopes", figure, table="scopes", caption=f"Bars: 95% bootstrap over families.{missing}")


def _replies(writer: RunWriter, result: Battery) -> str:
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


def _damage(writer: RunWriter, result: Battery) -> str:
    table = result.damage()
    losses = table[table["measure"].isin(["plain_ce", "own_ce", "kl"])]
    figure = figures.bars(
        losses.assign(case=losses["operation"] + ", " + losses["direction"]), x="measure", y="value", low="low",
        high="high", group="case", title="Damage at the chosen settings", xlabel="", ylabel="nats per token",
    )  # fmt: skip
    return writer.figure("damage", figure, table="damage")
