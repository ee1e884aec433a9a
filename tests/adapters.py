"""Random adapters on disk, as a training run would leave them."""

from pathlib import Path
from typing import Any

import torch


def save_adapter(base: str, folder: Path, *, seed: int, size: float = 0.1, rank: int = 4, **options: Any) -> Path:
    """A LoRA adapter for every linear layer of the model in folder `base`; without training, but not zero."""
    from peft import LoraConfig, get_peft_model

    from mechlens.models.load import load_hf

    torch.manual_seed(seed)
    hf_model, _ = load_hf(base)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(hf_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    model.save_pretrained(str(folder))
    return folder


def save_peft(base: str, folder: Path, config: Any, size: float = 0.1) -> Path:
    """An adapter of any kind for the model in folder `base`, everything that it trains moved at random."""
    from peft import get_peft_model

    from mechlens.models.load import load_hf

    torch.manual_seed(0)
    model = get_peft_model(load_hf(base)[0], config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(str(folder))
    return folder


def adapted_logits(base: str, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
    """What peft's own model says, with nothing merged."""
    from peft import PeftModel

    from mechlens.models.load import load_hf

    torch.manual_seed(0)
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(load_hf(base)[0], adapter).eval()(input_ids=tokens).logits
    return logits.float()
