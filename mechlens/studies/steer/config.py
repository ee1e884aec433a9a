"""`mechlens steer`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechlens.settings import STEERED_TOKENS, ModelChoice, PositiveInt
from mechlens.studies.registry import Command

STRENGTH = 0.5
"""Of a direction, where nobody says."""


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
    temperature: float = 0.0
    """Above 0, both answers are drawn, by the same random numbers; 0 is greedy."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest that have this share of the probability together."""
    n_samples: PositiveInt = 1
    """Answers that are drawn with the direction, and as many without; more than one needs a temperature."""
    seed: int = 0
    """Decides what is drawn."""
    force: bool = False
    """Use a direction that was made for other weights or another template, or whose origin is unknown."""


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
