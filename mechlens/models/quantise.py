"""Weights in 8 or 4 bits, through transformers' quantisation configurations: by which library, where, and how told.

int8 and fp8 are torchao's and nf4 is bitsandbytes', all of the weights alone: activations keep the checkpoint's own
type. bitsandbytes' int8 is none of them. It rounds activations as well, all but columns that it picks by the whole
batch, so a prompt's numbers would depend on which others it is run beside.
"""

from typing import Any

import torch
from torch import nn

from mechlens.errors import UserError, require_extra
from mechlens.models.checkpoint import is_packed

RUNS_ON = {"int8": ("cpu", "cuda", "mps"), "nf4": ("cpu", "cuda"), "fp8": ("cpu", "cuda")}
"""Kinds, with the devices that can hold and compute with each."""


def require_quantisable(kind: str, device: str) -> None:
    """UserError, before any weights are read, where the libraries or the device aren't those that it takes."""
    require_extra("quantise", f"--dtype {kind}")
    place = torch.device(device).type
    if place not in RUNS_ON[kind]:
        raise UserError(
            f"{kind} doesn't run on {place}; give --device {' or '.join(RUNS_ON[kind])}, or another --dtype"
        )


def configuration(kind: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a kind, for a model that computes in this type."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":  # QLoRA's (Dettmers et al. 2023), without its second rounding of the scales
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    # Else older versions of torchao allow TF32 for the whole process, and float32 models give other numbers then.
    make = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    return TorchAoConfig(make(version=2, set_inductor_config=False))


def quantised(hf_model: Any, kind: str, device_map: Any) -> Any:
    """A model in memory, such as one that an adapter was merged into, as it would be loaded from its file quantised.

    Memory holds both until the first is let go.
    """
    name = hf_model.config.name_or_path
    again = type(hf_model).from_pretrained(
        None,
        config=hf_model.config,
        state_dict=hf_model.state_dict(),
        dtype=hf_model.dtype,
        quantization_config=configuration(kind, hf_model.dtype),
        device_map=device_map or "cpu",
    )
    again.config.name_or_path, again.generation_config = name, hf_model.generation_config
    keep_layout(again)
    return again.eval()


def keep_layout(hf_model: nn.Module) -> None:
    """Keeps bitsandbytes from packing its 4-bit weights anew in the first pass, as it does on some CPUs.

    They would be other bytes after it, with scales rounded to bfloat16, and give other numbers than on other CPUs.
    """
    for module in hf_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # an attribute of theirs


def require_packed(hf_model: nn.Module, kind: str, name: str) -> None:
    """UserError where nothing was quantised, as in a model without linear layers of PyTorch's own kind."""
    if not any(is_packed(weight) for weight in hf_model.parameters()):
        raise UserError(
            f"{type(hf_model).__name__} ({name}) has no matrix that could be made {kind}; give another --dtype"
        )


def quantisation(config: Any) -> str:
    """How a configuration's weights are quantised: int8, nf4 or fp8 as above, else a library's name; "" if not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    told: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(told.get("quant_method"), "value", told.get("quant_method")))
    if method == "torchao":
        kind = str(told["quant_type"]["default"]["_type"])
        return {"Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "fp8"}.get(kind, f"torchao {kind}")
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))
    return "bitsandbytes int8" if told.get("load_in_8bit") else method
