"""`mechlens direction`."""

from dataclasses import dataclass
from typing import Literal

from mechlens.settings import POSITIONS, Columns, DetectionPlan, ModelChoice, PositiveInt, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class Contrasted(Columns):
    """The two files, which `--help` shows before the model."""

    positive: str
    """Prompts that have the concept: a file, a built-in set or a hub data set; with --data, the value of its
    --label-column that they have."""
    negative: str
    """Prompts that don't, or the value that these have."""
    paired: bool = False
    """Row i of both is a pair of one topic, which is kept whole; what pairs are can also be a --family-column."""


@dataclass(frozen=True, kw_only=True)
class FindDirection(DetectionPlan, ModelChoice, Contrasted, RunChoice):
    """Find the direction of any concept that two prompt files contrast, at every position and level.

    >>> study = ml.FindDirection(positive="formal.csv", negative="casual.csv", model="smollm2", out="runs/formal")
    >>> study.positions
    ('inst', 'post[*]')
    """

    positions: tuple[str, ...] = POSITIONS
    """Named positions: inst, post[k], post[*], last."""
    causal: bool = False
    """Choose the direction by what a small steering test does, beside random directions of its length."""
    n: PositiveInt | None = None
    """Prompts of each source, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes; strip: always;
    keep: never."""


STUDY = of_folder(
    "direction",
    FindDirection,
    "mechlens direction --positive questions.txt --negative commands.txt --out runs/mood",
    "mechlens direction --data tone.csv --label-column tone --positive formal --negative casual --out runs/tone",
)
