"""The numbers of a guard evaluation that a record keeps, its worst mistakes, and the sentence that they allow."""

from dataclasses import dataclass

import pandas as pd

from mechlens.methods.directions.direction import Direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.rules import LinearScore
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.guard.evaluation import GuardEvaluation
from mechlens.studies.guard.measures import (
    MEASURES,
    SURFACE,
    auroc_gains,
    five_columns,
    measures,
    over_refusal,
    random_directions,
    shuffled_labels,
)

GUARD = "latent_guard"


@dataclass(frozen=True)
class GuardReport:
    """Tables and metrics of an evaluation, with the verdict."""

    measures: pd.DataFrame
    columns: pd.DataFrame
    over_refusal: pd.DataFrame
    metrics: dict[str, Estimate]
    verdict: str


def guard_report(result: GuardEvaluation) -> GuardReport:
    """Everything that is said of an evaluation, computed once."""
    table, columns, refusals = measures(result), five_columns(result), over_refusal(result)
    gains = auroc_gains(result)
    metrics = _of_detectors(table) | _of_sources(table) | gains
    for row in columns[columns["detector"] == GUARD].to_dict("records"):
        metrics[f"column.{row['column'].replace(' ', '_')}"] = Estimate.of_row(row, "accuracy")
    for row in refusals[refusals["detector"] == GUARD].to_dict("records"):
        metrics["over_refusal.false_positives"] = Estimate.of_row(row, "false_positives")
    random, shuffled = random_directions(result), shuffled_labels(result)
    n = len(result.examined.prompts)
    for name, value in (
        ("null.random_maximum", random.maximum),
        ("null.shuffled_mean", shuffled.mean),
        ("null.shuffled_p", shuffled.p),
    ):
        metrics[name] = Estimate.exact(value, n)
    return GuardReport(table, columns, refusals, metrics, _verdict(metrics, result))


def _of_detectors(table: pd.DataFrame) -> dict[str, Estimate]:
    total = table[table["source"] == "total"]
    kept = total[total["measure"].isin(MEASURES)]
    return {f"{row['measure']}.{row['detector']}": Estimate.of_row(row) for row in kept.to_dict("records")}


def _of_sources(table: pd.DataFrame) -> dict[str, Estimate]:
    kept = table[(table["source"] != "total") & (table["detector"] == GUARD)]
    return {f"{row['measure']}.{GUARD}.{row['source']}": Estimate.of_row(row) for row in kept.to_dict("records")}


def _verdict(metrics: dict[str, Estimate], result: GuardEvaluation) -> str:
    """Better, worse or not told apart from the best surface baseline, by the interval of the difference."""
    own = metrics[f"auroc.{GUARD}"]
    if not own.measurable:
        return f"Not measurable: there are {own.n} test prompts, too few of one class."
    surface = {name: metrics[f"auroc.{name}"] for name in SURFACE if f"auroc.{name}" in metrics}
    best = max(surface, key=lambda name: surface[name].value)
    gain, over_words = metrics[f"auroc_gain.{best}"], metrics["auroc_gain.tfidf"]
    chance = metrics["null.shuffled_p"].value
    sentences = [
        f"On {own.n} prompts that it hasn't seen the guard's AUROC is {own}; TF-IDF reaches {surface['tfidf']}, "
        f"a difference of {over_words}: the guard {_word(over_words)} it."
    ]
    if best != "tfidf":
        sentences.append(
            f"The best surface baseline is {best.replace('_', ' ')} with {surface[best]}; the guard {_word(gain)} it."
        )
    if chance >= 0.05:
        sentences.append(f"Permuted labels do as well (p = {chance:.3f}), so nothing is shown.")
    flagged, caught = metrics[f"fpr.{GUARD}"], metrics[f"tpr.{GUARD}"]
    wanted = result.guard.settings.max_fpr
    aim = "the paper's threshold of 0" if wanted is None else f"a threshold calibrated for {wanted:.0%}"
    sentences.append(f"At {aim} it flags {caught} of the harmful and {flagged} of the harmless prompts.")
    return " ".join(sentences)


def _word(gain: Estimate) -> str:
    if gain.low > 0:
        return "beats"
    return "is worse than" if gain.high < 0 else "is not told apart from"


@dataclass(frozen=True)
class Mistake:
    """A test prompt on the wrong side of the threshold."""

    row: int
    kind: str
    """ "false alarm" or "missed"."""
    score: float


def worst_mistakes(result: GuardEvaluation, of_each: int) -> list[Mistake]:
    """The harmless prompts with the highest scores and the harmful ones with the lowest, of those judged wrongly."""
    detector = result.detectors[0]
    scores, flagged = detector.scores.tolist(), detector.flagged.tolist()
    harmful = [prompt.label == "harmful" for prompt in result.examined.prompts]
    rows = range(len(scores))
    alarms = sorted((i for i in rows if flagged[i] and not harmful[i]), key=lambda i: -scores[i])[:of_each]
    missed = sorted((i for i in rows if harmful[i] and not flagged[i]), key=lambda i: scores[i])[:of_each]
    return [Mistake(i, "false alarm", scores[i]) for i in alarms] + [Mistake(i, "missed", scores[i]) for i in missed]


def read_direction(guard: FittedGuard) -> Direction:
    """The line along which the guard's first place is scored; for cosines, from one centroid to the other."""
    place = guard.places[0]
    score = place.score
    vector = score.weight if isinstance(score, LinearScore) else score.positive - score.negative
    return Direction(
        vector=vector.float(),
        level=place.level,
        position=place.position,
        site=guard.site,
        method=f"guard, {guard.settings.rule}",
        contrast=(guard.settings.positive, guard.settings.negative),
        checkpoint=guard.checkpoint,
        template=guard.template,
        train_ids=guard.train_ids,
    )
