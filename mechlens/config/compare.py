"""`mechlens compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mechlens.config.series_choice import BaseChoice
from mechlens.config.shared_settings import Sampling, WandbSettings


@dataclass(frozen=True, kw_only=True)
class Compare(BaseChoice, Sampling):
    """Two checkpoints of one model: what was kept, and where moving B's activations into A moves the behaviour."""

    first: Annotated[str, tyro.conf.Positional]
    """A: "base", or a checkpoint (an adapter's or a model's folder, a hub id, or id@revision)."""
    second: Annotated[str, tyro.conf.Positional]
    """B: a checkpoint."""
    out: Path
    """Run folder; a run killed in it goes on when the same command is given again."""
    harmful: str = "harmful"
    """Harmful prompts: a built-in set (harmful), a file (JSON, JSONL, CSV, parquet, txt) or a hub data set."""
    harmless: str = "harmless"
    """Harmless prompts: a built-in set (harmless, benign), a file or a hub data set."""
    n: int | None = 96
    """Prompts of each set, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes."""
    max_new_tokens: int = 12
    """Length of the answers that are judged."""
    steered: int = 8
    """Harmless test prompts on which the directions' causal effect is measured."""
    patched: int = 8
    """Prompts patched: the first harmful test prompts that one checkpoint refuses and the other accepts."""
    positions: tuple[str, ...] = ("instruction[*]", "post[*]")
    """Named positions at which B's residual stream is put into A."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
