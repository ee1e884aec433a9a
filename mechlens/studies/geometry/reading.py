"""What one model has at every level and position, and the classes that its prompts fall into."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.shared.contrasts import surface_of
from mechlens.studies.shared.quadrants import QUADRANTS, JudgedAnswers, judge_answers
from mechlens.studies.shared.sink_positions import Asked, asked_of

FEWEST = 5
"""Prompts of a class below which its mean and spread say nothing."""


@dataclass(frozen=True)
class Reading:
    """One model, read."""

    name: str
    step: int
    acts: Activations = field(repr=False)
    judged: JudgedAnswers = field(repr=False)
    words: Float[Tensor, "prompt d_model"] = field(repr=False)
    """Mean token embeddings of the requests."""
    units: dict[str, Activations] = field(repr=False)
    """Neurons and heads at the last position of some layers; of a model that stands alone there are none."""

    @property
    def families(self) -> tuple[str, ...]:
        """Of every prompt."""
        return self.acts.families

    @property
    def asked(self) -> tuple[Asked, ...]:
        """Harmful against harmless, and refused against accepted by its own answers."""
        labels = [one.label for one in self.judged.prompts]
        return asked_of(labels, self.judged.verdicts[self.judged.judge], self.families)

    def labellings(self) -> dict[str, tuple[list[int], list[str]]]:
        """By name: the rows of prompts that are of a class with enough of them, and their classes."""
        prompts, verdicts = self.judged.prompts, self.judged.verdicts[self.judged.judge]
        quadrants = [name if name in QUADRANTS else None for name in self.judged.quadrants()]
        of: dict[str, list[str | None]] = {
            "harmful": [one.label for one in prompts],
            "refused": [word if word in ("refused", "accepted") else None for word in verdicts],
            "quadrant": quadrants,
            "category": [one.category if one.label == "harmful" else None for one in prompts],
        }
        found = {name: _large_classes(labels) for name, labels in of.items()}
        return {name: one for name, one in found.items() if len(set(one[1])) > 1}


def _large_classes(labels: Sequence[str | None]) -> tuple[list[int], list[str]]:
    counts = Counter(labels)
    kept = [(i, label) for i, label in enumerate(labels) if label and counts[label] >= FEWEST]
    return [i for i, _ in kept], [label for _, label in kept]


def read_model(
    model: LanguageModel, batch: TokenBatch, name: str, step: int, plan: GeometryPlan, *, matched: bool, cache: Cache
) -> Reading:
    """Answers, vectors and, where models are compared, neurons and heads."""
    answers = answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache)
    acts = collect(model, batch, positions=plan.read, levels=plan.levels or None, site=plan.site, cache=cache)
    layers = evenly(n_layers(model), plan.matched)
    units = {
        name: collect(model, batch, positions=["last"], levels=layers, site=site, cache=cache)
        for name, site in (("neurons", "mlp_post"), ("heads", "z"))
        if matched
    }
    judged = judge_answers(batch.prompts, answers, plan.judge)
    return Reading(name, step, acts, judged, surface_of(model, batch).mean_embeddings.float().cpu(), units)


def evenly(layers: int, n: int) -> list[int]:
    """`n` layers evenly apart, the last among them."""
    return sorted({round(k * layers / n) - 1 for k in range(1, n + 1)} - {-1})


def varies(values: Float[Tensor, "prompt d_model"]) -> bool:
    """Whether prompts differ: a template's token at level 0 is the same for all."""
    return float((values - values[0]).abs().max()) > 1e-6 * float(values.abs().max()) and bool(
        torch.isfinite(values).all()
    )
