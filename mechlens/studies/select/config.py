"""`mechlens select`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from mechlens.settings import (
    RANDOM_DIRECTIONS,
    Answering,
    Draws,
    NonNegativeFloat,
    PositiveInt,
    PromptSets,
    RefusingModel,
    RunChoice,
    Sampling,
)
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class SelectionPlan(Sampling, Answering):
    """The choices of a selection.

    >>> ml.SelectionPlan(last_layers=0.1).highest_kl
    0.1
    """

    last_layers: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Share of the layers, from the top, whose candidates are dropped; 0.2 is a fifth of them."""
    highest_kl: NonNegativeFloat = 0.1
    """Candidates whose ablation changes harmless prompts by more (mean KL in nats) are dropped."""
    least_induce: float = 0.0
    """Candidates whose addition leaves the refusal score of harmless prompts below this are dropped."""
    random_directions: Draws = RANDOM_DIRECTIONS
    """Random directions of the chosen one's length on test; as many as there are candidates go through the choice."""


@dataclass(frozen=True, kw_only=True)
class Select(SelectionPlan, PromptSets, RefusingModel, RunChoice):
    """Which single direction carries refusal? Every position and layer scored, one chosen, tested beside chance.

    >>> ml.Select(model="smollm2", n=64, out="runs/select").highest_kl
    0.1
    """

    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed; None takes all. Half train, a fifth choose, the rest test."""


STUDY = of_folder(
    "select",
    Select,
    "mechlens select --model smollm2-refuser --out runs/select",
)
