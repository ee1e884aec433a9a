"""Random LoRA adapters on disk, as a training run would leave them."""

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
