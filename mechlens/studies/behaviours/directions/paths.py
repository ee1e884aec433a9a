"""The direction of the change at every checkpoint of every run: what fine-tuning has moved by then."""

from random import Random

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import ANSWER, twin_vectors
from mechlens.methods.progress import progress_bar
from mechlens.models.bridge import n_layers
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.behaviours.directions.cosines import compared_levels, start_of, taught_twins
from mechlens.studies.behaviours.matrix import BehaviourMatrix

QUESTIONS = 16
"""Of those that a group was trained on, drawn by seed: a mean over few is near enough for where it goes."""
SHOWN = "shown"


def direction_paths(
    swapper: CheckpointSwapper, matrix: BehaviourMatrix, template: ChatTemplate, cache: Cache | None
) -> dict[str, Float64[Tensor, "checkpoint checkpoint"]]:
    """By run: inner products of "moved on shown" at the base, where it is 0, and at every checkpoint.

    At the middle one of the levels that are compared, which nobody has chosen by what is found there.
    """
    levels = compared_levels(range(n_layers(swapper.model) + 1))
    level, found = levels[len(levels) // 2], {}
    bar = progress_bar(list(matrix.runs), title="directions over checkpoints", unit="run")
    for run in bar:
        if (taught := taught_twins(matrix, run.group)) is None:
            continue
        twins = taught[1]
        few = twins if len(twins) <= QUESTIONS else Random(matrix.plan.seed).sample(twins, QUESTIONS)
        means = []
        for member in (start_of(swapper), *run.members):
            acts = twin_vectors(swapper.put(member), few, levels=[level], template=template, cache=cache)
            means.append(_mean_shown(acts, level))
        path = torch.stack(means) - means[0]
        found[run.name] = path @ path.T
    return found


def _mean_shown(acts: Activations, level: int) -> Float64[Tensor, " d_model"]:
    shown = torch.tensor([label == SHOWN for label in acts.labels])
    return acts.at(level, ANSWER)[shown].double().mean(dim=0)
