"""What is read at a concept's home, each prompt out of fold, beside what needs no training: the floor.

The floor is the words, the mean of their embeddings, the token that stands at home, and the base's network with random
blocks. What a checkpoint reads no better than all of these, its training need not have put there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.beyond_words import levels_of, read_vectors, read_words
from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import of_sample, one_thread, sample_and_resamples
from mechlens.studies.track.measures.reference import TrackedConcept

FLOORS = {
    "tfidf": "words (TF-IDF)",
    "mean_embedding": "mean token embedding",
    "token": "token at that position",
    "random_blocks": "network with random blocks",
}
"""What stands under every read-out, in words."""
READ_OUTS = {"frozen": "base's direction", "own": "direction fitted here", "probe": "probe fitted here"}


@dataclass(frozen=True)
class HomeQuestion:
    """A concept's prompts in their folds; the same at every checkpoint and for the floor."""

    concept: TrackedConcept
    rows: list[int]
    """The prompts with one of the concept's two labels."""
    folds: Folds

    def values(self, acts: Activations) -> Float[Tensor, "prompt level d"]:
        """What these activations hold of the concept's prompts at home."""
        return acts.values[self.rows, :, acts.positions.index(self.concept.home)]


def home_question(concept: TrackedConcept, families: Sequence[str], seed: int) -> HomeQuestion:
    """Folds of the prompts that carry one of the concept's labels."""
    rows = [i for i, label in enumerate(concept.labels) if label in concept.contrast]
    positive = torch.tensor([concept.labels[i] == concept.contrast[0] for i in rows])
    return HomeQuestion(concept, rows, folds_of(positive, [families[i] for i in rows], seed))


@one_thread()
def surface_floor(
    asked: HomeQuestion,
    texts: Sequence[str],
    mean_embeddings: Float[Tensor, "all d"],
    tokens: Float[Tensor, "all d"],
) -> dict[str, Float[Tensor, "repeat prompt"]]:
    """Scores from words and embeddings alone; `tokens` are the embeddings of the tokens at home."""
    return {
        "tfidf": read_words([texts[i] for i in asked.rows], asked.folds),
        "mean_embedding": read_vectors(mean_embeddings[asked.rows, None], asked.folds),
        "token": read_vectors(tokens[asked.rows, None], asked.folds),
    }


@one_thread()
def network_floor(asked: HomeQuestion, network: Activations) -> Float[Tensor, "repeat prompt"]:
    """Scores from an untrained network, its level chosen as the base's is."""
    values = asked.values(network)
    return read_vectors(values, asked.folds, levels_of(values, asked.folds))


@dataclass(frozen=True)
class HomeReading:
    """One checkpoint's read-outs of a concept."""

    scores: Mapping[str, Float[Tensor, "repeat prompt"]]
    """By read-out (see `READ_OUTS`)."""
    right: Mapping[str, Bool[Tensor, "repeat prompt"]]
    """Whether the base's direction is on the right side of its `frozen` threshold, and of a `new` one."""


@one_thread()
def home_readings(asked: HomeQuestion, acts: Sequence[Activations]) -> list[HomeReading]:
    """Of every checkpoint, the base first, which chooses each fold's level."""
    base = asked.values(acts[0])
    levels = levels_of(base, asked.folds)
    return [_reading(asked.folds, base, asked.values(found), levels) for found in acts]


def _reading(folds: Folds, base: Tensor, here: Tensor, levels: tuple[tuple[int, ...], ...]) -> HomeReading:
    def along(values: Tensor, fitted: Tensor, threshold: Tensor) -> Tensor:
        """Projection of `values` on the mean difference of `fitted`, from the threshold that `threshold` gives."""

        def read(fit: list[int], level: int) -> Tensor:
            own, wide = folds.positive[fit], fitted[fit, level].double()
            line = wide[own].mean(dim=0) - wide[~own].mean(dim=0)
            return values[:, level].double() @ line - folds.middle(threshold[:, level].double() @ line, fit)

        return folds.scored(read, levels)

    frozen, renewed = along(here, base, base), along(here, base, here)
    return HomeReading(
        scores={"frozen": frozen, "own": along(here, here, here), "probe": read_vectors(here, folds, levels)},
        right={"frozen": (frozen > 0) == folds.positive, "new": (renewed > 0) == folds.positive},
    )


def home_numbers(
    asked: HomeQuestion,
    here: HomeReading,
    base: HomeReading,
    floor: Mapping[str, Float[Tensor, "row prompt"]],
    *,
    seed: int,
    resamples: int,
) -> dict[str, Estimate]:
    """AUROC of every read-out and of the floor, accuracy, changes from the base, and the gain over each of the floor.

    All differences are paired by prompt. A gain is that of the probe fitted here, which reads as the floor is read.
    """
    folds, scores = asked.folds, here.scores
    under = {name: floor[name] for name in FLOORS}
    accuracies = _accuracies(folds, here, seed, resamples)
    return (
        {f"auroc.{name}": mean_auroc(values, folds) for name, values in {**scores, **under}.items()}
        | {f"accuracy.{name}": accuracies[name] for name in here.right}
        | {f"{name}_change": auroc_gain(scores[name], base.scores[name], folds) for name in READ_OUTS}
        | {"readout_gap": auroc_gain(scores["frozen"], scores["own"], folds), "threshold_gap": accuracies["gap"]}
        | {f"gain.{name}": auroc_gain(scores["probe"], values, folds) for name, values in under.items()}
    )


def _accuracies(folds: Folds, here: HomeReading, seed: int, resamples: int) -> dict[str, Estimate]:
    """Balanced accuracy at both thresholds, and how far the frozen one is behind."""
    labels = ["positive" if flag else "negative" for flag in folds.positive.tolist()]
    weights = sample_and_resamples(folds.families, resamples, seed, labels)
    up, down = weights * folds.positive, weights * ~folds.positive

    def balanced(right: Tensor) -> Tensor:
        share = right.double().mean(dim=0)
        return (up @ share / up.sum(dim=1) + down @ share / down.sum(dim=1)) / 2

    draws = {name: balanced(right) for name, right in here.right.items()}
    draws["gap"] = draws["frozen"] - draws["new"]
    return {name: of_sample(drawn, len(labels)) for name, drawn in draws.items()}


def home_table(concept: str, steps: Sequence[int], numbers: Sequence[Mapping[str, Estimate]]) -> pd.DataFrame:
    """One row for each checkpoint and number: concept, step, number, value, low, high, n."""
    rows = [
        {"concept": concept, "step": step, "number": name, **estimate.row()}
        for step, found in zip(steps, numbers, strict=True)
        for name, estimate in found.items()
    ]
    return pd.DataFrame(rows)
