"""`mechlens steer train`."""

from dataclasses import dataclass

from mechlens.methods.steering.controllers.plan import ControllerPlan
from mechlens.settings import Answering, Draws, PositiveInt, PromptSets, RefusingModel, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class RivalsPlan(ControllerPlan, Answering):
    """How a controller is fitted, and what it is tested beside.

    >>> ml.RivalsPlan(strengths=(0.05, 0.1)).draws
    20
    """

    seed: int = 0
    """Decides the sample, the split, the first weights, the order of training, every resample and every null."""
    strengths: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1)
    """Shares of the residual norm that a layer adds at most; each rival takes the one that tells validation prompts
    apart best."""
    heads: float = 0.1
    """Share of all heads that are shifted (ITI); 0 leaves that rival out."""
    draws: Draws = 20
    """Orders of the layer weights, and random directions, that are compared by the first answer token."""
    resamples: Draws = 1000
    """Bootstrap resamples of prompt families behind every interval."""


@dataclass(frozen=True, kw_only=True)
class SteerTrain(RivalsPlan, PromptSets, RefusingModel, RunChoice):
    """Train a controller that decides per prompt how strongly to steer towards refusal; test it beside its rivals.

    >>> ml.SteerTrain(model="smollm2-refuser", n=48, out="runs/controller").test_harmless
    'looks-harmful'
    """

    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed; None takes all. Of the training sources half train and a fifth choose."""
    test_harmful: str = "looks-harmless"
    """Harmful prompts of another source, on which everything is tested too."""
    test_harmless: str = "looks-harmful"
    """Harmless prompts of another source, alarming ones by default: refusing them is over-refusal."""
    templates: str | None = None
    """File of templates with [INSERT PROMPT HERE], such as jailbreaks; the held-out prompts of both classes are tested
    in them as well."""


STUDY = of_folder(
    "steer train",
    SteerTrain,
    "mechlens steer train --model smollm2-refuser --out runs/controller",
    "mechlens steer train --model smollm2-refuser --n 48 --templates jailbreaks.txt --out runs/controller",
)
