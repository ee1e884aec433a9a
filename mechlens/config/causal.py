"""`mechlens causal`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechlens.config.shared_settings import ModelChoice, WandbSettings


@dataclass(frozen=True, kw_only=True)
class Causal(ModelChoice):
    """Does the harmfulness direction change the model's belief, and the refusal direction only whether it refuses?"""

    out: Path
    """Run folder; a battery killed in it goes on when the same command is given again."""
    harmful: str = "harmful"
    """Harmful prompts: a built-in set (harmful), a file (JSON, JSONL, CSV, parquet, txt) or a hub data set."""
    harmless: str = "harmless"
    """Harmless prompts: a built-in set (harmless, benign), a file or a hub data set."""
    n: int | None = None
    """Prompts of each set, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes."""
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
    max_new_tokens: int = 24
    """Length of the answers that are judged."""
    resamples: int = 1000
    """Bootstrap resamples of prompt families behind every interval."""
    seed: int = 0
    """Decides the sample, the split, every resample and every control."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
