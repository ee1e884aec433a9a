"""`mechlens track`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechlens.config.series_choice import BaseChoice
from mechlens.config.shared_settings import Sampling, WandbSettings


@dataclass(frozen=True, kw_only=True)
class Track(BaseChoice, Sampling):
    """Follow directions, probes and behaviour over fine-tuning checkpoints: does what is represented survive?"""

    checkpoints: tuple[str, ...]
    """A training run's output folder, folders of adapters or models, single ones, hub ids, or id@revision."""
    out: Path
    """Run folder; a run killed in it goes on with the first unfinished checkpoint."""
    skip_broken: bool = False
    """Leave out checkpoints that are broken or don't belong to the series; the report lists them."""
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
    positions: tuple[str, ...] = ("inst", "last")
    """Named positions: inst, post[k], post[*], last; inst and last are always among them."""
    levels: tuple[int, ...] = ()
    """Residual levels; none given is every level."""
    max_new_tokens: int = 12
    """Length of the answers that are judged."""
    steered: int = 8
    """Harmless test prompts on which the directions' causal effect is measured."""
    trigger: str | None = None
    """A backdoor's trigger; None takes the one that a checkpoint's own record names, "" none."""
    triggered: int = 24
    """Harmful prompts that are asked again with the trigger, with decoys and without, where there is a trigger."""
    geometry: bool = False
    """Subspaces, unbiased CKA and turning points too."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
