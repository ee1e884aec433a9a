"""Forms in which training leaves weights that mechlens doesn't read, and where it leaves adapters."""

import re
from collections.abc import Iterator
from pathlib import Path

from mechlens.models.lora import CONFIG

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""How the Trainer calls a step's folder."""


def other_format(folder: Path) -> str | None:
    """Says in what form a folder without safetensors has its weights, and what to do; None where there are none."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if re.match(r"pytorch_model_fsdp", name):
            return (
                f"its weights are FSDP's ({name}), which mechlens doesn't read; join them with "
                "`accelerate merge-weights`, or train with SHARDED_STATE_DICT off"
            )
    for name in names:
        if re.fullmatch(r"global_step\d+|zero_to_fp32\.py|\w*_?zero_pp_rank_.*", name):
            return (
                f"its weights are DeepSpeed's ({name}), which mechlens doesn't read; make safetensors of them with the "
                "folder's own `zero_to_fp32.py --safe_serialization`"
            )
    for name in names:
        if re.fullmatch(r"(pytorch_model|adapter_model)[\w.-]*\.(bin|bin\.index\.json|pt|pth)", name):
            return (
                f"its weights are pickled ({name}), which mechlens doesn't open; load them with transformers or peft "
                "and save_pretrained them as safetensors"
            )
    return None


def adapters_inside(folder: Path) -> Iterator[Path]:
    """Adapters in a folder's own folders: peft puts each into one that bears its name, unless it is "default"."""
    if folder.is_dir():
        yield from sorted(child for child in folder.iterdir() if (child / CONFIG).is_file())
