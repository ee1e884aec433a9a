"""`mechlens compare`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mechlens.settings import BaseChoice, JudgeName, PromptSets, RunChoice, Sampling
from mechlens.studies.registry import Study


@dataclass(frozen=True, kw_only=True)
class Compare(RunChoice, Sampling, PromptSets, BaseChoice):
    """Two checkpoints of one model: what was kept, and where moving B's activations into A moves the behaviour."""

    first: Annotated[str, tyro.conf.Positional]
    """A: "base", or a checkpoint (an adapter's or a model's folder, a hub id, or id@revision)."""
    second: Annotated[str, tyro.conf.Positional]
    """B: a checkpoint."""
    n: int | None = 96
    """Prompts of each set, drawn by seed; None takes all."""
    max_new_tokens: int = 12
    """Length of the answers that are judged."""
    judge: JudgeName = "phrases"
    """Who says what is a refusal: a name of `mechlens.choices.JUDGES`."""
    steered: int = 8
    """Harmless test prompts on which the directions' causal effect is measured."""
    patched: int = 8
    """Prompts patched: the first harmful test prompts that one checkpoint refuses and the other accepts."""
    positions: tuple[str, ...] = ("instruction[*]", "post[*]")
    """Named positions at which B's residual stream is put into A."""


STUDY = Study(
    "compare",
    Compare,
    "mechlens.studies.compare.study:prepare",
    "mechlens.studies.compare.study:execute",
    "mechlens.studies.compare.report:record",
)
