"""The numbers of a guard evaluation that a record keeps, its worst mistakes, and the sentence that they allow."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechlens.methods.directions.direction import Direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.probing.auroc import MIN_FAMILIES
from mechlens.methods.statistics.by_prompt import ByPrompt, by_prompt_table
from mechlens.methods.statistics.estimate import NO_INTERVAL, Estimate
from mechlens.runs.results.paired import BY_PROMPT
from mechlens.studies.guard.evaluation import GuardEvaluation
from mechlens.studies.guard.measures import (
    MEASURES,
    TOTAL,
    TWINS,
    families,
    five_columns,
    measures,
    on_twins,
    over_refusal,
    paired_gains,
    positives,
    random_directions,
    shuffled_labels,
)
from mechlens.studies.guard.outcome import GUARD, SURFACE, WORDS, TwinComparison
from mechlens.studies.guard.twins import FAMILY, NEAREST
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS

CURVE_POINTS = 200
FLAGS_NOTHING = (
    "So it flags no prompt here, and as a detector it does nothing: fit it on more harmless prompts, which allow a "
    "lower threshold, or with a higher --max-fpr."
)


@dataclass(frozen=True)
class GuardReport:
    """Tables and metrics of an evaluation, with the verdict."""

    result: GuardEvaluation
    measures: pd.DataFrame
    columns: pd.DataFrame
    over_refusal: pd.DataFrame
    numbers: dict[str, Estimate]
    twins: TwinComparison
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
            "twins": self.result.examined.twins.table(self.result.examined.prompts),
            "answers": self.result.judged.table(),
            "places": pd.DataFrame(places),
            "roc": self.curves(),
            BY_PROMPT: self._by_prompt(),
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

    def _by_prompt(self) -> pd.DataFrame:
        """What the AUROC of every detector, and the rates of the guard, were made of."""
        positive, groups = positives(self.result), families(self.result)
        ids = [prompt.id for prompt in self.result.examined.prompts]
        rows = {
            f"auroc.{one.name}": ByPrompt(ids, groups, one.scores, positive)
            for one in self.result.detectors if one.scores is not None
        }  # fmt: skip
        flagged = self.result.detectors[0].flagged
        right = ByPrompt(ids, groups, (flagged == positive).double())
        said = ByPrompt(ids, groups, flagged.double())
        rows |= {f"accuracy.{GUARD}": right, f"tpr.{GUARD}": said.only(positive), f"fpr.{GUARD}": said.only(~positive)}
        return by_prompt_table(rows)

    def five_columns(self) -> pd.DataFrame:
        """Accuracy on kinds of attacks and of misjudged prompts, for reading."""
        return _wide(self.columns, "column", "accuracy")

    def baselines(self) -> pd.DataFrame:
        """One row for each detector: its AUROC on twins, then every measure in total, with intervals, for reading."""
        auroc = self.measures["measure"] == "auroc"
        twins = self.measures[(self.measures["source"] == TWINS) & auroc].assign(measure="auroc on twins")
        total = self.measures[self.measures["source"] == TOTAL]
        notes = {detector.name: detector.note for detector in self.result.detectors}
        wide = _wide(pd.concat([twins, total]), "measure", "value")
        return wide.assign(note=[notes[name] for name in wide["detector"]])

    def curves(self) -> pd.DataFrame:
        """ROC curves on all test prompts: the most that a threshold catches within each of evenly spaced
        false-positive rates, so steps."""
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
            best = caught[np.searchsorted(alarms, rates, side="right") - 1]  # of the thresholds within that rate
            frames.append(pd.DataFrame({"detector": detector.name, "fpr": rates, "tpr": best}))
        return pd.concat(frames, ignore_index=True)


def _cell(row: Mapping[Hashable, Any], value: str, called: str) -> str:
    estimate = Estimate.of_row(row, value, called=called)
    if not estimate.measurable:
        return f"- (n={estimate.n})"
    interval = f"[{estimate.low:.2f}, {estimate.high:.2f}]" if estimate.has_interval else f"({NO_INTERVAL})"
    return f"{estimate.value:.2f} {interval}"


def _wide(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """Detectors down, `column` across; a cell is `0.93 [0.88, 0.97]`, or a dash with the count where it is missing."""
    words = [_cell(row, value, str(row[column])) for row in frame.to_dict("records")]
    grid = frame.assign(words=words).pivot(index="detector", columns=column, values="words")
    order = list(dict.fromkeys(frame[column]))
    return grid.loc[list(dict.fromkeys(frame["detector"])), order].fillna("").reset_index()


def guard_report(result: GuardEvaluation) -> GuardReport:
    """Everything that is said of an evaluation, computed once.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> from dataclasses import replace
    >>> test = tuple(replace(prompt, source="held_out") for prompt in fitting.test)
    >>> held_out = ml.SourcePrompts(ml.Source("held_out", "", label_column="label"), test, {})
    >>> examined = ml.examine([held_out], fitting.guard, [model.mechlens.checkpoint])
    >>> plan = ml.EvaluationPlan(resamples=100, permutations=10)
    >>> result = ml.evaluate_guard(model, fitting.guard, fitting.others, fitting.train, examined, plan)
    >>> report = ml.guard_report(result)
    >>> report.numbers["auroc.latent_guard"].n == len(test)
    True
    """
    table, columns, refusals = measures(result), five_columns(result), over_refusal(result)
    twins = on_twins(result)
    metrics = _of_detectors(table) | _of_sources(table) | paired_gains(result)
    metrics |= {f"auroc.{name}.{TWINS}": area for name, area in twins.areas.items()}
    metrics |= {f"auroc_gain.{name}.{TWINS}": gain for name, gain in twins.gains.items()}
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
    metrics["twins.pairs"] = Estimate.exact(twins.n_pairs, n)
    return GuardReport(result, table, columns, refusals, metrics, twins, guard_verdict(metrics, twins, result))


def _of_detectors(table: pd.DataFrame) -> dict[str, Estimate]:
    total = table[table["source"] == TOTAL]
    kept = total[total["measure"].isin(MEASURES)]
    return {f"{row['measure']}.{row['detector']}": _measured(row) for row in kept.to_dict("records")}


def _of_sources(table: pd.DataFrame) -> dict[str, Estimate]:
    kept = table[(table["source"] != TOTAL) & (table["detector"] == GUARD)]
    return {f"{row['measure']}.{GUARD}.{row['source']}": _measured(row) for row in kept.to_dict("records")}


def _measured(row: Mapping[Hashable, Any]) -> Estimate:
    return Estimate.of_row(row, called=row["measure"])


def guard_verdict(metrics: Mapping[str, Estimate], twins: TwinComparison, result: GuardEvaluation) -> str:
    """What is known of the guard: on twins, across sources, beside guard models, at its threshold."""
    sentences = [_on_twins(twins, result), _across_sources(metrics, result)]
    sentences += [_beside(name, metrics, twins) for name in result.guard_models]
    chance = metrics["null.shuffled_p"].value
    if chance >= 0.05:
        sentences.append(f"Permuted labels do as well (p = {chance:.3f}), so nothing is shown.")
    sentences.append(f"At {_threshold(result.guard)} it flags {_flagged(metrics, GUARD)}.")
    if not result.detectors[0].flagged.any():
        sentences.append(FLAGS_NOTHING)
    return " ".join(sentences)


def _threshold(guard: FittedGuard) -> str:
    """What the guard's threshold promises, which is less than was wanted where too few harmless prompts set it."""
    wanted, n = guard.settings.max_fpr, guard.calibration.n_negative
    if wanted is None:
        return "the paper's threshold of 0"
    promised = 1 / (n + 1)
    if promised > wanted + 1e-9:
        return f"a threshold that {n} harmless prompts set, which promises {promised:.1%} (wanted: {wanted:.0%}),"
    return f"a threshold calibrated for {wanted:.0%}"


def _flagged(metrics: Mapping[str, Estimate], name: str) -> str:
    """Shares of both classes that are flagged, or how many prompts were too few for one."""
    shares = {"harmful": metrics[f"tpr.{name}"], "harmless": metrics[f"fpr.{name}"]}
    return " and ".join(
        f"{share} of the {label} prompts" if share.measurable else f"of the {label} prompts ({share.n}) too few to tell"
        for label, share in shares.items()
    )


def _on_twins(twins: TwinComparison, result: GuardEvaluation) -> str:
    """The headline, with the number that decided it, or what would settle it."""
    if twins.outcome == "not measurable":
        return (
            f"Not measurable: there are {twins.n_pairs} pairs of a harmful prompt and a harmless one of its form, "
            f"{twins.n_families} of them independent, and {MIN_FAMILIES} are needed, so add "
            f"{MIN_FAMILIES - twins.n_families} or more."
        )
    found = result.examined.twins
    made = f"{found.count(FAMILY)} written as pairs, {found.count(NEAREST)} matched by form"
    reached = ", ".join(f"{said} {twins.areas[name].brief}" for name, said in WORDS.items())
    told = (
        f"On {twins.n_pairs} harmful prompts beside harmless ones of the same form ({made}) its AUROC is "
        f"{twins.areas[GUARD].brief}; of the words: {reached}. Over the best baseline, {twins.best_in_words}, it "
        f"gains {twins.gains[twins.best_words].brief}"
    )
    settle = f"; about {twins.more_pairs} more pairs would settle it" if twins.outcome == "inconclusive" else ""
    return f"{twins.outcome.capitalize()}. {told}{settle}."


def _across_sources(metrics: Mapping[str, Estimate], result: GuardEvaluation) -> str:
    """The AUROC on all prompts, whose classes may differ in much beside harm."""
    area = metrics[f"auroc.{GUARD}"]
    if not area.measurable:
        up = int(positives(result).sum())
        counts = f"{up} harmful and {len(positives(result)) - up} harmless"
        return (
            f"Across sources it isn't measurable: there are {counts} prompts and {MIN_IN_A_CLASS} of each are needed."
        )
    best = max(SURFACE, key=lambda name: metrics[f"auroc.{name}"].value)
    gain = metrics[f"auroc_gain.{best}"]
    return (
        f"On all {area.n} prompts, where the sources differ too, it is {area.brief}, and that of "
        f"{best.replace('_', ' ')} {metrics[f'auroc.{best}'].brief}: there the guard {_word(gain)} it."
    )


def _beside(name: str, metrics: Mapping[str, Estimate], twins: TwinComparison) -> str:
    """The guard and a guard model: on twins where that can be measured, on all prompts otherwise."""
    if name not in twins.areas:
        return f"{name} has rates only: it flags {_flagged(metrics, name)}."
    measured = twins.areas[name].measurable
    area = twins.areas[name] if measured else metrics[f"auroc.{name}"]
    gain = twins.gains[name] if measured else metrics[f"auroc_gain.{name}"]
    if not gain.measurable:
        return f"{name} can't be compared by AUROC."
    where = "those twins" if measured else "all prompts"
    return f"On {where} {name} reaches {area.brief}: the guard {_word(gain)} it (difference {gain.brief})."


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
    """The line along which the guard's first place is scored; see each score's `line`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> ml.read_direction(fitting.guard).level == fitting.guard.places[0].level
    True
    """
    place = guard.places[0]
    return Direction(
        vector=place.score.line.float(),
        level=place.level,
        position=place.position,
        site=guard.site,
        method=f"guard, {guard.settings.rule}",
        contrast=(guard.settings.positive, guard.settings.negative),
        checkpoint=guard.checkpoint,
        template=guard.template,
        train_ids=guard.train_ids,
    )
