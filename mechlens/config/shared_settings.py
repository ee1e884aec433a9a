"""Settings that many verbs share: the model, how much chance is sampled, Weights & Biases."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class WandbSettings:
    """Where a run is mirrored in Weights & Biases; the folder on disk is complete without it."""

    project: str = "mechlens"
    """W&B project; WANDB_PROJECT counts where this is left alone."""
    entity: str | None = None
    """W&B user or team; None is your own default."""
    group: str | None = None
    """Group that the run belongs to in W&B."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    name: str | None = None
    """Name of the W&B run; None is the verb and the name of the output folder."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """None follows WANDB_MODE, then your W&B login; with neither it is offline."""
    upload_text: Annotated[bool, tyro.conf.arg(name="wandb-text", prefix_name=False)] = False
    """Upload the text of prompts and answers as well; otherwise only ids and numbers leave the machine."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model, how it is loaded, and what is written around the prompts."""

    model: str = "smollm2"
    """Packaged name (smollm2), hub id, local folder or GGUF file."""
    adapter: str | None = None
    """PEFT adapter, a folder or hub id, merged into the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    device: str | None = None
    """Such as cpu, cuda or cuda:1; None leaves the model where it was loaded (the CPU)."""
    device_map: str | None = None
    """Handed to transformers to spread a model over devices; untested."""
    template: str = "tokenizer"
    """Chat template: tokenizer (its own), paper (the published strings) or paper:FAMILY."""
    today: str | None = None
    """Day, such as 2024-07-26, that a chat template which prints the date prints; None is this day."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much chance is sampled, and from which seed."""

    seed: int = 0
    """Decides the sample, the split, every resample and every null."""
    resamples: int = 1000
    """Bootstrap resamples of prompt families behind every interval."""
    permutations: int = 200
    """Label permutations behind every null."""
    random_directions: int = 20
    """Random directions of the same norm behind every null."""
