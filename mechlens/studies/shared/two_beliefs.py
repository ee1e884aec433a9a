"""Belief of harmfulness at `inst`, belief of refusal at the last token: where each quadrant falls.

Zhao et al. 2025, Fig. 2 and 3: centroids come from refused harmful and accepted harmless prompts, the
well-behaved quadrants; the two misbehaving quadrants are then placed between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.probing.beliefs import Centroids, beliefs, centroids, layer_scores
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import (
    family_weights,
    interval,
    mean_estimate,
    of_sample,
    sample_and_resamples,
)
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import QUADRANTS

POLES = ("refused_harmful", "accepted_harmless")
MIN_FOR_A_POLE = 5


@dataclass(frozen=True)
class Beliefs:
    """Beliefs of every prompt outside the training part, and their means by quadrant."""

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


def measure_beliefs(acts: Activations, quadrants: Sequence[str], split: Split, seed: int, resamples: int) -> Beliefs:
    """Centroids from the training part's poles; beliefs of all held-out prompts (validation chooses nothing)."""
    labelled = replace(acts, labels=tuple(quadrants))
    train = labelled.select(split.train)
    held_out = labelled.select(sorted((*split.validation, *split.test)))
    poles = [train.labels.count(name) for name in POLES]
    if min(poles) < MIN_FOR_A_POLE:
        return _not_measurable(held_out)
    last = acts.positions[-1]
    harm, refusal = (centroids(train, *POLES, position) for position in ("inst", last))
    prompts = _prompt_table(held_out, harm, refusal)
    return Beliefs(
        harm=harm,
        refusal=refusal,
        prompts=prompts,
        by_level=_level_table(held_out, harm, refusal, seed, resamples),
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


def _level_table(held_out: Activations, harm: Centroids, refusal: Centroids, seed: int, resamples: int) -> pd.DataFrame:
    frames = []
    for reference, concept in ((harm, "harmfulness"), (refusal, "refusal")):
        values = held_out.values[:, :, column_of(reference.position, held_out.positions, held_out.last)]
        for centered in (False, True):
            scores = layer_scores(values, reference, centered=centered)
            for name in QUADRANTS:
                rows = [i for i, label in enumerate(held_out.labels) if label == name]
                families = [held_out.families[i] for i in rows]
                if rows:
                    frame = _band(scores[rows], families, seed, resamples)
                    frame["level"], frame["quadrant"] = held_out.levels, name
                    frames.append(frame.assign(concept=concept, position=reference.position, centered=centered))
    return pd.concat(frames, ignore_index=True)


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
