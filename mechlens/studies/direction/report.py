"""A concept's direction as a record: metrics, tables, figures, artefacts and a report."""

import pandas as pd
import torch

from mechlens.methods.directions.methods import MEAN_DIFFERENCE
from mechlens.methods.directions.token_view import logit_lens, project_tokens
from mechlens.methods.probing.ahead import SURFACE
from mechlens.methods.probing.confounds import TELLING
from mechlens.methods.probing.detect import MAX_REFITS
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.steering_test import HIGHEST_RISE
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.report.parts import visible
from mechlens.runs.report.report import Report, Section, TokenView
from mechlens.runs.writer import RunWriter
from mechlens.studies.direction.concept import Concept
from mechlens.studies.direction.figures import draw
from mechlens.studies.direction.sides import NEGATIVE, POSITIVE
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.rounding import class_rounding

LENS_TOKENS = 12


def record(writer: RunWriter, result: Concept, sets: ContrastSets) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    draw(writer, result)
    writer.report(_report(writer, result, sets.model, sets.punctuation))


def _report(writer: RunWriter, result: Concept, model: LanguageModel, punctuation: str) -> Report:
    names = result.detection.directions.contrast
    shown, metrics = result.best or result.detection.strongest, result.metrics()
    positive = torch.tensor([label == POSITIVE for label in result.acts.labels])
    there = result.acts.at(shown.level, shown.position)
    verdict = (
        f"{result.headline} {_kept(result)}"
        + _confounded(result)
        + class_rounding(loaded(model).parity, {"the distance between the two classes there": (there, positive)})
    )
    nearest = result.verdict.ahead.nearest
    words = _steering_words(result) | {
        "auroc.out_of_fold": f"AUROC at {result.verdict.ahead.position}, every prompt out of fold",
        f"gain.{nearest}": f"gain over {SURFACE[nearest]}",
        "effect_size": _effect_words(metrics["effect_size"]),
        "surface_auroc.tfidf": "AUROC of the words (TF-IDF)",
        "surface_auroc.mean_embedding": "AUROC of the mean embedding",
        "reliability": "split-half reliability of the direction, on training prompts",
    }
    return Report(
        title=f"A direction in {loaded(model).checkpoint.name}: {names[0]} against {names[1]}",
        question=f"Where in the model does {names[0]} differ from {names[1]}, and is it more than the words?",
        verdict=verdict,
        headline=result.headline,
        numbers={name: metrics[name] for name in words if name in metrics},
        words=words,
        sections=(
            Section(
                "Where it can be read",
                f"Held-out AUROC of the {result.detection.directions.method}: fitted on training families, the level "
                "of each position chosen on validation, scored once on test, and the effect size there.",
                ("auroc_by_level", "auroc_grid"),
                table=result.measured.chosen(),
            ),
            Section(
                "More than the surface?",
                "The prompts told apart without the model's help: by the token at the position before any block has "
                "run, by the words (TF-IDF), by the mean token embedding, by length in tokens. Here every prompt is "
                "scored by a fit to others (n is all prompts, elsewhere those of the test part), at a level chosen "
                "inside each fold, and the gain of the direction over each baseline is paired by prompt; the "
                "verdict stands on it. A direction is best only where every gain is above 0 by its lower "
                "bound, and never at level 0, which holds the token alone.",
                ("against_baselines",),
                table=result.tables()["surface"],
            ),
            Section(
                "What else differs between the sides",
                "How well each thing that the prompts show tells the sides apart on its own, out of fold. What is "
                f"telling (above {TELLING} by the lower bound) is warned about, and a direction has to be ahead of it "
                f"as well.{'' if len(result.differences()) else ' Nothing else differs.'}" + _sources_in_words(result),
                table=result.differences() if len(result.differences()) else None,
            ),
            *_steered(result),
            Section("How much of it is signal", _refits(result), ("reliability",)),
            _reading(result, model),
        ),
        how=_how(result, punctuation, model),
        model=loaded(model).checkpoint.name,
    )


def _effect_words(effect: Estimate) -> str:
    known = "out of fold" if effect.measurable else "none of so few test prompts"
    return f"effect size (Hedges' g), {known}"


def _steering_words(result: Concept) -> dict[str, str]:
    """What stands first where steering was asked for."""
    if result.steered is None or not result.steered.place:
        return {}
    taken = "the direction chosen by steering" if result.steered.direction is not None else "the one that does most"
    return {
        "steering.effect": f"effect of adding {taken}, {result.steered.place} (nats)",
        "steering.random_bound": "effect that chance reaches with random directions (nats)",
    }


def _steered(result: Concept) -> list[Section]:
    if result.steered is None:
        return []
    return [
        Section(
            "What adding it does",
            f"{result.steered.sentence} The effect is how much likelier the first answer tokens of positive prompts "
            "become, less the same of those of negative prompts. In the table are validation prompts; a direction "
            f"under which plain text is more surprising by more than {HIGHEST_RISE:g} nats a token isn't taken.",
            table=result.steered.table.sort_values("effect", ascending=False),
        )
    ]


def _kept(result: Concept) -> str:
    """What became of the direction."""
    strongest = result.detection.strongest
    if result.steered is not None:
        read = f" As a read-out: {result.verdict.headline}"
        kept = "" if result.direction is not None else " The strongest read-out is kept as `strongest`."
        return result.steered.sentence + read + kept
    if result.best is not None:
        return f"The direction is that of {result.best.position}, level {result.best.level}."
    tie = f"It is told as well by {result.verdict.ties}. " if result.verdict.ties else ""
    return (
        f"{tie}There is no best direction; the strongest, at {strongest.position}, level {strongest.level} (AUROC "
        f"{strongest.auroc} on test prompts, permutation p {strongest.permutation.p:.3f}), is kept under that name."
    )


def _confounded(result: Concept) -> str:
    telling = [one for one in result.confounds if one.telling]
    if not telling:
        return ""
    named = ", ".join(f"{SURFACE[one.name]} (AUROC {one.auroc.value:.2f} by that alone)" for one in telling)
    return f" The sides differ in more than what they mean: {named}."


def _sources_in_words(result: Concept) -> str:
    ours, theirs = (
        {p.source for p, label in zip(result.batch.prompts, result.acts.labels, strict=True) if label == side}
        for side in (POSITIVE, NEGATIVE)
    )
    if ours & theirs:
        return ""
    return " Each side has sources of its own, so how these were collected can't be told from the concept."


def _reading(result: Concept, model: LanguageModel) -> Section:
    """The direction's extreme tokens, and test prompts coloured by it."""
    direction = result.direction or result.detection.strongest.direction
    lens = logit_lens(model, direction, LENS_TOKENS)
    rows = [
        {"more likely": visible(up[0]), "logit": up[1], "less likely": visible(down[0]), "logit ": down[1]}
        for up, down in zip(lens.top, lens.bottom, strict=True)
    ]
    views = []
    for label in (POSITIVE, NEGATIVE):
        for i in [i for i in result.split.test if result.acts.labels[i] == label][:3]:
            shown = project_tokens(model, direction, result.batch.row(i))
            start = int(result.batch.instruction[i, 0]) - result.batch.offset(i)
            title = f"{label}: {result.acts.ids[i]}"
            views.append(TokenView.centred(shown.tokens[start:], shown.values[start:], title))
    return Section(
        "What it says, token by token",
        "The direction through the final norm and the unembedding (logit lens), and held-out prompts with every token "
        "coloured by its projection.",
        table=pd.DataFrame(rows),
        views=tuple(views),
    )


def _refits(result: Concept) -> str:
    """What is measured more sparingly of a method that has to be fitted anew each time."""
    if result.plan.method == MEAN_DIFFERENCE:
        return ""
    return (
        f"The {result.detection.directions.method} is fitted anew for every halving and every permutation of the "
        "labels: its reliability is measured at the chosen levels only, and its null has at most "
        f"{MAX_REFITS} permutations."
    )


def _how(result: Concept, punctuation: str, model: LanguageModel) -> str:
    best = result.detection.strongest
    return (
        f"Prompts: {result.split.sizes}, split by family. "
        f"{punctuation}\n\nIntervals: 95% bootstrap over families ({result.plan.resamples} resamples), direction "
        f"frozen. Nulls: {best.permutation.n} label permutations, {best.random.n} random directions. "
        f"Activations: {result.acts.engine} engine, {loaded(model).checkpoint.regime} weights."
    )
