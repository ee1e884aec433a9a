"""`mechlens select`."""

from dataclasses import dataclass

from mechlens.settings import Answering, ModelChoice, PromptSets, RunChoice
from mechlens.studies.registry import Study


@dataclass(frozen=True, kw_only=True)
class Select(RunChoice, Answering, PromptSets, ModelChoice):
    """Which single direction carries refusal? Every position and layer scored, one chosen, tested beside chance."""

    n: int | None = 96
    """Prompts of each set, drawn by seed; None takes all. Half train, a fifth choose, the rest test."""
    last_layers: float = 0.2
    """Share of the layers, from the top, whose candidates are dropped."""
    highest_kl: float = 0.1
    """Candidates whose ablation changes harmless prompts by more (mean KL in nats) are dropped."""
    least_induce: float = 0.0
    """Candidates whose addition leaves the refusal score of harmless prompts below this are dropped."""
    random_directions: int = 20
    """Random directions of the chosen one's length on test; as many as there are candidates go through the choice."""
    resamples: int = 1000
    """Bootstrap resamples of prompt families behind every interval."""
    seed: int = 0
    """Decides the sample, the split, every resample and every random direction."""


STUDY = Study(
    "select",
    Select,
    "mechlens.studies.select.study:prepare",
    "mechlens.studies.select.study:execute",
    "mechlens.studies.select.report:record",
)
