"""What a series is measured against: the base's own answers, quadrants, refusal tokens, concepts and chosen levels.

Everything here is decided on the base alone, on training and validation prompts, before any checkpoint is looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.directions.direction import Direction, mean_difference
from mechlens.methods.probing.detect import Detection, detect
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import PARTS, Split
from mechlens.settings import Nulls
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS, MIN_IN_A_PART
from mechlens.studies.shared.quadrants import JudgedAnswers, judge_answers, refusal_tokens

CONTRASTS = {"harmful": ("harmful", "harmless"), "refused": ("refused", "accepted")}
"""Concepts that are tracked, with the labels that each tells apart."""


@dataclass(frozen=True)
class TrackedConcept:
    """One question, put alike to every checkpoint: the labels are the base's and never change."""

    name: str
    contrast: tuple[str, str]
    labels: tuple[str, ...]
    """Label of every prompt."""
    home: str
    """Position at which the verdict is made: `inst` for harmfulness, the last token for refusal."""
    detection: Detection | None
    """In the base; None where a class has too few prompts."""
    counts: dict[str, int]

    def level(self, position: str) -> int:
        """Level chosen on the base's validation prompts."""
        assert self.detection is not None
        return self.detection.at(position).level

    def relabelled(self, acts: Activations) -> Activations:
        """The activations of some checkpoint under this concept's labels."""
        return replace(acts, labels=self.labels)

    def direction(self, acts: Activations, split: Split) -> Direction:
        """The mean difference at home, fitted on the training prompts of these activations."""
        return mean_difference(
            self.relabelled(acts).select(split.train), *self.contrast, self.level(self.home), self.home
        )


@dataclass(frozen=True)
class BaseReference:
    """The base, as everything that follows it is measured against it."""

    judged: JudgedAnswers
    tokens: RefusalTokens
    """First answer tokens of the base's refusals."""
    concepts: tuple[TrackedConcept, ...]
    split: Split

    @property
    def measurable(self) -> tuple[TrackedConcept, ...]:
        """The concepts with enough prompts."""
        return tuple(concept for concept in self.concepts if concept.detection is not None)


def reference_of(
    prompts: Sequence[Prompt],
    acts: Activations,
    answers: Answers,
    split: Split,
    plan: Nulls,
    tokenizer: Any,
    judge: str = "phrases",
) -> BaseReference:
    """Judges the base's answers and chooses each concept's level at every position."""
    judged = judge_answers(prompts, answers, judge)
    labels = {"harmful": tuple(prompt.label for prompt in prompts), "refused": judged.verdicts[judged.judge]}
    homes = {"harmful": "inst", "refused": acts.positions[-1]}
    concepts = tuple(_concept(name, labels[name], homes[name], acts, split, plan) for name in CONTRASTS)
    return BaseReference(judged, refusal_tokens(judged, split.train, tokenizer), concepts, split)


def _concept(
    name: str, labels: tuple[str, ...], home: str, acts: Activations, split: Split, plan: Nulls
) -> TrackedConcept:
    contrast = CONTRASTS[name]
    counts = {label: labels.count(label) for label in contrast}
    parts = [sum(labels[i] == label for i in split.part(part)) for part in PARTS for label in contrast]
    enough = min(counts.values()) >= MIN_IN_A_CLASS and min(parts) >= MIN_IN_A_PART
    detection = detect(replace(acts, labels=labels), *contrast, split, plan.detection) if enough else None
    return TrackedConcept(name, contrast, labels, home, detection, counts)


def rates(values: Sequence[bool]) -> torch.Tensor:
    """Verdicts as numbers, to be averaged."""
    return torch.tensor(values, dtype=torch.float64)
