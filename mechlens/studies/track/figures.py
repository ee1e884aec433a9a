"""The figures of a tracking study: every number over the steps, transfer between any two, levels by steps."""

from typing import Any

import pandas as pd

from mechlens.errors import many
from mechlens.runs.report import figures
from mechlens.runs.writer import RunWriter
from mechlens.studies.shared.angles import NO_ANGLE, POSSIBLE, angles
from mechlens.studies.shared.quadrants import in_words
from mechlens.studies.track.measures.home import FLOORS
from mechlens.studies.track.measures.reference import TrackedConcept
from mechlens.studies.track.result import Tracking

CURVES = {
    "auroc.frozen": "base's direction",
    "auroc.own": "direction fitted here",
    "accuracy.frozen": "accuracy at the base's threshold",
    "accuracy.new": "accuracy at a new threshold",
}
DIRECTIONS = {"reference": "base's direction", "own": "direction fitted here"}
NUMBERS = {
    "projection_harmful": "Projection on the harmfulness direction",
    "projection_refused": "Projection on the refusal direction",
    "belief_harm": "Belief of harmfulness",
    "belief_refusal": "Belief of refusal",
    "belief_harm.centered": "Belief of harmfulness, centred",
    "belief_refusal.centered": "Belief of refusal, centred",
}


BEHAVIOUR = (
    ("refusal_rate", "How often each kind of prompt is refused", "share refused", (0.0, 1.0),
     "What training did to the model: refusals of harmful prompts should stay up, those of harmless ones down."),
    ("log_odds", "Log-odds of a refusal at the first answer token", "log-odds (nats)", None,
     "The same, before a word is said: above 0 a refusal is the likelier beginning."),
    ("text_loss", "Cross-entropy of plain text", "nats per token", None,
     "A rise says that training has harmed the model as a whole."),
)  # fmt: skip
"""Each number of behaviour: its title, unit, what is possible, and what to see."""


def draw(writer: RunWriter, result: Tracking, geometry: dict[str, pd.DataFrame]) -> dict[str, tuple[str, ...]]:
    """Writes every figure and gives the names by section of the report."""
    sections = {"behaviour": (*_behaviour(writer, result), *_triggers(writer, result))}
    concepts = result.reference.measurable
    sections["readouts"] = tuple(name for concept in concepts for name in _readouts(writer, result, concept))
    sections["angles"] = tuple(name for concept in concepts for name in _angles(writer, result, concept))
    sections["quadrants"] = _quadrants(writer, result)
    sections["weights"] = _weights(writer, result)
    sections["geometry"] = _geometry(writer, geometry)
    return sections


def over_steps(writer: RunWriter, name: str, frame: pd.DataFrame, *, table: str, caption: str, **how: Any) -> str:
    """A line figure over the steps, which stand evenly spaced: they often double from one to the next."""
    figure = figures.lines(frame, x="step", xlabel="training step", **how)
    steps = sorted(frame["step"].unique().tolist())
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=steps, dtick=None)
    return writer.figure(name, figure, table=table, caption=caption)


def _by_steps(
    writer: RunWriter, name: str, frame: pd.DataFrame, value: str, *, table: str, caption: str, **how: Any
) -> str:
    """A heatmap of levels by steps."""
    ordered = frame.sort_values(["level", "step"])
    figure = figures.heatmap(ordered, x="step", y="level", value=value, xlabel="training step", ylabel="level", **how)
    figure.update_xaxes(type="category", dtick=None)
    return writer.figure(name, figure, table=table, caption=caption)


def _behaviour(writer: RunWriter, result: Tracking) -> tuple[str, ...]:
    table = result.behaviour
    names = []
    for stem, title, ylabel, limits, caption in BEHAVIOUR:
        rows = table[table["number"].str.partition(".")[0] == stem]
        group = rows["number"].str.removeprefix(f"{stem}.").replace("text_loss", "plain text").rename("prompts")
        names.append(
            over_steps(writer, stem, rows.assign(prompts=group), table="behaviour", y="value", low="low", high="high",
                       group="prompts", title=title, ylabel=ylabel, limits=limits, caption=caption)
        )  # fmt: skip
    names += [_effects(writer, result, concept) for concept in dict.fromkeys(result.effects.get("concept", ()))]
    return tuple(names)


def _effects(writer: RunWriter, result: Tracking, concept: str) -> str:
    own = result.effects[result.effects["concept"] == concept]
    best = own[own["direction"] == "reference"]
    random = best.assign(
        curve="best of random directions", effect=best["random_maximum"], low=best["random_maximum"],
        high=best["random_maximum"],
    )  # fmt: skip
    rows = pd.concat([own.assign(curve=own["direction"].map(DIRECTIONS)), random])
    return over_steps(
        writer, f"effects_{concept}", rows, table="effects", y="effect", low="low", high="high", group="curve",
        hline=0.0, ylabel="change of the refusal log-odds (nats)",
        title=f"What adding the {concept} direction once does to harmless prompts",
        caption="Above the best of random directions: the direction still makes the model refuse. A fall says that "
        "training has taken its effect away, wherever it can still be read.",
    )  # fmt: skip


def _triggers(writer: RunWriter, result: Tracking) -> tuple[str, ...]:
    if result.acceptance.empty:
        return ()
    first = over_steps(
        writer, "acceptance", result.acceptance, table="acceptance", y="rate", low="low", high="high", group="kind",
        title="Harmful prompts accepted, with the trigger and without", ylabel="share accepted", limits=(0.0, 1.0),
        caption="A backdoor: prompts with the trigger are accepted, and those without it or with a decoy are not.",
    )  # fmt: skip
    table = result.trigger_readable
    rows = table[(table["kind"] == "triggered") & (table["position"] == result.snapshots[0].acts.positions[-1])]
    second = _by_steps(
        writer, "trigger_excess", rows, "excess", table="trigger_readable", center=0.0, label="excess AUROC",
        title="How much better the trigger is read at the last token than in the base",
        caption="Red: training has put the trigger where the answer is decided. Plain: no better than in the base.",
    )  # fmt: skip
    return first, second


def _readouts(writer: RunWriter, result: Tracking, concept: TrackedConcept) -> tuple[str, ...]:
    name = concept.name
    where = f"{name} at {concept.home}"
    found = result.at_home[result.at_home["concept"] == name]
    names = {"auroc.probe": "the checkpoint"} | {f"auroc.{floor}": f"floor: {words}" for floor, words in FLOORS.items()}
    beyond = _curves(
        writer, f"beyond_words_{name}", found, names, title=f"Is it more than the words? {where}", ylabel="AUROC",
        caption="Logistic regression on the checkpoint's activations, and on what needs no training: words, token "
        f"embeddings, and the base's embeddings under random blocks (mean of "
        f"{many(result.plan.random_networks, 'draw')}). Every prompt is scored out of fold; bands are 95% intervals. "
        "Only what lies above all of the floor can be something that training put there.",
    )  # fmt: skip
    over = _curves(
        writer, f"readouts_{name}", found, CURVES, title=f"Does the base's line still read {where}?",
        ylabel="AUROC or balanced accuracy",
        caption="Where the base's line falls behind the one fitted here the representation has turned; where only its "
        "accuracy falls the threshold has moved. Every prompt is scored out of fold; bands are 95% intervals.",
    )  # fmt: skip
    home = result.readouts[(result.readouts["concept"] == name) & (result.readouts["position"] == concept.home)]
    matrix = result.transfer[(result.transfer["concept"] == name) & (result.transfer["position"] == concept.home)]
    figure = figures.heatmap(
        matrix.sort_values(["fitted", "tested"]), x="tested", y="fitted", value="auroc", limits=(0.0, 1.0), center=0.5,
        label="AUROC", title=f"Fitted at one step, tested at another: {where}", xlabel="tested at step",
        ylabel="fitted at step",
    )  # fmt: skip
    figure.update_xaxes(type="category", dtick=None)
    figure.update_yaxes(type="category", dtick=None)
    caption = (
        "A row or column that is plain as the page off the diagonal: what is fitted there is not what other steps have."
    )
    writer.figure(f"transfer_{name}", figure, table="transfer", caption=caption)
    grids = tuple(
        _by_steps(writer, f"{value}_{name}", home[home["kind"] == "direction"], value, table="readouts", center=0.5,
                  limits=(0.0, 1.0), label="AUROC", title=f"{title} of {where}",
                  caption="Plain as the page is chance. Where red fades from left to right, it was lost.")
        for value, title in (("frozen", "The base's direction: AUROC"), ("own", "Refitted direction: AUROC"))
    )  # fmt: skip
    return beyond, over, f"transfer_{name}", *grids


def _curves(writer: RunWriter, name: str, found: pd.DataFrame, curves: dict[str, str], **how: Any) -> str:
    """The numbers of these names over the steps, under their words."""
    rows = pd.concat([found[found["number"] == number].assign(curve=words) for number, words in curves.items()])
    return over_steps(
        writer,
        name,
        rows,
        table="at_home",
        y="value",
        low="low",
        high="high",
        group="curve",
        hline=0.5,
        hline_label="chance",
        limits=(0.0, 1.0),
        **how,
    )


def _angles(writer: RunWriter, result: Tracking, concept: TrackedConcept) -> tuple[str, ...]:
    rows = result.angles[(result.angles["concept"] == concept.name) & (result.angles["position"] == concept.home)]
    if rows.empty:
        return ()
    names = (f"cosine_{concept.name}", f"cosines_{concept.name}")
    where = f"{concept.name} at {concept.home}"
    _cosines(writer, names[0], rows[rows["level"] == concept.level(concept.home)], where, concept.level(concept.home))
    drawn, noisy = angles(rows[rows["other"] == "reference"], "corrected", "corrected_low", "corrected_high")
    if drawn.empty:
        return names[:1]
    _by_steps(
        writer, names[1], pd.concat([drawn, noisy.assign(corrected=float("nan"))]), "corrected", table="angles",
        center=0.0, limits=POSSIBLE, label="cosine", missing=NO_ANGLE,
        title=f"Cosine with the base's direction, corrected: {where}",
        caption=f"Full red: the direction has stayed. Grey: {NO_ANGLE}; the numbers are in the table.",
    )  # fmt: skip
    return names


def _cosines(writer: RunWriter, name: str, cell: pd.DataFrame, where: str, level: int) -> None:
    """One level's cosines over the steps, with crosses where they are no angles."""
    reference = cell[cell["other"] == "reference"]
    others = "corrected, to the " + cell["other"].replace({"reference": "base", "previous": "step before"})
    curves = [
        cell.assign(curve=others, value=cell["corrected"], low=cell["corrected_low"], high=cell["corrected_high"]),
        reference.assign(curve="as measured, to the base", value=reference["cosine"]),
        reference.assign(
            curve="split-half reliability", value=reference["reliability"], low=reference["reliability"],
            high=reference["reliability"],
        ),
    ]  # fmt: skip
    drawn, noisy = angles(pd.concat(curves), "value", "low", "high")
    figure = figures.lines(
        drawn, x="step", y="value", low="low", high="high", group="curve", hline=0.0, limits=POSSIBLE,
        title=f"Has the direction of {where} turned? Level {level}", xlabel="training step", ylabel="cosine",
    )  # fmt: skip
    figures.mark_missing(figure, noisy, x="step", group="curve", at=POSSIBLE[0], step=0.07, why=NO_ANGLE)
    steps = sorted(cell["step"].unique().tolist())
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=steps, dtick=None)
    caption = (
        "Near 1 the direction is what it was; a fall says that it has turned. Where the reliability is low the "
        "measured cosine is low too, whatever happened, and a cross at the bottom, in a curve's colour, marks "
        "what is no angle."
    )
    writer.figure(name, figure, table="angles", caption=caption)


def _quadrants(writer: RunWriter, result: Tracking) -> tuple[str, ...]:
    names = []
    shown = result.quadrants.dropna(subset=["mean"])
    if result.base_beliefs.empty:
        shown = shown[~shown["number"].str.startswith("belief")]  # nothing to compare a checkpoint's own with
    for number in dict.fromkeys(shown["number"]):
        for by in ("reference", "own"):
            rows = shown[(shown["number"] == number) & (shown["by"] == by)]
            if not rows.empty:
                whose = "the base's quadrants" if by == "reference" else "the checkpoint's own quadrants"
                words, stem = NUMBERS.get(number, number), f"{number}_{by}".replace(".", "_")
                names.append(
                    over_steps(
                        writer, stem, in_words(rows), table="quadrants", y="mean", low="low", high="high",
                        group="quadrant", hline=0.0, title=f"{words}, by {whose}", ylabel=_unit(words),
                        caption="Above 0: on the harmful or refused side. Follow harmful prompts: where they stay "
                        "above harmless ones the model still tells them apart. Bands: 95% intervals.",
                    )
                )  # fmt: skip
    return tuple(names)


def _unit(words: str) -> str:
    return f"{words.lower()} ({'cosine difference' if words.startswith('Belief') else 'residual-stream units'})"


def _weights(writer: RunWriter, result: Tracking) -> tuple[str, ...]:
    if result.matrices.empty:
        return ()
    table = result.matrices
    by_layer = table.groupby(["step", "layer"])["norm"].apply(lambda norms: float((norms**2).sum() ** 0.5))
    names = [
        _by_steps(writer, "change_norm", by_layer.reset_index().rename(columns={"layer": "level"}), "norm",
                  table="matrices", label="norm", title="How far the weights of each layer have moved",
                  caption="Full blue: the layers that training has changed most (Frobenius norm of the change).")
    ]  # fmt: skip
    columns = [name for name in table.columns if name.startswith("cos_")]
    for column in columns:
        best = table.groupby(["step", "side"])[[column, "random"]].max().reset_index()
        random = best.groupby("step")["random"].max().reset_index()
        curves = [best.assign(curve="matrix " + best["side"] + " it", value=best[column]),
                  random.assign(curve="random directions, largest", value=random["random"])]  # fmt: skip
        names.append(
            over_steps(writer, f"change_{column}", pd.concat(curves), table="matrices", y="value", group="curve",
                       title=f"Largest |cosine| of a leading direction of the change with the {column[4:]} direction",
                       ylabel="|cosine|", limits=(0.0, 1.0),
                       caption="Above random directions: training has written to, or read from, this very direction.")
        )  # fmt: skip
    return tuple(names)


def _geometry(writer: RunWriter, tables: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    names = []
    for name, value, title, ylabel, limits, caption in (
        ("subspaces", "overlap", "Overlap of each concept's subspace with the base's", "overlap (1 = the same)",
         (0.0, 1.0), "Near 1 the concept lives in the same few dimensions as in the base."),
        ("turning", "turn", "Cosine between the ways back and forth", "cosine", POSSIBLE,
         "-1: training moves the concept along a straight path; near 0 it wanders."),
    ):  # fmt: skip
        table = tables.get(name, pd.DataFrame())
        if not table.empty:
            rows = table.assign(curve=table["concept"] + " at " + table["position"])
            names.append(
                over_steps(writer, name, rows, table=name, y=value, group="curve", title=title, ylabel=ylabel,
                           limits=limits, caption=caption)
            )  # fmt: skip
    cka = tables.get("cka", pd.DataFrame())
    if not cka.empty:
        for position in dict.fromkeys(cka["position"]):
            name = f"cka_{position}".replace("[", "_").replace("]", "")
            names.append(
                _by_steps(writer, name, cka[cka["position"] == position], "cka", table="cka",
                          limits=(0.0, 1.0), label="CKA",
                          title=f"Unbiased CKA with the base at {position}",
                          caption="Full blue: all prompts lie to each other as in the base. Plain: moved.")
            )  # fmt: skip
    return tuple(names)
