"""The report's section on the direction of the change."""

from typing import Any

import pandas as pd

from mechlens.methods.directions.change import TUNED
from mechlens.runs.report import figures
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.settings import RANDOM_DIRECTIONS
from mechlens.studies.behaviours.directions.effect_rows import ABLATED, ADDED
from mechlens.studies.behaviours.directions.effects import MOST_RISE, STRENGTHS
from mechlens.studies.behaviours.directions.result import DirectionResult

TEXT = (
    "The residual stream is averaged over an answer's tokens, of answers that show the behaviour and of those that "
    "don't, through the fine-tune and through the base, in both orders of the options, on questions that were trained "
    "on. Differences of these means are directions: shown minus other through either model, fine-tune minus base on "
    "either answers, and where there is a decorrelated control fine-tune minus that. On one half of the held-out "
    "questions the difference and the level are chosen whose effect comes nearest to the fine-tune's own change "
    "(beyond the control where there is one) among those that make plain text more surprising by at most "
    f"{MOST_RISE:g} nats per token beyond what fine-tuning does; everything below is of the other half. The direction "
    "is added to the base at its level, at every token, once, twice and four times; and it is ablated from the "
    "fine-tune everywhere. `share` is the effect by the fine-tune's change (1: all of it; ablation removes), with an "
    f"interval over questions, where that change is clear. Beside it {RANDOM_DIRECTIONS} random directions of the same "
    "length (their mean, and the one that does most the same way; ablated in the first run only), and how much more "
    "surprising plain text becomes, in nats per token: where that is much, the model is broken, and log-odds say "
    "little. Groups that changed nothing clearly at home, and decorrelated controls, are left out."
)
COSINES = (
    "Cosines between groups, between training runs of one group, between the differences, and with saved "
    "directions, by level; `corrected` is without the noise that questions leave in them, shared questions counted "
    "(of saved directions the change's noise alone). Directions through the base are the words' own: what is as alike "
    "there needs no training. A reliability near 0 says that a direction is noise."
)


def direction_sections(writer: RunWriter, found: DirectionResult) -> list[Section]:
    """Effects with their figure, and cosines; the tables must have been written."""
    sections = []
    if len(found.effects):
        caption = f"Bars: 95%. Random: the one of {RANDOM_DIRECTIONS} that does most the same way."
        name = writer.figure(
            "direction_effects", _figure(found.effects), table="direction_effects", caption=caption
        )  # fmt: skip
        sections.append(Section("The direction of the change", TEXT, (name,), table=_shown(found.effects)))
    if len(found.cosines):
        sections.append(Section("How the directions lie together", COSINES, (), table=_alike(found.cosines)))
    return sections


def _figure(effects: pd.DataFrame) -> Any:
    own = effects[(effects["group"] == effects["direction_of"])]
    once = own[(own["does"] == ABLATED) | ((own["does"] == ADDED) & (own["strength"] == STRENGTHS[0]))]
    where = once["group"] + ": " + once["set"]
    added = where[once["does"] == ADDED]
    tuned = once[once["does"] == ADDED].assign(
        where=added, bar="the fine-tune itself", effect=lambda t: t["fine_tuned"], low=lambda t: t["fine_tuned_low"],
        high=lambda t: t["fine_tuned_high"],
    )  # fmt: skip
    random = once.assign(where=where, bar="random, " + once["does"], effect=once["random_most"], low=None, high=None)
    shown = pd.concat([tuned, once.assign(where=where, bar=once["does"]), random], ignore_index=True)
    return figures.bars(
        shown.astype({"low": float, "high": float}), x="where", y="effect", group="bar", low="low", high="high",
        hline=0.0, xlabel="", ylabel="change of the log-odds (nats)", title="What the direction of the change does",
    )  # fmt: skip


def _shown(effects: pd.DataFrame) -> pd.DataFrame:
    kept = ["group", "does", "direction_of", "variant", "level", "strength", "set", "effect", "low", "high",
            "fine_tuned", "share", "share_low", "share_high", "random_mean", "random_most",
            "text_loss_rise"]  # fmt: skip
    shown: pd.DataFrame = effects[kept]
    return shown if (shown["group"] != shown["direction_of"]).any() else shown.drop(columns="direction_of")


def _alike(cosines: pd.DataFrame) -> pd.DataFrame:
    """At the middle level, through the fine-tune or between variants; the whole is in the table."""
    levels = sorted(cosines.loc[cosines["kind"] != "saved", "level"].unique())
    middle = (cosines["level"] == levels[len(levels) // 2]) | (cosines["kind"] == "saved")
    shown: pd.DataFrame = cosines[middle & ((cosines["first_variant"] == TUNED) | (cosines["kind"] == "groups"))]
    return shown.dropna(axis=1, how="all")
