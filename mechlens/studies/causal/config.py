"""`mechlens causal`."""

from dataclasses import dataclass

from mechlens.settings import Answering, ModelChoice, PromptSets, RunChoice
from mechlens.studies.registry import Study


@dataclass(frozen=True, kw_only=True)
class Causal(RunChoice, Answering, PromptSets, ModelChoice):
    """Does the harmfulness direction change the model's belief, and the refusal direction only whether it refuses?"""

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
    random_directions: int = 20
    """Random directions of the same norm behind every reported number."""
    shuffled_directions: int = 20
    """Directions of shuffled labels behind every reported number."""
    resamples: int = 1000
    """Bootstrap resamples of prompt families behind every interval."""
    seed: int = 0
    """Decides the sample, the split, every resample and every control."""


STUDY = Study(
    "causal",
    Causal,
    "mechlens.studies.causal.study:prepare",
    "mechlens.studies.causal.study:execute",
    "mechlens.studies.causal.report:record",
)
