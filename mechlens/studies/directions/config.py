"""`mechlens directions`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechlens.settings import Options
from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class OneDirection(Options):
    """Which direction."""

    direction: Path
    """As for `steer`: a run's folder or its .safetensors file, or another tool's .pt or .gguf."""
    out: Path
    """The file to write."""
    layer: int | None = None
    """Level taken from a file that has several."""
    position: str | None = None
    """Position taken from a file that has several, such as inst or last."""


@dataclass(frozen=True, kw_only=True)
class ExportDirection(OneDirection):
    """Write a direction for lm-eval, repeng and llama.cpp, or steering-vectors, to steer with there.

    Of a controller (its file or run) it is the part that is the same for every prompt: what it adds at each layer, or
    at --layer, where its gate is open and its weights are alike, at the strength that its run chose.
    """

    format: Literal["gguf", "lm-eval", "steering-vectors"]
    """gguf is for repeng and llama.cpp; the other two are .pt files of plain tensors."""
    strength: float = 1.0
    """How much is added there; negative subtracts."""
    unit: Literal["share", "raw", "unit"] = "raw"
    """As in `steer`: the vector as it is (raw), the median residual norm (share), or a length of 1 (unit)."""
    blocks: str = "layers"
    """For lm-eval: what the model calls its list of blocks; GPT-2 says h."""


@dataclass(frozen=True, kw_only=True)
class ImportDirection(OneDirection):
    """Keep another tool's direction as a .safetensors file; its model and template stay unknown."""


EXPORT = Command(
    "directions export",
    ExportDirection,
    "mechlens.studies.directions.study:export",
    (
        "mechlens directions export --direction runs/tone --format gguf --out tone.gguf",
        "mechlens directions export --direction runs/tone --format lm-eval --strength 2 --out tone.pt",
    ),
)
IMPORT = Command(
    "directions import",
    ImportDirection,
    "mechlens.studies.directions.study:take_in",
    ("mechlens directions import --direction tone.gguf --layer 12 --out tone.safetensors",),
)
