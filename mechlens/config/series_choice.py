"""Settings of the verbs that read checkpoints beside a base."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BaseChoice:
    """Which base, how it is loaded, and what is written around the prompts."""

    base: str = "smollm2-refuser"
    """The model that the checkpoints were trained from: a packaged name, hub id, local folder or GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a base on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; adapters are added in float32 and rounded then."""
    device: str | None = None
    """Such as cpu, cuda or cuda:1; None leaves the model where it was loaded (the CPU)."""
    template: str = "tokenizer"
    """Chat template: tokenizer (its own), paper (the published strings) or paper:FAMILY."""
    today: str | None = None
    """Day, such as 2024-07-26, that a chat template which prints the date prints; None is this day."""
