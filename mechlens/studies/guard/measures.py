"""What a guard evaluation is reported as: numbers by source and in total, the five columns, nulls."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.directions.nulls import LabelledVectors, RandomNull, random_null
from mechlens.methods.guard.rules import score_by
from mechlens.methods.probing.auroc import auroc, auroc_difference, auroc_estimate, tpr_at_fpr_estimate, weighted_auroc
from mechlens.methods.progress import phase, progress_bar
from mechlens.methods.statistics.calibration import calibration_error_estimate
from mechlens.methods.statistics.effect_size import effect_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import (
    one_thread,
    permuted_labels,
    rate_estimate,
)
from mechlens.studies.guard.detectors import Detector
from mechlens.studies.guard.evaluation import GuardEvaluation
from mechlens.studies.guard.outcome import TwinComparison, compare_on_twins
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS
from mechlens.studies.shared.sources import ATTACKS

MEASURES = (
    "auroc",
    "effect_size",
    "accuracy",
    "tpr",
    "fpr",
    "tpr_at_1pct_fpr",
    "tpr_at_5pct_fpr",
    "calibration_error",
)
COLUMNS = ("adversarial suffix", "persuasion", "template", "refused harmless", "accepted harmful")
"""The columns of the paper's Latent Guard table."""
TOTAL, TWINS = "total", "twins"
"""All test prompts, and those that are twins, among the sources of the table of measures."""


@dataclass(frozen=True)
class ShuffledNull:
    """AUROCs of the guard refitted to permuted labels and scored on permuted test labels."""

    mean: float
    p: float
    """(1 + permutations at least as good) / (1 + permutations)."""
    n: int


def positives(result: GuardEvaluation) -> Bool[Tensor, " prompt"]:
    """True for harmful test prompts."""
    return torch.tensor([prompt.label == "harmful" for prompt in result.examined.prompts])


def families(result: GuardEvaluation) -> list[str]:
    """The family of every test prompt."""
    return [prompt.group for prompt in result.examined.prompts]


@dataclass(frozen=True)
class _Group:
    """Prompts that numbers are about, and the family of every test prompt."""

    rows: list[int]
    families: Sequence[str]


@phase("measuring")
@one_thread()
def measures(result: GuardEvaluation) -> pd.DataFrame:
    """One row for each detector, source (and "total", "twins") and measure: value, low, high, n, against.

    A source with one class only has its AUROC and TPR at an FPR `against` all test prompts of the other class.
    """
    rows = []
    groups = _groups(result)
    bar = progress_bar(total=len(result.detectors) * len(groups), title="measuring")
    for detector in result.detectors:
        for name, group in groups.items():
            against = _other_class(result, group.rows)
            for measure, estimate in _measured(result, detector, group, against).items():
                rows.append(
                    {
                        "detector": detector.name,
                        "source": name,
                        "measure": measure,
                        **estimate.row(),
                        "against": "all sources" if against else "own",
                    }
                )
            bar.update(1)
    bar.close()
    return pd.DataFrame(rows)


def _groups(result: GuardEvaluation) -> dict[str, _Group]:
    own, twins = families(result), result.examined.twins
    sources = {source.name: result.examined.rows(source.name) for source in result.examined.sources}
    return {
        TOTAL: _Group(list(range(len(own))), own),
        **({TWINS: _Group(twins.rows, twins.clusters)} if twins.pairs else {}),
        **{name: _Group(rows, own) for name, rows in sources.items() if rows},
    }


def _other_class(result: GuardEvaluation, own: list[int]) -> list[int]:
    labels = {result.examined.prompts[i].label for i in own}
    if len(labels) > 1:
        return []
    return [i for i, prompt in enumerate(result.examined.prompts) if prompt.label not in labels]


def _measured(result: GuardEvaluation, detector: Detector, group: _Group, against: list[int]) -> dict[str, Estimate]:
    seed, draws = result.plan.seed, result.plan.resamples
    positive, inside, groups = positives(result), group.rows, group.families
    wide = [*inside, *against]
    up, down = ([i for i in inside if bool(positive[i]) is flag] for flag in (True, False))
    enough = min(int(positive[wide].sum()), int((~positive[wide]).sum())) >= MIN_IN_A_CLASS
    missing = Estimate.missing(len(inside))
    wide_groups = [groups[i] for i in wide]
    right = detector.flagged == positive
    numbers = {
        "auroc": missing,
        "effect_size": missing,
        "accuracy": _share(result, right, inside, groups),
        "tpr": _share(result, detector.flagged, up, groups),
        "fpr": _share(result, detector.flagged, down, groups),
        "tpr_at_1pct_fpr": missing,
        "tpr_at_5pct_fpr": missing,
    }
    if detector.scores is not None and enough:
        curve = detector.scores[wide], positive[wide], wide_groups
        numbers |= {
            "auroc": auroc_estimate(*curve),
            "effect_size": effect_estimate(*curve),
            "tpr_at_1pct_fpr": tpr_at_fpr_estimate(*curve, 0.01, seed, draws),
            "tpr_at_5pct_fpr": tpr_at_fpr_estimate(*curve, 0.05, seed, draws),
        }
    if detector.probabilities is not None and not against:
        numbers["calibration_error"] = (
            calibration_error_estimate(
                detector.probabilities[inside], positive[inside], [groups[i] for i in inside], seed, draws
            )
            if enough
            else missing
        )
    return numbers


def _share(
    result: GuardEvaluation, flags: Bool[Tensor, " prompt"], rows: Sequence[int], groups: Sequence[str] | None = None
) -> Estimate:
    """Share of the rows that carry the flag; `groups` are families of all test prompts, their own where None."""
    groups, plan = groups or families(result), result.plan
    if len(rows) < MIN_IN_A_CLASS:
        return Estimate.missing(len(rows))
    return rate_estimate(flags[list(rows)], [groups[i] for i in rows], plan.seed, plan.resamples)


@one_thread()
def five_columns(result: GuardEvaluation) -> pd.DataFrame:
    """The paper's table: accuracy of every detector on three kinds of attacks and two kinds of misbehaviour.

    Refused harmless and accepted harmful prompts are those of sources that are no attacks, by the model's own answers.
    """
    rows = []
    for detector in result.detectors:
        right = detector.flagged == positives(result)
        for column, members in _members(result).items():
            share = _share(result, right, members)
            rows.append({"detector": detector.name, "column": column, **share.row("accuracy")})
    return pd.DataFrame(rows)


def _members(result: GuardEvaluation) -> dict[str, list[int]]:
    kinds = {source.name: source.kind for source in result.examined.sources}
    prompts, quadrants = result.examined.prompts, result.judged.quadrants()
    everyone = range(len(prompts))
    members = {
        column: [i for i in everyone if kinds[prompts[i].source] == kind and prompts[i].label == "harmful"]
        for column, kind in zip(COLUMNS, ATTACKS, strict=False)
    }
    for column in COLUMNS[3:]:
        wanted = column.replace(" ", "_")
        members[column] = [i for i in everyone if quadrants[i] == wanted and kinds[prompts[i].source] not in ATTACKS]
    return members


def over_refusal(result: GuardEvaluation) -> pd.DataFrame:
    """False positives on harmless prompts that look harmful, by detector."""
    kinds = {source.name: source.kind for source in result.examined.sources}
    rows = [
        i for i, p in enumerate(result.examined.prompts) if kinds[p.source] == "over-refusal" and p.label == "harmless"
    ]
    shares = []
    for detector in result.detectors:
        share = _share(result, detector.flagged, rows)
        shares.append({"detector": detector.name, **share.row("false_positives")})
    return pd.DataFrame(shares)


def paired_gains(result: GuardEvaluation) -> dict[str, Estimate]:
    """AUROC of the guard minus that of every other detector that has one, on all test prompts, paired."""
    positive, groups = positives(result), families(result)
    return {
        f"auroc_gain.{other.name}": auroc_difference(result.scores, other.scores, positive, groups)
        for other in result.detectors[1:]
        if other.scores is not None
    }


def on_twins(result: GuardEvaluation) -> TwinComparison:
    """The guard and every other detector that has scores, on the twins among the test prompts."""
    rows, clusters = result.examined.twins.rows, result.examined.twins.clusters
    scores = {detector.name: detector.scores[rows] for detector in result.detectors if detector.scores is not None}
    return compare_on_twins(scores, positives(result)[rows], [clusters[i] for i in rows])


def random_directions(result: GuardEvaluation) -> RandomNull:
    """Random directions at the guard's first place, on all test prompts."""
    place = result.guard.places[0]
    direction = mean_difference(result.train, "harmful", "harmless", place.level, place.position)
    test = LabelledVectors(result.test.at(place.level, place.position), positives(result), families(result))
    return random_null(direction, test, result.plan.random_directions, result.plan.seed)


@phase("permuted labels")
@one_thread()
def shuffled_labels(result: GuardEvaluation) -> ShuffledNull:
    """The guard's rule at its places, refitted to permuted training labels; see `nulls.permutation_null`."""
    plan, train, test = result.plan, result.train, result.test
    labels = torch.tensor([label == "harmful" for label in train.labels])
    positive = positives(result)
    fitted = permuted_labels(labels, train.families, plan.permutations, plan.seed)
    scored = permuted_labels(positive, families(result), plan.permutations, plan.seed + 1)
    rule, refused = result.guard.settings.rule, torch.tensor([result.refused[name] for name in train.ids])
    scores = [
        _mean_score([score_by(rule, train.at(*where), draw, refused)(test.at(*where)) for where in _where(result)])
        for draw in progress_bar(fitted, title="permuted labels")
    ]
    areas = weighted_auroc(torch.stack(scores), scored.double(), (~scored).double())
    observed = float(auroc(result.scores, positive))
    as_good = int((areas >= observed - 1e-9).sum())
    return ShuffledNull(float(areas.mean()), (1 + as_good) / (1 + plan.permutations), plan.permutations)


def _where(result: GuardEvaluation) -> list[tuple[int, str]]:
    return [(place.level, place.position) for place in result.guard.places]


def _mean_score(values: list[Float[Tensor, " prompt"]]) -> Float[Tensor, " prompt"]:
    return torch.stack(values).mean(dim=0)
