"""`mechlens separate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechlens.config.shared_settings import ModelChoice, Sampling, WandbSettings


@dataclass(frozen=True, kw_only=True)
class Separate(ModelChoice, Sampling):
    """Are harmfulness and refusal two things in this model? Quadrants, directions, beliefs, verdict."""

    out: Path
    """Run folder; a run killed in it goes on when the same command is given again."""
    harmful: str = "harmful"
    """Harmful prompts: a built-in set (harmful), a file (JSON, JSONL, CSV, parquet, txt) or a hub data set."""
    harmless: str = "harmless"
    """Harmless prompts: a built-in set (harmless, benign), a file or a hub data set."""
    extra_harmless: str | None = "benign"
    """Further harmless prompts, for the quadrants and the refusal contrasts only; None leaves them out."""
    n: int | None = None
    """Prompts of each set, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes."""
    max_new_tokens: int = 24
    """Length of the answers that are judged."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
