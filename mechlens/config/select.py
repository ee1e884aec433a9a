"""`mechlens select`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechlens.config.shared_settings import ModelChoice, WandbSettings


@dataclass(frozen=True, kw_only=True)
class Select(ModelChoice):
    """Which single direction carries refusal? Every position and layer scored, one chosen, tested beside chance."""

    out: Path
    """Run folder; a selection killed in it goes on when the same command is given again."""
    harmful: str = "harmful"
    """Harmful prompts: a built-in set (harmful), a file (JSON, JSONL, CSV, parquet, txt) or a hub data set."""
    harmless: str = "harmless"
    """Harmless prompts: a built-in set (harmless, benign), a file or a hub data set."""
    n: int | None = 96
    """Prompts of each set, drawn by seed; None takes all. Half train, a fifth choose, the rest test."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes."""
    max_new_tokens: int = 24
    """Length of the answers that are judged; the scores need none."""
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
    wandb: WandbSettings = field(default_factory=WandbSettings)
