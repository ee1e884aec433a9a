"""A concept's direction as a record: metrics, tables, figures, artefacts and a report."""

from pathlib import Path

import pandas as pd
import torch

from mechlens.methods.directions.methods import MEAN_DIFFERENCE
from mechlens.methods.directions.token_view import logit_lens, project_tokens
from mechlens.methods.probing.detect import MAX_REFITS, ChosenLevel
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.headline import Headline
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section, TokenView
from mechlens.runs.writer import RunWriter
from mechlens.studies.direction.study import NEGATIVE, POSITIVE, Concept
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.rounding import class_rounding

LENS_TOKENS = 12


def record(writer: RunWriter, result: Concept, sets: ContrastSets) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    _draw(writer, result)
    writer.report(_report(writer, result, sets.model, sets.punctuation))


def _draw(writer: RunWriter, result: Concept) -> None:
    table = result.table()
    curves = figures.lines(
        table, x="level", y="auroc", low="low", high="high", group="position", hline=0.5, hline_label="chance",
        title="Held-out AUROC by level", xlabel="level (0 = embedding)", ylabel="AUROC on test",
    )  # fmt: skip
    writer.figure("auroc_by_level", curves, table="auroc_by_level", caption="Bands: 95% bootstrap over families.")
    grid = figures.heatmap(
        table, x="position", y="level", value="auroc", center=0.5, limits=(0.0, 1.0), label="AUROC",
        title="AUROC at every position and level", xlabel="position", ylabel="level",
    )  # fmt: skip
    writer.figure("auroc_grid", grid, table="auroc_by_level")
    chosen = result.measured.chosen().assign(what="direction at " + result.measured.chosen()["position"])
    surface = result.baselines()
    surface = surface.assign(what=surface["baseline"].map(_baseline_in_words))
    both = pd.concat([frame[["what", "auroc", "low", "high"]] for frame in (chosen, surface)], ignore_index=True)
    writer.table("against_baselines", both)
    bars = figures.bars(
        both, x="what", y="auroc", low="low", high="high", hline=0.5, hline_label="chance",
        title="The direction against surface baselines, on the same test prompts", xlabel="", ylabel="AUROC",
    )  # fmt: skip
    writer.figure("against_baselines", bars, table="against_baselines")
    reliability = figures.lines(
        table, x="level", y="reliability", group="position",
        title="Split-half reliability of the direction", xlabel="level", ylabel="reliability",
    )  # fmt: skip
    writer.figure("reliability", reliability, table="auroc_by_level", caption="0 is noise, 1 noise-free.")


def _baseline_in_words(name: str) -> str:
    kind, _, position = name.partition("_auroc")
    words = {"tfidf": "words (TF-IDF)", "token_identity": "token at"}.get(kind, kind.replace("_", " "))
    return f"{words}{position.replace('.', ' ')}"


def _short(positive: str, negative: str) -> tuple[str, str]:
    """What two sources are called: a file's name without its folder, unless both then look the same."""
    first, second = (Path(source).name if Path(source).is_file() else source for source in (positive, negative))
    return (positive, negative) if first == second else (first, second)


def _report(writer: RunWriter, result: Concept, model: LanguageModel, punctuation: str) -> Report:
    names = _short(writer.run.config["positive"], writer.run.config["negative"])
    best, metrics = result.detection.best, result.metrics()
    own_words = (f"token_identity_auroc.{best.position}", "tfidf_auroc", "mean_embedding_auroc", "length_auroc")
    beaten = [metrics[name] for name in own_words if name in metrics and metrics[name].measurable]
    surface = max((est.value for est in beaten), default=0.5)
    clear = best.auroc.low > max(surface, best.random.maximum) and best.permutation.p < 0.05
    positive = torch.tensor([label == POSITIVE for label in result.acts.labels])
    at_best = result.acts.at(best.level, best.position)
    verdict = (
        f"The concept is read best at {best.position}, level {best.level}: AUROC {best.auroc} on held-out prompts. "
        + (
            "That is more than the surface, permuted labels and random directions give."
            if clear
            else f"That is not clearly more than the surface gives (best baseline {surface:.2f}) or than chance "
            f"finds (best of {best.random.n} random directions {best.random.maximum:.2f}, permutation p "
            f"{best.permutation.p:.3f})."
        )
        + class_rounding(loaded(model).parity, {"the distance between the two classes there": (at_best, positive)})
    )
    words = {
        "auroc.best": f"AUROC at {best.position}",
        f"token_identity_auroc.{best.position}": f"AUROC of the token at {best.position} alone",
        "tfidf_auroc": "AUROC of the words (TF-IDF)",
        "mean_embedding_auroc": "AUROC of the mean embedding",
        "reliability": "split-half reliability of the direction",
    }
    return Report(
        title=f"A direction in {loaded(model).checkpoint.name}: {names[0]} against {names[1]}",
        question=f"Where in the model does {names[0]} differ from {names[1]}, and is it more than the words?",
        headline=_headline(best, surface, clear),
        verdict=verdict,
        numbers={name: metrics[name] for name in words if name in metrics},
        words=words,
        sections=(
            Section(
                "Where it can be read",
                f"Held-out AUROC of the {result.detection.directions.method}: fitted on training families, the level "
                "of each position chosen on validation, scored once on test.",
                ("auroc_by_level", "auroc_grid"),
                table=result.measured.chosen(),
            ),
            Section(
                "More than the surface?",
                "The same test prompts told apart without the model's help: by the token at the position before any "
                "block has run, by the words (TF-IDF), by the mean token embedding, by length.",
                ("against_baselines",),
            ),
            Section("How much of it is signal", _refits(result), ("reliability",)),
            _reading(result, model),
        ),
        how=_how(result, punctuation, model),
        model=loaded(model).checkpoint.name,
    )


def _headline(best: ChosenLevel, surface: float, clear: bool) -> Headline:
    """The one sentence: the best held-out AUROC, beside the best of the surface and of random directions."""
    word = "read beyond the surface" if clear else "not clearly more than the surface"
    number = f"at {best.position}, level {best.level}, held-out AUROC is {best.auroc.brief}"
    against = f"where the surface reaches {surface:.2f} and random directions {best.random.maximum:.2f}"
    return Headline(word, number, against, "" if clear else "pairs matched in form would say more")


def _reading(result: Concept, model: LanguageModel) -> Section:
    """The direction's extreme tokens, and test prompts coloured by it."""
    best = result.detection.best
    lens = logit_lens(model, best.direction, LENS_TOKENS)
    rows = [
        {"more likely": up[0], "logit": up[1], "less likely": down[0], "logit ": down[1]}
        for up, down in zip(lens.top, lens.bottom, strict=True)
    ]
    views = []
    for label in (POSITIVE, NEGATIVE):
        for i in [i for i in result.split.test if result.acts.labels[i] == label][:3]:
            shown = project_tokens(model, best.direction, result.batch.row(i))
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
    best = result.detection.best
    return (
        f"Prompts: {result.split.sizes}, split by family. "
        f"{punctuation}\n\nIntervals: 95% bootstrap over families ({result.plan.resamples} resamples), direction "
        f"frozen. Nulls: {best.permutation.n} label permutations, {best.random.n} random directions. "
        f"Activations: {result.acts.engine} engine, {loaded(model).checkpoint.regime} weights."
    )
