"""`mechlens causal`."""

from dataclasses import dataclass

from mechlens.settings import RANDOM_DIRECTIONS, Answering, ModelChoice, PromptSets, RunChoice, Sampling
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class CausalPlan(Sampling, Answering):
    """The choices of a causal battery."""

    layers: tuple[int, ...] = ()
    """Layers where a direction may be put; none given is every third, and then the neighbours of the best."""
    full: bool = False
    """Every layer instead, about three times the work there."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Strengths to choose from, as shares of the median residual norm; layers are compared at the middle one."""
    coefficient: float = 1.0
    """What the raw directions are multiplied by in the figure of refusals over all layers; 1 as published."""
    every_position: bool = False
    """Directions from every position of the template too, each at the chosen layer and strength, in a table."""
    n_train: int = 64
    """Training prompts of each class, of which the directions are made."""
    n_validation: int = 8
    """Prompts of each class on which layer and strength are chosen."""
    n_test: int = 32
    """Prompts of each class on which the chosen layer and strength are reported."""
    n_null: int = 6
    """Test prompts of each class on which null directions are tried; what so few add to their spread is taken off."""
    shuffled_directions: int = RANDOM_DIRECTIONS
    """Null directions from shuffled labels behind what each direction is claimed to change."""


@dataclass(frozen=True, kw_only=True)
class Causal(CausalPlan, PromptSets, ModelChoice, RunChoice):
    """Does the harmfulness direction change the model's belief, and the refusal direction only whether it refuses?"""


STUDY = of_folder("causal", Causal)
