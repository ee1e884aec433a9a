"""The figures of the separation study."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.figure_parts import left_out
from mechlens.runs.writer import RunWriter
from mechlens.studies.separate.study import Separation
from mechlens.studies.shared.angles import NO_ANGLE, POSSIBLE, angles
from mechlens.studies.shared.quadrants import QUADRANTS, in_words

INSIDE = ", fitted among "
"""Between the two words of a contrast that is fitted and scored inside one class only."""


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
    caption = (
        "How many prompts each judge of the answers puts where. Bars of one quadrant that differ much say that the "
        "choice of the judge matters; the quadrants in the middle are the ones that decide."
    )
    return (writer.figure("quadrants", figure, table="quadrant_counts", caption=caption),)


def _dissociation(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    found = result.analysis.dissociation
    if found is None or not found.contrast.measurable:
        return ()
    placed = found.prompts[found.prompts["quadrant"].isin(QUADRANTS)]
    scatter = figures.scatter(
        in_words(placed), x="harm", y="refusal", group="quadrant", hover=["id"], hline=0.0, vline=0.0,
        diagonal=True, title="Harm and refusal of every prompt, out of fold",
        ylabel="refusal at the last token (poles at −1 and +1)",
        xlabel="harm at inst (accepted harmless at −1, refused harmful at +1)",
    )  # fmt: skip
    seen = (
        "Each point is a prompt. With one variable all points lie along the dashed diagonal; with two, accepted "
        "harmful prompts lie to the lower right and refused harmless ones to the upper left."
    )
    table = found.at_one_position
    words = {"harm": "harm: gap", "refusal": "refusal: gap", "D": "harm less refusal"}
    bars = figures.bars(
        table.assign(number=table["number"].map(words)), x="position", y="value", low="low", high="high",
        group="number", hline=0.0, title="Accepted harmful less refused harmless, both read at one position",
        xlabel="position", ylabel="gap (1 = half the distance of the poles)",
    )  # fmt: skip
    caption = (
        "Two variables at one position: a gap in harm above 0 and one in refusal below it, so a difference above 0."
    )
    return (
        writer.figure("harm_and_refusal", scatter, table="dissociation", caption=seen),
        writer.figure("dissociation_by_position", bars, table="dissociation_by_position", caption=caption),
    )


def _detection(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    table = result.table()
    if table.empty:
        return ()
    names = _curves(writer, result, table) + _against_baselines(writer, result)
    words = {"harmful": "harm", "refused": "refusal"}
    for contrast, word in words.items():
        cells = table[table["contrast"] == contrast]
        if not cells.empty:
            figure = figures.heatmap(
                cells, x="position", y="level", value="auroc", center=0.5, limits=(0.0, 1.0), label="AUROC",
                title=f"Where {word} can be read: AUROC at every position and level", xlabel="position",
                ylabel="level (0 = embedding)",
            )  # fmt: skip
            caption = (
                "Plain as the page: chance. Full red: certain. Where a column turns red the model has worked it out."
            )
            names.append(writer.figure(f"auroc_{contrast}_grid", figure, table="auroc_by_level", caption=caption))
    return tuple(names)


def _curves(writer: RunWriter, result: Separation, table: pd.DataFrame) -> list[str]:
    """AUROC by level, a figure for each concept, at the two positions and inside the class where it matters."""
    last = result.acts.positions[-1]
    shown = {
        "harmful": ("Is it harmful?", {
            ("harmful", "inst"): "inst", ("harmful", last): "last",
            ("harmful.accepted", "inst"): "harmful, fitted among accepted, at inst",
        }),
        "refused": ("Will it be refused?", {
            ("refused", "inst"): "inst", ("refused", last): "last",
            ("refused.harmful", last): "refused, fitted among harmful, at last",
        }),
    }  # fmt: skip
    caption = (
        "The level is where a curve rises: there the model has worked it out. The curve fitted inside one class is the "
        "one that the other question can't explain; it is scored there too, unlike the card 'fitted on all prompts'. "
        "Bands: 95% intervals by families; each level is the same in all folds."
    )
    caption += left_out(name for name in table["position"] if name not in ("inst", last))
    names = []
    for contrast, (question, curves) in shown.items():
        named = [curves.get(key, "") for key in zip(table["contrast"], table["position"], strict=True)]
        rows = table.assign(curve=named)[[name != "" for name in named]]
        figure = figures.lines(
            rows, x="level", y="auroc", low="low", high="high", group="curve", hline=0.5, hline_label="chance",
            limits=(0.0, 1.0), title=f"{question} Out-of-fold AUROC by level", xlabel="level (0 = embedding)",
            ylabel="AUROC, out of fold",
        )  # fmt: skip
        name = f"auroc_by_level_{contrast}"
        names.append(writer.figure(name, figure, table="auroc_by_level", caption=caption))
    return names


def _against_baselines(writer: RunWriter, result: Separation) -> list[str]:
    """Chosen levels beside what the surface alone gives."""
    last = result.acts.positions[-1]
    chosen = result.chosen()
    if chosen.empty:
        return []
    chosen = chosen[chosen["position"].isin(["inst", last])]
    ours = chosen.assign(what=chosen["position"].map({"inst": "inst: direction", last: "last: direction"}))
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
    named = both.assign(contrast=both["contrast"].str.replace(".", INSIDE, regex=False))
    figure = figures.bars(
        named, x="contrast", y="auroc", low="low", high="high", group="what", hline=0.5, hline_label="chance",
        limits=(0.0, 1.0), title="Directions against surface baselines, on the same prompts", xlabel="contrast",
        ylabel="AUROC",
    )  # fmt: skip
    caption = (
        "A direction that is no higher than the words, the mean embedding or the token says no more than they do. "
        "'Fitted among' is fitted and scored in that class only; the cards 'fitted on all prompts' are another "
        "measurement, with baselines fitted likewise, so their gain isn't the distance of two bars here."
    )
    return [writer.figure("against_baselines", figure, table="against_baselines", caption=caption)]


def _angle(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    table = result.geometry.table()
    names = [
        _cosines(writer, table, "cosine_corrected", "corrected", "corrected_low", "corrected_high"),
        _cosines(writer, table, "cosine_measured", "cosine", "low", "high"),
    ]
    first = table[table["curve"] == table["curve"].iloc[0]]
    reliability = first.melt("level", ["reliability_first", "reliability_second"], "direction", "reliability")
    reliability["direction"] = reliability["direction"].map(
        {"reliability_first": "harmfulness at inst", "reliability_second": "refusal at last"}
    )
    figure = figures.lines(
        reliability, x="level", y="reliability", group="direction", limits=POSSIBLE,
        title="Split-half cosine of each direction with itself", xlabel="level", ylabel="cosine of two halves",
    )  # fmt: skip
    caption = "Near 0 the direction is noise, and no angle to it means anything. Near 1: half the prompts give it."
    names.append(writer.figure("reliability", figure, table="cosines", caption=caption))
    if not result.geometry.interaction.empty:
        for position in result.geometry.interaction["position"].unique():
            names.append(_norms(writer, result, position))
    return tuple(names)


def _cosines(writer: RunWriter, table: pd.DataFrame, name: str, value: str, low: str, high: str) -> str:
    drawn, noisy = angles(table, value, low, high)
    how = "corrected for noise" if value == "corrected" else "as measured"
    figure = figures.lines(
        drawn, x="level", y=value, low=low, high=high, group="curve", hline=0.0, limits=POSSIBLE,
        title=f"Cosine of the two directions by level, {how}", xlabel="level", ylabel="cosine",
    )  # fmt: skip
    figures.mark_missing(figure, noisy, x="level", group="curve", at=POSSIBLE[0], step=0.07, why=NO_ANGLE)
    caption = (
        "At 0 the directions of harm and of refusal are unrelated, at 1 they are the same. Bands: 95% jackknife over "
        "families, both directions refitted. A cross at the bottom marks, in a curve's colour, a level where its "
        "interval takes more than half of what a cosine can be: too noisy for an angle. The numbers are in the table."
    )
    return writer.figure(name, figure, table="cosines", caption=caption)


def _norms(writer: RunWriter, result: Separation, position: str) -> str:
    norms = result.geometry.interaction
    where = "last" if position == result.acts.positions[-1] else position
    figure = figures.lines(
        norms[norms["position"] == position], x="level", y="norm", group="effect",
        title=f"Size of the balanced main effects and of their interaction, at {where}", xlabel="level",
        ylabel="norm (residual-stream units)",
    )  # fmt: skip
    caption = "An interaction much smaller than both effects: harm and refusal add up, neither depends on the other."
    return writer.figure(f"effect_norms_{where}", figure, table="effect_norms", caption=caption)


def _beliefs(writer: RunWriter, result: Separation) -> tuple[str, ...]:
    if result.beliefs.prompts.empty:
        return ()
    figure = figures.scatter(
        in_words(result.beliefs.prompts), x="belief_harm", y="belief_refusal", group="quadrant", hover=["id"],
        hline=0.0, vline=0.0,
        title="Two beliefs of every held-out prompt", xlabel="belief of harmfulness, at inst (cosine difference)",
        ylabel="belief of refusal, at last (cosine difference)",
    )  # fmt: skip
    seen = "Each point is a prompt. Right: looks harmful to the model. Up: about to refuse. Look at the lower right."
    names = [writer.figure("beliefs", figure, table="beliefs", caption=seen)]
    scores = result.beliefs.by_level
    for concept in ("harmfulness", "refusal"):
        for centered in (False, True):
            rows = scores[(scores["concept"] == concept) & (scores["centered"] == centered)]
            figure = figures.lines(
                in_words(rows), x="level", y="score", low="low", high="high", group="quadrant", hline=0.0,
                title=f"Belief of {concept} by level{', centred' if centered else ''}", xlabel="level",
                ylabel="belief (cosine difference)",
            )  # fmt: skip
            caption = (
                f"Above 0: on the side of {'harmful' if concept == 'harmfulness' else 'refused'} prompts. "
                f"{'The mean of all prompts is taken off. ' if centered else ''}"
                "Follow accepted harmful prompts. Bands: 95% bootstrap over families."
            )
            name = f"score_{concept}{'_centered' if centered else ''}"
            names.append(writer.figure(name, figure, table="scores_by_level", caption=caption))
    return tuple(names)
