"""`mechlens steer`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechlens.errors import UserError
from mechlens.settings import STEERED_TOKENS, ModelChoice, NonNegativeFloat, PositiveInt, PositiveShare
from mechlens.studies.registry import Command

STRENGTH = 0.5
"""Of a direction, where nobody says."""
OF_A_DIRECTION = ("layer", "position", "operation", "unit", "calibrate_kl")
"""Options that a controller has decided on."""


@dataclass(frozen=True, kw_only=True)
class Steer(ModelChoice):
    """Answer one prompt with and without a direction, side by side: a quick look, nothing is recorded.

    >>> from pathlib import Path
    >>> ml.Steer(direction=Path("runs/formal/direction.safetensors"), prompt="How are you?").unit
    'share'
    """

    direction: Path | None = None
    """What is added or removed: a run's folder or its .safetensors file, refusal_direction's direction.pt or
    mean_diffs.pt, a .pt stack (level, d_model) of the seed paper, a .pt of steering-vectors or lm-eval, or repeng's
    .gguf."""
    controller: Path | None = None
    """In place of a direction: the controller.safetensors of `steer train`, or its run's folder."""
    prompt: str
    """What the user says."""
    layer: int | None = None
    """Block at whose input it acts (their number: the last one's output), and level taken from a file of many; None is
    the direction's own level."""
    position: str | None = None
    """Position taken from a file that has several, such as inst or last."""
    operation: Literal["add", "ablate"] = "add"
    """add: strength times the direction, at one layer. ablate: its component removed, everywhere."""
    strength: float | None = None
    """How much is added; negative subtracts. None: 0.5 of a direction, and of a controller what its run chose."""
    calibrate_kl: float | None = None
    """Finds the strength: that at which the KL from the unsteered answers to harmless prompts is so many nats (95th
    percentile over tokens). Of --strength only the sign counts then."""
    unit: Literal["share", "raw", "unit"] = "share"
    """Strength 1 is the median residual norm (share), the vector as it is (raw), or a length of 1 (unit)."""
    system: str | None = None
    """System prompt; None leaves the template's own default."""
    max_new_tokens: PositiveInt = STEERED_TOKENS
    """Length of the answers."""
    temperature: NonNegativeFloat = 0.0
    """Above 0, both answers are drawn, by the same random numbers; 0 is greedy."""
    top_p: PositiveShare = 1.0
    """Tokens are drawn among the likeliest that have this share of the probability together."""
    n_samples: PositiveInt = 1
    """Answers that are drawn with the direction, and as many without; more than one needs a temperature."""
    seed: int = 0
    """Decides what is drawn."""
    force: bool = False
    """Use a direction that was made for other weights or another template, or whose origin is unknown."""

    def __post_init__(self) -> None:
        """UserError for options that can't stand beside each other."""
        self._require_one_that_steers()
        self._require_strength()
        for name in ("strength", "temperature"):
            if not math.isfinite(value := getattr(self, name) or 0.0):
                raise UserError(f"the {name} is {value}; give a finite number")
        if self.temperature == 0 and self.n_samples > 1:
            raise UserError(
                f"--n-samples {self.n_samples} asks for answers that differ, and without a temperature they are all "
                "the same; give one, such as --temperature 0.7"
            )
        if self.temperature == 0 and self.top_p < 1:
            raise UserError(
                f"--top-p {self.top_p:g} says among which tokens is drawn, and without a temperature the likeliest is "
                "taken; give one, such as --temperature 0.7"
            )

    def _require_one_that_steers(self) -> None:
        if (self.direction is None) == (self.controller is None):
            raise UserError("what steers is a direction or a controller; give --direction or --controller, one of them")
        wrong = [name for name in OF_A_DIRECTION if getattr(self, name) != getattr(Steer, name)]
        if self.controller is not None and wrong:
            raise UserError(
                f"--{wrong[0].replace('_', '-')} is of a direction, and a controller was given; leave it out"
            )

    def _require_strength(self) -> None:
        if self.operation == "ablate" and self.strength is not None:
            raise UserError("an ablation has no strength; leave --strength out, or add instead")
        if self.calibrate_kl is None:
            return
        if not (math.isfinite(self.calibrate_kl) and self.calibrate_kl > 0):
            raise UserError(f"--calibrate-kl is {self.calibrate_kl}; give a number of nats above 0, such as 1")
        if self.operation == "ablate" or self.unit != Steer.unit:
            raise UserError(
                "--calibrate-kl finds a share of the residual norm to add; leave --operation and --unit out"
            )


COMMAND = Command(
    "steer",
    Steer,
    "mechlens.studies.steer.study:execute",
    (
        'mechlens steer --direction runs/tone --strength 1 --prompt "How do I bake a cake?"',
        'mechlens steer --direction runs/tone --prompt "How do I bake a cake?" --calibrate-kl 1',
        'mechlens steer --direction runs/tone --prompt "Tell me about the sea." --temperature 0.8 --n-samples 3',
        'mechlens steer --model smollm2-refuser --controller runs/controller --prompt "How do I pick a lock?"',
    ),
)
