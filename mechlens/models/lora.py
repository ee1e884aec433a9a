"""A LoRA adapter on disk as what it adds to each matrix, read without building a PEFT model.

Hu et al. 2021: W + scale * B A. Other kinds of adapters are refused, by name, rather than half applied.
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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
BEYOND = ("use_dora", "modules_to_save", "target_parameters", "lora_bias", "layer_replication", "use_qalora",
          "trainable_token_indices", "use_bdlora", "arrow_config", "alora_invocation_tokens")  # fmt: skip
"""Settings that are unset in an adapter that is nothing but low-rank products."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one matrix: `scale * up @ down` (output by input, as in nn.Linear)."""

    up: Float[Tensor, "output rank"]
    down: Float[Tensor, "rank input"]
    scale: float

    def product(self) -> Float[Tensor, "output input"]:
        """The change itself, as peft computes it when it merges (float32)."""
        return (self.up @ self.down) * self.scale


@dataclass(frozen=True)
class _Numbers:
    """What is computed with of `adapter_config.json`, as peft writes it."""

    lora_alpha: float = 8
    use_rslora: bool | None = False
    alpha_pattern: dict[str, float] | None = None


def read_lora(folder: Path) -> dict[str, LowRank]:
    """The change of every matrix, by the name of its module in the plain Hugging Face model.

    UserError for a folder that is no whole adapter, or that holds something else than LoRA.
    """
    config = _config(folder)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in _tensors(folder).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"the adapter {str(folder)!r} holds {key}, which is no LoRA matrix; merge it with peft and give the "
                "merged model"
            )
        # peft computes in float32 whatever the file's type.
        sides.setdefault(match["module"], {})[match["side"]] = value.float()
    lonely = [name for name, pair in sides.items() if set(pair) != {"A", "B"}]
    if lonely or not sides:
        raise UserError(f"the adapter {str(folder)!r} has half a change of {lonely or 'nothing'}; save it again")
    return {name: LowRank(pair["B"], pair["A"], _scale(config, name, len(pair["A"]))) for name, pair in sides.items()}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config: dict[str, Any] = read_json(path, dict[str, Any], "save the adapter again")
        read_json(path, _Numbers, "save the adapter again")
    except FileNotFoundError as error:
        raise UserError(f"there is no {CONFIG} in {str(folder)!r}; give the folder of a PEFT adapter") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(
            f"the adapter {str(folder)!r} is of type {kind}, and only LORA can be put in place; merge it with peft "
            "and give the merged model"
        )
    odd = [name for name in BEYOND if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise UserError(
            f"the adapter {str(folder)!r} has {odd[0]}={config[odd[0]]!r}, which is more than low-rank products; "
            "merge it with peft and give the merged model"
        )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
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
