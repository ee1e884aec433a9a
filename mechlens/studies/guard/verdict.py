"""The numbers of a guard evaluation that a record keeps, its worst mistakes, and the sentence that they allow."""

from dataclasses import dataclass

import numpy as np
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
    positives,
    random_directions,
    shuffled_labels,
)

GUARD = "latent_guard"
CURVE_POINTS = 200


@dataclass(frozen=True)
class GuardReport:
    """Tables and metrics of an evaluation, with the verdict."""

    result: GuardEvaluation
    measures: pd.DataFrame
    columns: pd.DataFrame
    over_refusal: pd.DataFrame
    numbers: dict[str, Estimate]
    verdict: str

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json."""
        return self.numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        places = [
            {"level": place.level, "position": place.position, "validation_auroc": place.validation_auroc}
            for place in self.result.guard.places
        ]
        return {
            "scores": self.scores(),
            "measures": self.measures,
            "baselines": self.baselines(),
            "five_columns": self.five_columns(),
            "over_refusal": self.over_refusal,
            "left_out": self.result.examined.left_out,
            "answers": self.result.judged.table(),
            "places": pd.DataFrame(places),
            "roc": self.curves(),
        }

    def artifacts(self) -> dict[str, object]:
        """None: the guard was there before."""
        return {}

    def scores(self) -> pd.DataFrame:
        """What every detector says of every prompt."""
        prompts = self.result.examined.prompts
        known = {"id": [p.id for p in prompts], "source": [p.source for p in prompts]}
        labels, quadrants = [p.label for p in prompts], self.result.judged.quadrants()
        scores = pd.DataFrame({**known, "label": labels, "quadrant": quadrants})
        for detector in self.result.detectors:
            if detector.scores is not None:
                scores[f"score.{detector.name}"] = detector.scores.tolist()
            scores[f"flagged.{detector.name}"] = detector.flagged.tolist()
        return scores.assign(probability=self.result.detectors[0].probabilities.tolist())  # type: ignore[union-attr]

    def five_columns(self) -> pd.DataFrame:
        """Accuracy on kinds of attacks and of misjudged prompts, for reading."""
        return _wide(self.columns, "column", "accuracy")

    def baselines(self) -> pd.DataFrame:
        """One row for each detector, in total: every measure with its interval in words, for reading."""
        total = self.measures[self.measures["source"] == "total"]
        notes = {detector.name: detector.note for detector in self.result.detectors}
        wide = _wide(total, "measure", "value")
        return wide.assign(note=[notes[name] for name in wide["detector"]])

    def curves(self) -> pd.DataFrame:
        """ROC curves on all test prompts: the true-positive rate at evenly spaced false-positive rates."""
        positive = positives(self.result).numpy()
        rates = np.linspace(0, 1, CURVE_POINTS + 1)
        frames = []
        for detector in self.result.detectors:
            if detector.scores is None:
                continue
            scores = detector.scores.double().numpy()
            order = np.argsort(-scores, kind="stable")
            ends = np.append(np.diff(scores[order]) != 0, True)  # tied scores are flagged together
            caught = np.append(0, np.cumsum(positive[order])[ends]) / max(positive.sum(), 1)
            alarms = np.append(0, np.cumsum(~positive[order])[ends]) / max((~positive).sum(), 1)
            frames.append(
                pd.DataFrame({"detector": detector.name, "fpr": rates, "tpr": np.interp(rates, alarms, caught)})
            )
        return pd.concat(frames, ignore_index=True)


def _wide(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """Detectors down, `column` across; a cell is `0.93 [0.88, 0.97]`, or a dash with the count where it is missing."""
    words = [
        f"{row[value]:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if not np.isnan(row[value]) else f"- (n={row['n']})"
        for row in frame.to_dict("records")
    ]
    grid = frame.assign(words=words).pivot(index="detector", columns=column, values="words")
    order = list(dict.fromkeys(frame[column]))
    return grid.loc[list(dict.fromkeys(frame["detector"])), order].fillna("").reset_index()


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
    return GuardReport(result, table, columns, refusals, metrics, _verdict(metrics, result))


def _of_detectors(table: pd.DataFrame) -> dict[str, Estimate]:
    total = table[table["source"] == "total"]
    kept = total[total["measure"].isin(MEASURES)]
    return {f"{row['measure']}.{row['detector']}": Estimate.of_row(row) for row in kept.to_dict("records")}


def _of_sources(table: pd.DataFrame) -> dict[str, Estimate]:
    kept = table[(table["source"] != "total") & (table["detector"] == GUARD)]
    return {f"{row['measure']}.{GUARD}.{row['source']}": Estimate.of_row(row) for row in kept.to_dict("records")}


def _verdict(metrics: dict[str, Estimate], result: GuardEvaluation) -> str:
    """Better, worse or not told apart from the best surface baseline, by the interval of the difference."""
    area = metrics[f"auroc.{GUARD}"]
    if not area.measurable:
        return f"Not measurable: there are {area.n} test prompts, too few of one class."
    surface = {name: metrics[f"auroc.{name}"] for name in SURFACE if f"auroc.{name}" in metrics}
    best = max(surface, key=lambda name: surface[name].value)
    gain, over_words = metrics[f"auroc_gain.{best}"], metrics["auroc_gain.tfidf"]
    chance = metrics["null.shuffled_p"].value
    sentences = [
        f"On {area.n} prompts that it hasn't seen the guard's AUROC is {area}; TF-IDF reaches {surface['tfidf']}, "
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
    scores, flagged = result.scores.tolist(), result.detectors[0].flagged.tolist()
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
