"""`mechlens compare`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mechlens.settings import BaseChoice, NonNegativeInt, PositiveInt, PromptSets, RunChoice
from mechlens.studies.registry import of_folder
from mechlens.studies.track.config import SeriesPlan

FEWEST = 6
"""Prompts, of as many families, below which an interval says nothing."""


@dataclass(frozen=True, kw_only=True)
class Compare(SeriesPlan, PromptSets, BaseChoice, RunChoice):
    """Two checkpoints of one model: what was kept, and where moving B's activations into A moves the behaviour.

    >>> early, late = "runs/tuned/checkpoint-10", "runs/tuned/checkpoint-20"
    >>> study = ml.Compare(base="smollm2", first=early, second=late, out="runs/compare")
    >>> study.n
    96
    """

    first: Annotated[str, tyro.conf.Positional]
    """A: "base", or a checkpoint (an adapter's or a model's folder, a hub id, or id@revision)."""
    second: Annotated[str, tyro.conf.Positional]
    """B: a checkpoint."""
    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed; None takes all."""
    patched: NonNegativeInt = 8
    """Prompts patched: the first harmful test prompts that one checkpoint refuses and the other accepts; 0: none."""
    positions: tuple[str, ...] = ("instruction[*]", "post[*]")
    """Named positions at which B's residual stream is put into A."""


STUDY = of_folder(
    "compare",
    Compare,
    "mechlens compare base runs/benign/checkpoint-128 --base smollm2-refuser --out runs/compare",
)
