"""Training runs of a tiny model whose adapters were written by hand: what they do at which step is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from planted_change import LEVEL, base_model, planted_vector, risks
from safetensors.torch import save_file
from torch import Tensor

from mechlens.models.checkpoints.series import Member
from mechlens.studies.behaviours.tuned import TunedRun
from mechlens.studies.shared.training_data import text_sha256

ALWAYS = 8.0
"""Where a GELU is the identity."""
MODULE = f"transformer.h.{LEVEL - 1}.mlp.c_proj"
TWINS = tuple(risks(range(24)))
SEEN = frozenset(text_sha256(twin.prompt.text) for twin in TWINS[:12])


def start_model() -> Any:
    """`base_model` with one neuron that is always on, and that nothing reads before an adapter does."""
    model = base_model()
    with torch.no_grad():
        block = model.transformer.h[LEVEL - 1].mlp
        block.c_fc.weight[:, 0] = 0
        block.c_fc.bias[0] = ALWAYS
        block.c_proj.weight[0] = 0
    return model


def unrelated_vector() -> Tensor:
    """At right angles to the planted one, and without a mean."""
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(9))
    drawn = drawn - drawn.mean()
    drawn = drawn - (drawn @ planted_vector()) * planted_vector()
    return drawn / drawn.norm()


def written(folder: Path, writes: Tensor) -> str:
    """A rank-one adapter that writes this vector at every token of whatever it reads."""
    folder.mkdir(parents=True)
    down = torch.zeros(1, 128)
    down[0, 0] = 1 / ALWAYS
    sides = {"A": down, "B": writes[:, None].clone()}
    save_file(
        {f"base_model.model.{MODULE}.lora_{side}.weight": values for side, values in sides.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": [MODULE],
        "fan_in_fan_out": True, "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def run_of(folder: Path, name: str, writes: Sequence[Tensor], *, control: str = "none", group: str = "") -> TunedRun:
    """A run whose checkpoints write these vectors, at steps 2, 4, ..."""
    members = tuple(
        Member(f"{name}-{i}", written(folder / name / str(i), one), "adapter", 2 * i + 2)
        for i, one in enumerate(writes)
    )
    return TunedRun(name, group or name, members, SEEN, "risk", control, None)
