"""The figures of the separation study."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.writer import RunWriter
from mechlens.studies.separate.study import Separation
from mechlens.studies.shared.quadrants import QUADRANTS, in_words

REACH = (-1.25, 1.25)
"""What is drawn of a cosine: corrected for noise it can pass 1, and where little but noise is left, by far."""


def draw(writer: RunWriter, result: Separation) -> dict[str, tuple[str, ...]]:
    """Draws every figure that the study has the numbers for; their names by section of the report."""
    return {
        "quadrants": _quadrants(writer, result),
        "dissociation": _dissociation(writer, result),
        "detection": _detection(writer, result),
        "angle": _angle(writer, result),
        "beliefs": _beliefs(writer, result),
    }


def _quadrants(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    counts = result.judged.counts()
    figure = figures.bars(
        in_words(counts[counts["n"] > 0]), x="quadrant", y="n", group="judge",
        title="Prompts in each quadrant, by judge", xlabel="", ylabel="prompts",
    )  # fmt: skip
    return (writer.figure("quadrants", figure, table="quadrant_counts"),)


def _dissociation(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    found = result.analysis.dissociation
    if found is None or not found.contrast.measurable:
        return ()
    placed = found.prompts[found.prompts["quadrant"].isin(QUADRANTS)]
    scatter = figures.scatter(
        in_words(placed), x="harm", y="refusal", group="quadrant", hover=["id"], hline=0.0, vline=0.0,
        title="Harm and refusal of every prompt, out of fold", xlabel="harm, at inst (quadrants' poles at -1 and +1)",
        ylabel="refusal, at the last token",
    )  # fmt: skip
    table = found.at_one_position
    words = {"harm": "gap in harm", "refusal": "gap in refusal", "D": "D"}
    bars = figures.bars(
        table.assign(number=table["number"].map(words)), x="position", y="value", low="low", high="high",
        group="number", hline=0.0, title="Accepted harmful less refused harmless, both read at one position",
        xlabel="position", ylabel="half-distances of the poles",
    )  # fmt: skip
    caption = "Two variables at one position: a gap in harm above 0 and one in refusal below it."
    return (
        writer.figure("harm_and_refusal", scatter, table="dissociation"),
        writer.figure("dissociation_by_position", bars, table="dissociation_by_position", caption=caption),
    )


def _detection(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    table = result.table()
    if table.empty:
        return ()
    last = result.acts.positions[-1]
    named = {
        ("harmful", "inst"): "harmful, at inst",
        ("harmful", last): "harmful, at last",
        ("refused", "inst"): "refused, at inst",
        ("refused", last): "refused, at last",
        ("harmful.accepted", "inst"): "harmful among accepted, at inst",
        ("refused.harmful", last): "refused among harmful, at last",
    }
    curve = [named.get(key, "") for key in zip(table["contrast"], table["position"], strict=True)]
    shown = table.assign(curve=curve)[[name != "" for name in curve]]
    curves = figures.lines(
        shown, x="level", y="auroc", low="low", high="high", group="curve", hline=0.5, hline_label="chance",
        title="Out-of-fold AUROC by level", xlabel="level (0 = embedding)", ylabel="AUROC, out of fold",
    )  # fmt: skip
    caption = "Bands: 95% intervals by families; the level is the same in all folds."
    names = [writer.figure("auroc_by_level", curves, table="auroc_by_level", caption=caption)]
    names += _against_baselines(writer, result)
    for contrast in ("harmful", "refused"):
        cells = table[table["contrast"] == contrast]
        if not cells.empty:
            figure = figures.heatmap(
                cells, x="position", y="level", value="auroc", center=0.5, limits=(0.0, 1.0), label="AUROC",
                title=f"AUROC of {contrast} at every position and level", xlabel="position", ylabel="level",
            )  # fmt: skip
            names.append(writer.figure(f"auroc_{contrast}_grid", figure))
    return tuple(names)


def _against_baselines(writer: RunWriter, result: Separation) -> list[str]:
    """Chosen levels beside what the surface alone gives."""
    last = result.acts.positions[-1]
    chosen = result.chosen()
    if chosen.empty:
        return []
    chosen = chosen[chosen["position"].isin(["inst", last])]
    ours = chosen.assign(what="directions, " + chosen["position"].replace({last: "last"}))
    surface = result.baselines()
    kept = {
        "tfidf_auroc": "words (TF-IDF)", "mean_embedding_auroc": "mean embedding",
        "token_identity_auroc.inst": "token at inst",
    }  # fmt: skip
    surface = surface[surface["baseline"].isin(kept)]
    surface = surface.assign(what=surface["baseline"].map(kept))
    columns = ["contrast", "what", "auroc", "low", "high"]
    both = pd.concat([ours[columns], surface[columns]], ignore_index=True)
    writer.table("against_baselines", both)
    named = both.assign(contrast=both["contrast"].str.replace(".", " among ", regex=False))
    figure = figures.bars(
        named, x="contrast", y="auroc", low="low", high="high", group="what", hline=0.5, hline_label="chance",
        title="Directions against surface baselines, on the same prompts", xlabel="contrast", ylabel="AUROC",
    )  # fmt: skip
    return [writer.figure("against_baselines", figure, table="against_baselines")]


def _angle(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    table = result.geometry.table()
    names = []
    for name, value, low, high, title in (
        ("cosine_corrected", "corrected", "corrected_low", "corrected_high", "Cosine by level, corrected for noise"),
        ("cosine_measured", "cosine", "low", "high", "Cosine by level, as measured"),
    ):
        shown = table.dropna(subset=value)
        if shown.empty:
            continue
        figure = figures.lines(
            shown, x="level", y=value, low=low, high=high, group="curve", hline=0.0,
            title=title, xlabel="level", ylabel="cosine",
        )  # fmt: skip
        figure.update_yaxes(range=REACH)
        caption = (
            "Bands: 95% jackknife over families, both directions refitted; they may leave the figure. The corrected "
            "cosine is missing where a direction is mostly noise, and can pass 1 by chance."
        )
        names.append(writer.figure(name, figure, table="cosines", caption=caption))
    first = table[table["curve"] == table["curve"].iloc[0]]
    reliability = first.melt("level", ["reliability_first", "reliability_second"], "direction", "reliability")
    reliability["direction"] = reliability["direction"].map(
        {"reliability_first": "harmfulness at inst", "reliability_second": "refusal at last"}
    )
    figure = figures.lines(
        reliability, x="level", y="reliability", group="direction",
        title="Split-half cosine of each direction with itself", xlabel="level", ylabel="cosine of two halves",
    )  # fmt: skip
    caption = "Near 0: the direction is noise. Near 1: half the prompts give it."
    names.append(writer.figure("reliability", figure, caption=caption))
    if not result.geometry.interaction.empty:
        norms = result.geometry.interaction.assign(
            curve=lambda frame: (
                frame["effect"] + " at " + frame["position"].replace({result.acts.positions[-1]: "last"})
            )
        )
        figure = figures.lines(
            norms, x="level", y="norm", group="curve",
            title="Size of the balanced main effects and of their interaction", xlabel="level", ylabel="norm",
        )  # fmt: skip
        names.append(writer.figure("effect_norms", figure, table="effect_norms"))
    return tuple(names)


def _beliefs(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    if result.beliefs.prompts.empty:
        return ()
    figure = figures.scatter(
        in_words(result.beliefs.prompts), x="belief_harm", y="belief_refusal", group="quadrant", hover=["id"],
        hline=0.0, vline=0.0,
        title="Two beliefs of every held-out prompt", xlabel="belief of harmfulness, at inst",
        ylabel="belief of refusal, at the last token",
    )  # fmt: skip
    names = [writer.figure("beliefs", figure, table="beliefs")]
    scores = result.beliefs.by_level
    for concept in ("harmfulness", "refusal"):
        for centered in (False, True):
            rows = scores[(scores["concept"] == concept) & (scores["centered"] == centered)]
            figure = figures.lines(
                in_words(rows), x="level", y="score", low="low", high="high", group="quadrant", hline=0.0,
                title=f"Score of {concept} by level{', centred' if centered else ''}", xlabel="level",
                ylabel="cosine difference",
            )  # fmt: skip
            name = f"score_{concept}{'_centered' if centered else ''}"
            names.append(writer.figure(name, figure, table="scores_by_level"))
    return tuple(names)
