"""The battery's figures, the paper's Fig. 4 and 5 among them."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.writer import RunWriter
from mechlens.studies.causal.directions import HARMFUL, HARMLESS, NAMES
from mechlens.studies.causal.held_out import effect_table
from mechlens.studies.causal.study import Battery

SCOPE_WORDS = {"belief.before": "before the question", "belief.all": "everywhere"}
DONE_WORDS = {"add": "added to", "subtract": "subtracted from"}


def draw(writer: RunWriter, result: Battery) -> dict[str, tuple[str, ...]]:
    """Draws every figure that the battery has the numbers for; their names by section of the report."""
    cells = _in_words(result)
    return {
        "belief": tuple(
            _belief(writer, cells, at, measure)
            for at in NAMES for measure in SCOPE_WORDS if result.reply_layers is not None
        ),
        "refusal": (_refusal(writer, cells),) if result.effects else (),
        "fig4": (_fig4(writer, result),) if result.directions else (),
        "fig5": tuple(_fig5(writer, result, label) for label in (HARMLESS, HARMFUL) if result.reply_layers is not None),
        "choice": tuple(_choice(writer, result, name) for name in _named(result.choice.table)),
        "words": (_words(writer, result),),
        "positions": (_positions(writer, result),) if len(result.positions) else (),
        "damage": tuple(_damage(writer, result, name) for name in _named(result.broken)),
    }  # fmt: skip


def _named(table: pd.DataFrame) -> list[str]:
    """The directions that the table, which may be empty, has rows of."""
    return [name for name in NAMES if name in set(table.get("direction", ()))]


def _in_words(result: Battery) -> pd.DataFrame:
    """The table of cells with a column for the axis; the neglected cells stand right of the pushes."""
    table = effect_table(result.effects, result.choice.places)
    if table.empty:
        return table
    named = [f"{DONE_WORDS[operation]} {label}" for operation, label in table[["operation", "label"]].to_numpy()]
    return table.assign(cell=named).sort_values("is_push", ascending=False, kind="stable")


def _with_chance(table: pd.DataFrame) -> pd.DataFrame:
    """The rows, and for every cell one that says how far random directions go."""
    random = table.drop_duplicates(["at", "cell"])
    largest = random["random_max"]
    random = random.assign(direction="random directions, largest", value=largest, low=largest, high=largest)
    return pd.concat([table, random], ignore_index=True)


def _belief(writer: RunWriter, cells: pd.DataFrame, at: str, measure: str) -> str:
    where = SCOPE_WORDS[measure]
    shown = _with_chance(cells[(cells["at"] == at) & (cells["measure"] == measure)])
    figure = figures.bars(
        shown, x="cell", y="value", low="low", high="high", group="direction", hline=0.0,
        title=f"Change of belief, acting {where}, at the {at} direction's layer and strength",
        xlabel="what is done to which prompts", ylabel="towards what the direction's name promises (log-odds)",
    )  # fmt: skip
    caption = (
        "Above 0 and above random directions: the direction moves what the model believes, more harmful where it is "
        "added, less where it is subtracted. Half the difference between the two questions' logit(yes) - logit(no), "
        "on test prompts; the last two cells are those that a push leaves out. In the table also the part that both "
        "questions bear out, and how far both say yes."
    )
    return writer.figure(f"{measure.replace('.', '_')}_at_{at}", figure, table="cells", caption=caption)


def _refusal(writer: RunWriter, cells: pd.DataFrame) -> str:
    own = cells[(cells["measure"] == "refusal") & (cells["at"] == cells["direction"])]
    shown = _with_chance(own)
    random = shown["direction"].str.startswith("random")
    shown["direction"] = shown["direction"].where(~random, "random directions at the setting of " + shown["at"])
    figure = figures.bars(
        shown, x="cell", y="value", low="low", high="high", group="direction", hline=0.0,
        title="Change of refusal, each direction at its own layer and strength",
        xlabel="what is done to which prompts", ylabel="towards what the direction's name promises (log-odds)",
    )  # fmt: skip
    caption = (
        "Above 0 and above random directions: more refusal where the direction is added, less where it is subtracted. "
        "Test prompts; log-odds that the answer to the plain request starts as this model's refusals do."
    )
    return writer.figure("refusal", figure, table="cells", caption=caption)


def _fig4(writer: RunWriter, result: Battery) -> str:
    table = result.refusal_layers.table
    unsteered = float(table.loc[table["direction"] == "none", "value"].iloc[0])
    shown = table[table["direction"] != "none"]
    figure = figures.lines(
        shown.assign(curve=shown["direction"] + " added"), x="layer", y="value", low="low", high="high", group="curve",
        hline=unsteered, hline_label="unsteered", title="Harmless requests that are refused, by layer (Fig. 4)",
        xlabel="layer at whose input the raw direction is added", ylabel="share refused, by the first answer token",
        limits=(0.0, 1.0),
    )  # fmt: skip
    gap = result.depth
    caption = (
        "Above the dashed line: refused because of the direction. The refusal direction should work in deeper layers. "
        f"Test prompts; {result.plan.coefficient:g} times the direction of each layer, at every token of the prompt. "
        f"The refusal direction's centre of effect lies {gap.layers} layers deeper than the harmfulness direction's "
        f"(permutation test, two-sided: p = {gap.p:.3f})."
    )
    return writer.figure("refusal_by_layer", figure, table="refusals_by_layer", caption=caption)


def _fig5(writer: RunWriter, result: Battery, label: str) -> str:
    assert result.reply_layers is not None
    table = result.reply_layers.table
    table = table[(table["label"] == label) & (table["measure"] == "no.straight")]
    unsteered = float(table.loc[table["direction"] == "none", "value"].iloc[0])
    shown = table[table["direction"] != "none"]
    words = shown["operation"].map({"add": " added", "subtract": " subtracted"})
    kl = result.plan.calibrate_kl
    strength = f"{shown['strength'].iloc[0]:.3g} of the residual norm" if kl is None else f"a KL of {kl:g} nats"
    figure = figures.lines(
        shown.assign(curve=shown["direction"] + words), x="layer", y="value", low="low", high="high", group="curve",
        hline=unsteered, hline_label="unsteered",
        title=f"Replies about {label} requests that say No, by layer (Fig. 5)",
        xlabel="layer at whose input the direction is added or subtracted", ylabel="share of No, of No and Certainly",
        limits=(0.0, 1.0),
    )  # fmt: skip
    caption = (
        "Away from the dashed line: the direction changes the reply about harm. No means harmless here. "
        f"Validation prompts, {strength}; the harmfulness "
        "direction before the question, the refusal direction everywhere, as published. In the "
        "table the reversed questions too, where it means harmful, and the belief that both bear out."
    )
    return writer.figure(f"no_by_layer_{label}", figure, table="replies_by_layer", caption=caption)


def _choice(writer: RunWriter, result: Battery, name: str) -> str:
    table = result.choice.table
    table = table[table["direction"] == name]
    kl = result.plan.calibrate_kl
    curve = "strength " + table["strength"].map("{:.3g}".format) if kl is None else f"{kl:g} nats"
    taken = (
        "Of what lies inside the interval of the highest point the weakest strength was taken." if kl is None
        else "The highest point was taken: all points damage harmless answers alike."
    )  # fmt: skip
    figure = figures.lines(
        table.assign(curve=curve), x="layer", y="value",
        low="low", high="high", group="curve", hline=0.0, hline_label="unsteered",
        title=f"Pushes of the {name} direction by which layer and strength were chosen", xlabel="layer",
        ylabel="change towards the other class (log-odds)",
    )  # fmt: skip
    caption = (
        f"The higher, the better the push does what the direction is claimed to do. {taken} Validation prompts; "
        "strengths are shares of the residual norm. Bands: 95% bootstrap over families."
    )
    return writer.figure(f"choice_{name}", figure, table="choice", caption=caption)


def _words(writer: RunWriter, result: Battery) -> str:
    table = result.beliefs
    case = table["label"] + ", " + table["direction"].where(table["direction"] != "none", "unsteered")
    case += table["operation"].map({"none": "", "add": " added", "subtract": " subtracted"})
    figure = figures.bars(
        table.assign(case=case), x="case", y="share", group="belief", title="What the two replies say together",
        xlabel="which requests, and what is done to them", ylabel="share of requests", limits=(0.0, 1.0),
    )  # fmt: skip
    caption = (
        "A push that changes belief turns the bars of harmful and harmless. Test prompts; inconsistent: both replies "
        "say yes, or both no; declined: a question is refused; unparsed: a reply says neither yes nor no."
    )
    return writer.figure("beliefs", figure, table="beliefs", caption=caption)


def _positions(writer: RunWriter, result: Battery) -> str:
    named = {"consistent.before": "belief", "refusal": "refusal"}
    table = result.positions
    figure = figures.bars(
        table.assign(group=table["direction"] + ": " + table["measure"].map(named)), x="position", y="value", low="low",
        high="high", group="group", hline=0.0, title="Directions from every position",
        xlabel="position that the direction is taken from", ylabel="change towards the other class (log-odds)",
    )  # fmt: skip
    caption = (
        "Above 0: the direction from there does it too. Validation prompts, at each direction's chosen layer and "
        "strength; belief: acted on before the question."
    )
    return writer.figure("positions", figure, table="positions", caption=caption)


def _damage(writer: RunWriter, result: Battery, name: str) -> str:
    table = result.broken
    named = {"plain_ce": "loss, plain text", "own_ce": "loss, own answers", "kl": "KL, own answers"}
    losses = table[(table["direction"] == name) & table["measure"].isin(list(named))].replace({"measure": named})
    words = {"none": "unsteered", "add": "added", "subtract": "subtracted", "ablate": "ablated"}
    figure = figures.bars(
        losses.assign(case=losses["operation"].map(words)), x="measure", y="value", low="low", high="high",
        group="case", title=f"What the {name} direction breaks, at the chosen setting", xlabel="",
        ylabel="nats per token",
    )  # fmt: skip
    caption = "Bars far above the unsteered model's: the push breaks more than the behaviour it is aimed at."
    return writer.figure(f"damage_{name}", figure, table="damage", caption=caption)
