"""`mechlens direction`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mechlens.choices import METHODS, choice
from mechlens.settings import ModelChoice, RunChoice, Sampling
from mechlens.studies.registry import Study

MethodName = Annotated[
    str,
    METHODS,
    choice(METHODS, "How the direction is found; all but the mean difference get at most 50 label permutations."),
]


@dataclass(frozen=True, kw_only=True)
class FindDirection(RunChoice, Sampling, ModelChoice):
    """Find the direction of any concept that two prompt files contrast, at every position and level."""

    positive: str
    """Prompts that have the concept: a file, a built-in set or a hub data set."""
    negative: str
    """Prompts that don't."""
    method: MethodName = "mean-difference"
    """How the direction is found: a name of `mechlens.choices.METHODS`."""
    positions: tuple[str, ...] = ("inst", "post[*]")
    """Named positions: inst, post[k], post[*], last."""
    n: int | None = None
    """Prompts of each file, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes."""


STUDY = Study(
    "direction",
    FindDirection,
    "mechlens.studies.direction.study:prepare",
    "mechlens.studies.direction.study:execute",
    "mechlens.studies.direction.report:record",
)
