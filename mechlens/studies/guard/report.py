"""A guard's evaluation as a record: numbers, curves, score distributions, the table with baselines, worst mistakes."""

import statistics
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from mechlens.methods.activations.collect import collect
from mechlens.methods.directions.token_view import project_tokens
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.probing.auroc import less_than_one
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, device_of, loaded, n_layers
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import prompt_logits
from mechlens.models.engine.reference import whole_logits
from mechlens.prompts.batch import TokenBatch
from mechlens.runs.report import figures
from mechlens.runs.report.figure_parts import draw_diagonal, left_out
from mechlens.runs.report.report import Report, Section, TokenView
from mechlens.runs.writer import RunWriter
from mechlens.studies.guard.evaluation import GuardEvaluation
from mechlens.studies.guard.measures import TOTAL, TWINS
from mechlens.studies.guard.outcome import GUARD, MARGIN
from mechlens.studies.guard.study import GuardTest
from mechlens.studies.guard.twins import MOST_LONGER
from mechlens.studies.guard.verdict import GuardReport, guard_report, read_direction, worst_mistakes
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.rounding import class_rounding

QUESTION = (
    "Does the model itself know that a prompt is harmful, and does reading that tell harmful prompts from harmless "
    "ones of the same form that the guard hasn't seen, better than the words alone, than other directions, and than "
    "the model's own refusals?"
)
OF_EACH_KIND = 5
SHOWN_CHARACTERS, SHOWN_TOKENS = 300, 150
"""Of a mistaken prompt: a jailbreak template can be pages long, and what decides stands at its end."""
PERCENT = (1, 5)
NUMBERS = {
    f"auroc.{GUARD}.{TWINS}": "AUROC of the guard on twins",
    f"auroc.tfidf.{TWINS}": "AUROC of the words (TF-IDF) on twins",
    f"auroc_gain.tfidf.{TWINS}": "AUROC of the guard minus that of the words, on twins",
    f"auroc.{GUARD}": "AUROC of the guard on all prompts",
    "auroc.tfidf": "AUROC of the words (TF-IDF) on all prompts",
    **{f"tpr_at_{rate}pct_fpr.{GUARD}": f"harmful flagged where {rate}% of harmless are" for rate in PERCENT},
    f"accuracy.{GUARD}": "accuracy at the threshold",
    f"fpr.{GUARD}": "harmless flagged at the threshold",
    f"calibration_error.{GUARD}": "calibration error",
    "over_refusal.false_positives": "harmless flagged that look harmful",
}
"""The headline numbers, in words."""

SOURCES = {"held_out": "held out", TOTAL: "all prompts"}

IN_ROC = (GUARD, "paper_rule", "tfidf", "refusal_direction", "own_refusal")
"""Detectors whose curves are drawn: more can't be told apart."""

REPEATS = 3


@dataclass(frozen=True)
class GuardCost:
    """Medians over prompts asked one at a time, each the fastest of three; seconds depend on machine and load."""

    blocks: int
    """Blocks that are run."""
    of_blocks: int
    guard_seconds: float
    prefill_seconds: float
    """All blocks, the final norm and the logits of the last token: what answering the prompt begins with."""
    n: int

    @property
    def share(self) -> float:
        """The guard's time as a share of the prefill's."""
        return self.guard_seconds / self.prefill_seconds


def guard_cost(model: LanguageModel, guard: FittedGuard, batch: TokenBatch, most: int = 12) -> GuardCost:
    """Times the guard and a full prefill on the first prompts of the batch, in turn."""
    fast = forward.fits_fast_path(model)
    guards, prefills = [], []
    for i in range(min(most, len(batch.prompts))):
        one, ids = batch.select([i]), batch.row(i)
        row = Row(tuple(ids), (len(ids) - 1,))

        def ask(one: TokenBatch = one) -> object:
            return collect(model, one, positions=guard.positions, levels=guard.levels)

        def prefill(row: Row = row) -> object:
            if fast:
                return prompt_logits(model, [row], None)
            return whole_logits(model, torch.tensor([row.ids], device=device_of(model)))

        guards.append(_fastest(ask))
        prefills.append(_fastest(prefill))
    return GuardCost(
        blocks=max(guard.levels),
        of_blocks=n_layers(model),
        guard_seconds=statistics.median(guards),
        prefill_seconds=statistics.median(prefills),
        n=len(guards),
    )


def _fastest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def record(writer: RunWriter, result: GuardEvaluation, given: ContrastSets | GuardTest) -> None:
    """Writes everything the evaluation found into an open run."""
    evaluated = guard_report(result)
    cost = guard_cost(given.model, result.guard, result.batch)
    writer.result(evaluated)
    writer.table("cost", _cost(cost))
    shown = _draw(writer, result, evaluated)
    writer.report(_report(writer, result, evaluated, cost, given.model, shown, given.punctuation))


def _cost(cost: GuardCost) -> pd.DataFrame:
    row = {
        "blocks run": f"{cost.blocks} of {cost.of_blocks}",
        "guard, ms": 1000 * cost.guard_seconds,
        "whole prefill, ms": 1000 * cost.prefill_seconds,
        "share of a prefill": cost.share,
        "n": cost.n,
    }
    return pd.DataFrame([row])


def _in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its detectors as a figure writes them."""
    names = frame["detector"].replace({"tfidf": "words (TF-IDF)", "token_identity": "token at inst"})
    return frame.assign(detector=names.str.replace("_", " "))


def _measured(columns: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of which there are too few prompts for any rate."""
    return columns[[name for name in columns if not columns[name].str.startswith("- (").all()]]


def _draw(writer: RunWriter, result: GuardEvaluation, said: GuardReport) -> dict[str, tuple[str, ...]]:
    curves = said.curves()
    shown = [name for name in IN_ROC if name in set(curves["detector"])]
    roc = figures.lines(
        _in_words(curves[curves["detector"].isin(shown)]), x="fpr", y="tpr", group="detector", limits=(0.0, 1.0),
        title="ROC on all test prompts", xlabel="share of harmless prompts flagged (FPR)",
        ylabel="share of harmful prompts flagged (TPR)",
    )  # fmt: skip
    roc.update_xaxes(range=[-0.02, 1.02])
    roc.update_traces(line_shape="hv")  # a threshold between two rates catches no more than at the lower
    draw_diagonal(roc, 0.0, 1.0)
    caption = (
        "The nearer to the top left corner the better; the dashed diagonal is chance. Where few harmless prompts may "
        "be flagged only the left edge counts."
    ) + left_out(_in_words(curves[~curves["detector"].isin(shown)])["detector"])
    writer.figure("roc", roc, table="roc", caption=caption)
    kinds = {TWINS: "twins", TOTAL: "all prompts"}
    areas = said.measures[said.measures["source"].isin(kinds) & (said.measures["measure"] == "auroc")]
    bars = figures.bars(
        _in_words(areas.assign(tested=areas["source"].map(kinds))), x="detector", y="value", low="low", high="high",
        group="tested", hline=0.5, hline_label="chance", limits=(0.0, 1.0),
        title="The guard beside other detectors, on the same prompts", xlabel="", ylabel="AUROC",
    )  # fmt: skip
    drawn = areas.dropna(subset="value")
    where = " on the twins: those differ in harm, not in form" if TWINS in set(drawn["source"]) else ""
    told = " Bars: 95% intervals over families." if (drawn["high"] - drawn["low"]).lt(1).any() else ""
    caption = f"The guard should stand above the words, the mean embedding and the token{where}.{told}"
    writer.figure("against_baselines", bars, table="baselines", caption=caption)
    flagged = said.measures[(said.measures["detector"] == GUARD) & said.measures["measure"].isin(["tpr", "fpr"])]
    names = {"tpr": "harmful prompts", "fpr": "harmless prompts"}
    rates = figures.bars(
        flagged.assign(what=flagged["measure"].map(names), source=flagged["source"].replace(SOURCES)),
        x="source", y="value", low="low", high="high", group="what",
        title="What the guard flags, by source", xlabel="source", ylabel="share flagged",
        limits=(0.0, 1.0),
    )  # fmt: skip
    caption = "Harmful prompts should be flagged and harmless ones not, in every source. Bars: 95% bootstrap."
    writer.figure("flagged_by_source", rates, table="measures", caption=caption)
    return {"roc": ("against_baselines", "roc"), "sources": ("flagged_by_source", *_distributions(writer, result))}


def _distributions(writer: RunWriter, result: GuardEvaluation) -> tuple[str, ...]:
    prompts = result.examined.prompts
    frame = pd.DataFrame({"score": result.scores.tolist(), "group": [f"{prompt.label} prompts" for prompt in prompts]})
    figure = figures.histogram(
        frame, value="score", group="group", vline=result.guard.calibration.threshold,
        title="Scores of harmful and of harmless prompts", xlabel="the guard's score; the dashed line is its threshold",
    )  # fmt: skip
    caption = "Where the two overlap the guard is mistaken. Harmful prompts should lie to the right of the line."
    writer.figure("scores_by_source", figure, table="scores", caption=caption)
    return ("scores_by_source",)


def _rounding(result: GuardEvaluation, model: LanguageModel) -> str:
    """Of the distance between the test prompts' classes at the guard's first place."""
    place = result.guard.places[0]
    harmful = torch.tensor([prompt.label == "harmful" for prompt in result.examined.prompts])
    where = f"the distance between harmful and harmless prompts at level {place.level}, {place.position}"
    return class_rounding(loaded(model).parity, {where: (result.test.at(place.level, place.position), harmful)})


def _report(
    writer: RunWriter,
    result: GuardEvaluation,
    said: GuardReport,
    cost: GuardCost,
    model: LanguageModel,
    shown: dict[str, tuple[str, ...]],
    punctuation: str,
) -> Report:
    name = loaded(model).checkpoint.name
    fitted, columns = result.guard.checkpoint.name, _measured(_in_words(said.five_columns()))
    elsewhere = f" (fitted on {fitted})" if result.other_weights else ""
    return Report(
        title=f"The Latent Guard of {name}{elsewhere}",
        question=QUESTION,
        headline=said.twins.headline,
        verdict=said.verdict + _rounding(result, model),
        numbers=_cards(said.numbers),
        words=NUMBERS,
        sections=(
            Section(
                "Beside everything simpler",
                f"{_twins_text(result)}All are tested on the same prompts. Those that are fitted saw the same training "
                "prompts and get their threshold from held-out folds of the training prompts, for the same "
                "false-positive rate; the paper rule keeps the published threshold of 0. AUROC needs no threshold; "
                "accuracy, true and false positives are at it, on all prompts.",
                shown["roc"],
                table=_in_words(said.baselines()),
            ),
            Section(
                "By source",
                "What was left out because the guard, an adapter of the model or an earlier source knows it is "
                "counted below; an attack is left out where its goal is known.",
                shown["sources"],
                table=result.examined.left_out.replace({"source": SOURCES}),
            ),
            Section(
                "Attacks, and prompts that the model itself misjudges",
                "Accuracy (the columns of Zhao et al. 2025, table 3). Refused harmless and accepted harmful prompts "
                "are those of plain sources, by this model's own answers."
                + (
                    ""
                    if len(columns.columns) > 1
                    else f" There are fewer than {MIN_IN_A_CLASS} prompts of each, so no rates."
                ),
                table=columns if len(columns.columns) > 1 else None,
            ),
            Section("What it costs", _cost_text(cost), table=_cost(cost)),
            _mistakes(result, model),
        ),
        how=_how(result, said.numbers, punctuation, model),
        model=name,
    )


def _cards(numbers: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """What was measured of the headline numbers; none at 1% or 5% of so few harmless ones that it is no prompt."""
    harmless = numbers[f"fpr.{GUARD}"].n
    unmeant = {f"tpr_at_{rate}pct_fpr.{GUARD}" for rate in PERCENT if less_than_one(rate / 100, harmless)}
    return {name: numbers[name] for name in NUMBERS if name in numbers and numbers[name].n and name not in unmeant}


def _twins_text(result: GuardEvaluation) -> str:
    twins = result.examined.twins
    return (
        f"Twins: {len(twins.pairs)} harmful prompts, each beside a harmless one of its form; one family's prompts, or "
        "else the same opening word and final mark, lengths within a factor of "
        f"{MOST_LONGER:g}, and of those the nearest by TF-IDF, one to one. The verdict is theirs: beyond the words "
        "where the guard is better than chance and than every surface baseline by the intervals' lower bounds; no more "
        f"than the words where it is less than {MARGIN:g} better than the best of them by the upper bound.\n\n"
    )


def _cost_text(cost: GuardCost) -> str:
    return (
        f"The guard runs {cost.blocks} of {cost.of_blocks} blocks and no logits. One prompt at a time it takes "
        f"{cost.share:.0%} of a whole prefill here. Seconds depend on the machine and on what else it does."
    )


def _mistakes(result: GuardEvaluation, model: LanguageModel) -> Section:
    """The prompts judged worst, their tokens coloured by the projection on what the guard reads."""
    rows, views = [], []
    direction = read_direction(result.guard)
    for mistake in worst_mistakes(result, OF_EACH_KIND):
        prompt = result.examined.prompts[mistake.row]
        text = textwrap.shorten(prompt.text, SHOWN_CHARACTERS, placeholder=" ...")
        rows.append(
            {
                "mistake": mistake.kind,
                "source": SOURCES.get(prompt.source, prompt.source),
                "score": mistake.score,
                "prompt": text,
            }
        )
        if result.other_weights:
            continue  # a direction of other weights means nothing token by token
        projection = project_tokens(model, direction, result.batch.row(mistake.row))
        start = int(result.batch.instruction[mistake.row, 0]) - result.batch.offset(mistake.row)
        title = f"{mistake.kind}: {prompt.id}, score {mistake.score:.2f}"
        views.append(TokenView.centred(projection.tokens[start:], projection.values[start:], title, most=SHOWN_TOKENS))
    return Section(
        "The worst mistakes",
        f"Tokens are coloured by their projection on the line that the guard reads at {direction.position}, level "
        f"{direction.level}; blue is below the prompt's mean, red above."
        if rows
        else "The guard made none on these prompts.",
        table=pd.DataFrame(rows) if rows else None,
        views=tuple(views),
    )


def _how(result: GuardEvaluation, metrics: Mapping[str, Estimate], punctuation: str, model: LanguageModel) -> str:
    settings, plan, calibration = result.guard.settings, result.plan, result.guard.calibration
    return (
        f"Guard: rule {settings.rule}, positions {', '.join(settings.positions)}, levels {settings.levels}; fitted and "
        f"calibrated on {len(result.guard.train_ids)} prompts ({calibration.n_positive} harmful, "
        f"{calibration.n_negative} harmless), none of them tested. Levels were chosen by AUROC on a validation part, "
        "the lowest of those that do as well as the best; the threshold is a conformal bound and the probabilities "
        "Platt scaling, both from held-out folds of those prompts; probabilities are for equally many harmful and "
        "harmless prompts.\n\n"
        f"{punctuation}. Intervals: 95%, over prompt families, detectors frozen; of AUROCs and their differences as "
        f"`auroc_bounds` and `auroc_difference` say, of rates a bootstrap ({plan.resamples} resamples). Nulls: "
        f"{plan.random_directions} random directions at the guard's first place; {plan.permutations} refits "
        f"of its rule to permuted labels (mean AUROC {metrics['null.shuffled_mean'].value:.2f}, p = "
        f"{metrics['null.shuffled_p'].value:.3f}; labels change places inside matched pairs and among prompts without "
        "one, so the mean lies above 0.5 where the guard's places tell pairs from other prompts). The calibration "
        "error is biased upwards where a source is small.\n\n"
        f"Answers: greedy, {plan.max_new_tokens} tokens. Activations: {result.test.engine} engine, "
        f"{loaded(model).checkpoint.regime} weights."
    )
