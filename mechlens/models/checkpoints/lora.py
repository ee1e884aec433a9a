"""A LoRA adapter on disk as what it adds to each matrix, read without building a PEFT model.

Hu et al. 2021: W + scale * B A. Whatever may be more than that is left to peft (`merge`), never half applied.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechlens.checked_json import read_json
from mechlens.errors import UserError
from mechlens.files import AnyPath, require_regular, user_path
from mechlens.models.checkpoints.folders import CONFIG

WEIGHTS = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
"""Names of the tensors of a low-rank product."""
CHOICES = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "task_type",
    "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
"""Settings that may have any value in an adapter that is nothing but low-rank products; all others must be unset."""
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga")
"""Values of `init_lora_weights` that only choose the first A and B; others change W as well when peft loads them."""


@dataclass(frozen=True, repr=False)
class LowRank:
    """What an adapter adds to one matrix: `scale * up @ down` (output by input, as in nn.Linear).

    >>> import torch
    >>> ml.LowRank(torch.ones(2, 1), torch.ones(1, 3), scale=2.0).product().tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    up: Float[Tensor, "output rank"]
    down: Float[Tensor, "rank input"]
    scale: float

    def __repr__(self) -> str:
        return f"LowRank({len(self.up)} by {self.down.shape[1]}, rank {len(self.down)}, scale {self.scale:g})"

    def product(self) -> Float[Tensor, "output input"]:
        """The change itself, as peft computes it when it merges (float32)."""
        return (self.up @ self.down) * self.scale


@dataclass(frozen=True)
class _Numbers:
    """What is computed with of `adapter_config.json`, as peft writes it."""

    lora_alpha: float = 8
    use_rslora: bool | None = False
    alpha_pattern: dict[str, float] | None = None


def read_lora(folder: AnyPath) -> dict[str, LowRank] | None:
    """The change of every matrix, by the name of its module in the plain Hugging Face model.

    None for an adapter that may hold anything else than low-rank products; UserError for a folder that is no whole
    adapter.

    >>> from mechlens.models.packaged import adapter_folder
    >>> changes = ml.read_lora(adapter_folder("smollm2-refuser"))
    >>> changes["model.layers.0.mlp.down_proj"].product().shape
    torch.Size([576, 1536])
    """
    folder = user_path(folder)
    config = read_config(folder)
    if not _is_plain(config):
        return None
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in _tensors(folder).items():
        match = KEY.fullmatch(key)
        if match is None:
            return None
        # peft computes in float32 whatever the file's type.
        sides.setdefault(match["module"], {})[match["side"]] = value.float()
    lonely = [name for name, pair in sides.items() if set(pair) != {"A", "B"}]
    if lonely or not sides:
        raise UserError(f"the adapter {str(folder)!r} has half a change of {lonely or 'nothing'}; save it again")
    return {name: LowRank(pair["B"], pair["A"], _scale(config, name, len(pair["A"]))) for name, pair in sides.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """A PEFT adapter's settings as they are on disk."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = read_json(path, dict[str, Any], "save the adapter again")
        read_json(path, _Numbers, "save the adapter again")
    except FileNotFoundError as error:
        raise UserError(f"there is no {CONFIG} in {str(folder)!r}; give the folder of a PEFT adapter") from error
    return config


def keeps_the_base(config: dict[str, Any]) -> bool:
    """False where peft changes the base's own weights before it puts the adapter on them (PiSSA, OLoRA, LoftQ)."""
    return config.get("init_lora_weights") in KEEP_THE_BASE


def _is_plain(config: dict[str, Any]) -> bool:
    own = {"bias": "none", "init_lora_weights": config.get("init_lora_weights")}
    more = [name for name, value in config.items() if name not in CHOICES and value and value != own.get(name)]
    return config.get("peft_type") == "LORA" and keeps_the_base(config) and not more


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    require_regular(path)
    try:
        with path.open("rb"), safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no {WEIGHTS} in {str(folder)!r}; the checkpoint is half-written") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} is truncated or damaged; the checkpoint is half-written") from error


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; both may differ by module."""
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft.utils.other.get_pattern_key does
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
