"""`mechlens causal`."""

from dataclasses import dataclass

from mechlens.settings import RANDOM_DIRECTIONS, Answering, ModelChoice, PromptSets, RunChoice, Sampling
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class CausalPlan(Sampling, Answering):
    """The choices of a causal battery."""

    layers: tuple[int, ...] = ()
    """Layers of the grid; none given is every third."""
    full: bool = False
    """Every layer in the grid, about three times the work there."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Strengths of the grid, as shares of the median residual norm; 0.5 and 1 are about the published 1 and 2."""
    n_validation: int = 16
    """Prompts of each class in the grid, where layer and strength are chosen."""
    n_test: int = 32
    """Prompts of each class on which the chosen layer and strength are reported."""
    shuffled_directions: int = RANDOM_DIRECTIONS
    """Null directions from shuffled labels behind every reported number."""


@dataclass(frozen=True, kw_only=True)
class Causal(CausalPlan, PromptSets, ModelChoice, RunChoice):
    """Does the harmfulness direction change the model's belief, and the refusal direction only whether it refuses?"""


STUDY = of_folder("causal", Causal)
