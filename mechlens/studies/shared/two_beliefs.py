"""Belief of harmfulness at `inst`, belief of refusal at the last token: where each quadrant falls.

Zhao et al. 2025, Fig. 2 and 3: centroids come from refused harmful and accepted harmless prompts, the
well-behaved quadrants; the two misbehaving quadrants are then placed between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.probing.beliefs import Centroids, beliefs, centroids, layer_scores
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import (
    Fold,
    family_weights,
    interval,
    mean_estimate,
    of_sample,
    sample_and_resamples,
)
from mechlens.studies.shared.quadrants import QUADRANTS

POLES = ("refused_harmful", "accepted_harmless")
MIN_FOR_A_POLE = 5


@dataclass(frozen=True)
class Beliefs:
    """Beliefs of every prompt that was held out, and their means by quadrant."""

    harm: Centroids | None
    refusal: Centroids | None
    """None where a pole has too few training prompts."""
    prompts: pd.DataFrame
    """One row per held-out prompt: id, quadrant, belief_harm, belief_refusal and their centred versions."""
    by_level: pd.DataFrame
    """Mean layer score by quadrant, position and level, with interval; faithful and centred."""
    means: dict[str, Estimate]
    """belief_harm.QUADRANT and belief_refusal.QUADRANT, faithful; with ".centered" the centred ones."""
    correlation: dict[str, Estimate]
    """Pearson and Spearman correlation of the two beliefs over held-out prompts."""

    def metrics(self) -> dict[str, Estimate]:
        """Mean beliefs by quadrant and their correlations."""
        return self.means | self.correlation


class Placed(NamedTuple):
    """Held-out prompts with the centroids that place them."""

    prompts: Activations
    harm: Centroids
    refusal: Centroids


def measure_beliefs(
    acts: Activations, quadrants: Sequence[str], folds: Sequence[Fold], seed: int, resamples: int
) -> Beliefs:
    """Beliefs of every prompt that a fold holds out, by centroids of the poles among those that it fits on.

    The centroids that are kept are of the one fold, or of all prompts where there are several.
    """
    labelled = replace(acts, labels=tuple(quadrants))
    held_out = labelled.select([row for fold in folds for row in fold.scored])
    parts = [(labelled.select(fold.fitted), labelled.select(fold.scored)) for fold in folds]
    if min(train.labels.count(name) for train, _ in parts for name in POLES) < MIN_FOR_A_POLE:
        return _not_measurable(held_out)
    places = ("inst", acts.positions[-1])
    placed = [
        Placed(part, centroids(train, *POLES, places[0]), centroids(train, *POLES, places[1])) for train, part in parts
    ]
    prompts = pd.concat([_prompt_table(*own) for own in placed], ignore_index=True)
    fitted = parts[0][0] if len(folds) == 1 else labelled
    return Beliefs(
        harm=centroids(fitted, *POLES, places[0]),
        refusal=centroids(fitted, *POLES, places[1]),
        prompts=prompts,
        by_level=_level_table(placed, held_out, seed, resamples),
        means=_means(prompts, held_out, seed, resamples),
        correlation=_correlations(prompts, held_out.families, seed, resamples),
    )


COLUMNS = ("belief_harm", "belief_refusal", "belief_harm.centered", "belief_refusal.centered")


def _not_measurable(held_out: Activations) -> Beliefs:
    counts = {name: held_out.labels.count(name) for name in QUADRANTS}
    means = {_metric(column, name): Estimate.missing(counts[name]) for column in COLUMNS for name in QUADRANTS}
    both = Estimate.missing(len(held_out.ids))
    correlation = {"belief_correlation.pearson": both, "belief_correlation.spearman": both}
    return Beliefs(None, None, pd.DataFrame(), pd.DataFrame(), means, correlation)


def _metric(column: str, quadrant: str) -> str:
    name, _, variant = column.partition(".")
    return f"{name}.{quadrant}" + (f".{variant}" if variant else "")


def _prompt_table(held_out: Activations, harm: Centroids, refusal: Centroids) -> pd.DataFrame:
    measured = both_beliefs(held_out, {"belief_harm": harm, "belief_refusal": refusal})
    columns = {name: values.tolist() for name, values in measured.items()}
    return pd.DataFrame({"id": held_out.ids, "quadrant": held_out.labels, **columns})


def both_beliefs(acts: Activations, means: Mapping[str, Centroids]) -> dict[str, Float[Tensor, " prompt"]]:
    """Each belief of every prompt as published, and with ".centered" the centred one without the embedding."""
    measured = {}
    for name, reference in means.items():
        measured[name] = beliefs(acts, reference, centered=False, skip_embedding=False)
        measured[f"{name}.centered"] = beliefs(acts, reference, centered=True, skip_embedding=True)
    return measured


def _means(prompts: pd.DataFrame, held_out: Activations, seed: int, resamples: int) -> dict[str, Estimate]:
    means = {}
    for column in COLUMNS:
        values = torch.tensor(prompts[column].to_numpy())
        for name in QUADRANTS:
            rows = [i for i, label in enumerate(held_out.labels) if label == name]
            families = [held_out.families[i] for i in rows]
            mean = mean_estimate(values[rows], families, seed, resamples, least=MIN_FOR_A_POLE)
            means[_metric(column, name)] = mean
    return means


def _level_table(placed: Sequence[Placed], held_out: Activations, seed: int, resamples: int) -> pd.DataFrame:
    """Mean layer scores over all held-out prompts, which stand in the order of the folds."""
    frames = []
    for concept, references in (("harmfulness", [p.harm for p in placed]), ("refusal", [p.refusal for p in placed])):
        for centered in (False, True):
            parts = zip(placed, references, strict=True)
            scores = torch.cat([_layer_scores(own.prompts, by, centered=centered) for own, by in parts])
            for name in QUADRANTS:
                rows = [i for i, label in enumerate(held_out.labels) if label == name]
                families = [held_out.families[i] for i in rows]
                if rows:
                    frame = _band(scores[rows], families, seed, resamples)
                    frame["level"], frame["quadrant"] = held_out.levels, name
                    where = references[0].position
                    frames.append(frame.assign(concept=concept, position=where, centered=centered))
    return pd.concat(frames, ignore_index=True)


def _layer_scores(part: Activations, reference: Centroids, *, centered: bool) -> Float[Tensor, "prompt level"]:
    values = part.values[:, :, column_of(reference.position, part.positions, part.last)]
    return layer_scores(values, reference, centered=centered)


def _band(scores: Float[Tensor, "prompt level"], families: Sequence[str], seed: int, resamples: int) -> pd.DataFrame:
    """Mean score at every level with its family-bootstrap interval."""
    weights = family_weights(families, resamples, seed)
    samples = (weights @ scores.double() / weights.sum(dim=1, keepdim=True)).T
    bounds = interval(samples)
    return pd.DataFrame({"score": scores.mean(dim=0).numpy(), "low": bounds.low.numpy(), "high": bounds.high.numpy()})


def _correlations(prompts: pd.DataFrame, families: Sequence[str], seed: int, resamples: int) -> dict[str, Estimate]:
    harm, refusal = (torch.tensor(prompts[column].to_numpy()) for column in COLUMNS[:2])
    weights = sample_and_resamples(families, resamples, seed)
    harm_ranks, refusal_ranks = (torch.tensor(stats.rankdata(values)) for values in (harm, refusal))
    return {
        "belief_correlation.pearson": _correlation(harm, refusal, weights),
        "belief_correlation.spearman": _correlation(harm_ranks, refusal_ranks, weights),
    }


def _correlation(
    first: Float[Tensor, " prompt"], second: Float[Tensor, " prompt"], drawn: Float[Tensor, "draw prompt"]
) -> Estimate:
    """Weighted Pearson correlation in the sample and its resamples."""
    total = drawn.sum(dim=1)
    x = first.double() - (drawn @ first.double() / total).unsqueeze(1)
    y = second.double() - (drawn @ second.double() / total).unsqueeze(1)
    samples = (drawn * x * y).sum(dim=1) / ((drawn * x * x).sum(dim=1) * (drawn * y * y).sum(dim=1)).sqrt()
    if bool(samples[0].isnan()):
        return Estimate.missing(len(first))
    return of_sample(samples, len(first))
