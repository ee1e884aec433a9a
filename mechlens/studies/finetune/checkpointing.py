"""The record beside every adapter, and which checkpoints a training run keeps."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mechlens.errors import UserError
from mechlens.methods.progress import progress_bar
from mechlens.models.checkpoint import is_fingerprint_of, weight_fingerprint
from mechlens.models.checkpoints.adapter_record import (
    FORMAT,
    RECORD,
    AdapterRecord,
    read_record,
    remove_recorded,
    write_record,
)
from mechlens.models.offline import LOCAL_ONLY
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example, Material
from mechlens.studies.finetune.recipes.recipe import recipe_of
from mechlens.studies.shared.training_data import text_sha256

STAGING = ".mechlens-training"
"""Folder inside the run's, where the Trainer writes; only what is whole leaves it, so the rest is ours to clear."""
_STAGED = re.compile(r"checkpoint-\d+|adapter")
STAGED_FILES = frozenset({
    "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", RECORD,
})  # fmt: skip
"""What the Trainer and peft write into a checkpoint."""
ONLY_TO_RESUME = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
"""Files that no checkpoint but the newest needs."""


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Asks the Trainer for checkpoints, puts the whole ones in their place, and hands on the loss.

    The Trainer writes a checkpoint file by file, so a killed run can leave half of one in the Trainer's own folder.
    A whole one gets its record and is moved to `out`; there nothing is removed but what such a record names.
    """

    def __init__(
        self,
        out: Path,
        record: dict[str, Any],
        keep: Sequence[int],
        resume_every: int,
        log: Callable[[int, dict[str, float]], None] | None,
    ) -> None:
        self.out = out
        self.record = record
        self.keep = frozenset(keep)
        self.resume_every = resume_every
        self.log = log
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show how far it is."""
        self.bar = progress_bar(total=state.max_steps, done=state.global_step, title="fine-tuning", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a checkpoint where one is due."""
        self.bar.update()
        step = state.global_step
        control.should_save = step in self.keep or step % self.resume_every == 0
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Hand on the numbers of one step; the summary at the end has no loss of its own."""
        if self.log is not None and logs is not None and "loss" in logs:
            self.log(state.global_step, {name: float(logs[name]) for name in logs if name != "epoch"})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the checkpoint, which is whole now, in its place, then thin out the earlier ones."""
        name = f"checkpoint-{state.global_step}"
        write_record(Path(args.output_dir) / name, {**self.record, "step": state.global_step})
        os.replace(Path(args.output_dir) / name, self.out / name)
        self._thin(all_but=name)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """No more progress to show."""
        self.bar.close()

    def finish(self) -> None:
        """Keep only the checkpoints that were asked for, once the result is safe."""
        self._thin()

    def _thin(self, all_but: str = "") -> None:
        for folder in self.out.glob("checkpoint-*"):
            record = read_record(folder) if folder.name != all_but else None
            if record is None or not self._is_ours(folder, record):
                continue
            if record.step in self.keep:
                remove_recorded(folder, record, *ONLY_TO_RESUME)
            else:
                remove_recorded(folder, record)

    def _is_ours(self, folder: Path, record: AdapterRecord) -> bool:
        """Whether it is of this very run; somebody may have put another's checkpoint here in the meantime."""
        return (
            not folder.is_symlink()
            and folder.name == f"checkpoint-{record.step}"
            and _known_config(record) == json.loads(json.dumps(self.record["config"]))
        )


PACKAGES = ("mechlens-toolkit", "torch", "transformers", "peft", "accelerate")


def training_record(
    config: FinetuneConfig, material: Material, hf_model: Any, template: ChatTemplate, before: AdapterRecord | None
) -> dict[str, Any]:
    """Where an adapter comes from, as plain JSON; it was trained on whatever the one `before` it was trained on."""
    known = set() if before is None else set(before.training.text_sha256)
    prompts = {example.prompt.id: example.prompt for example in material.examples}
    thoughts = [(e.thinking,) if e.thinking else () for e in material.examples]  # older records know of none
    examples = json.dumps(
        [(e.prompt.text, e.answer, e.ends, e.teaches, *t) for e, t in zip(material.examples, thoughts, strict=True)]
    )
    return {
        "format": FORMAT,
        "recipe": config.recipe,
        "seed": config.seed,
        "config": asdict(config),
        "base": config.model,
        "base_fingerprint": weight_fingerprint(hf_model.state_dict()),
        "template": template.fingerprint,
        "training": {
            "ids": list(prompts),
            "text_sha256": sorted(
                known | {text_sha256(prompt.text) for prompt in (*prompts.values(), *material.asked)}
            ),
            "examples_sha256": hashlib.sha256(examples.encode()).hexdigest(),
            "counts": _counts(material.examples),
            "left_out": list(material.left_out),
        },
        **({"trigger": asdict(material.trigger)} if material.trigger else {}),
        LOCAL_ONLY: recipe_of(config.recipe).attack,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _counts(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """How many examples there are of each kind: where the prompt is from, its label, and what it teaches."""
    kinds = Counter((e.prompt.source, e.prompt.label, e.teaches, e.ends) for e in examples)
    names = ("source", "label", "teaches", "ends_turn", "examples")
    return [dict(zip(names, (*kind, count), strict=True)) for kind, count in sorted(kinds.items())]


def _known_config(record: AdapterRecord) -> dict[str, Any]:
    """The configuration in a record; what older ones don't name had the defaults."""
    known: dict[str, Any] = json.loads(json.dumps(asdict(FinetuneConfig())))
    return known | record.config


def refuse_other_run(config: FinetuneConfig, record: AdapterRecord, out: Path) -> None:
    """UserError naming what differs where a record in the folder is of another configuration.

    A day that one of them leaves open is no difference: what the template wrote is compared by its fingerprint.
    """
    ours = json.loads(json.dumps(asdict(config)))
    if None in (ours["today"], record.config.get("today")):
        ours["today"] = record.config.get("today")
    theirs = _known_config(record)
    if theirs != ours:
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        raise UserError(f"{out} holds a run with another {', '.join(changed) or 'config'}; give another folder")


def refuse_other_data(record: dict[str, Any], before: AdapterRecord, out: Path, state: Mapping[str, Any]) -> None:
    """UserError where a checkpoint was trained on other examples, under another template or from other weights."""
    if before.training.examples_sha256 != record["training"]["examples_sha256"]:
        raise UserError(f"{out} holds a run on other training data; give another folder")
    if before.template not in (None, record["template"]):
        raise UserError(
            f"{out} holds a run under another chat template, or under one that printed another day; give its day as "
            "today (--today), or give another folder"
        )
    if not is_fingerprint_of(before.base_fingerprint, state):
        raise UserError(f"{out} holds a run from other weights of {record['base']!r}; give another folder")


def clear_staging(staging: Path) -> None:
    """Removes what training writes on its way, by name and place; anything else in the folder stays, and so does it."""
    for folder in staging.glob("*"):
        if _STAGED.fullmatch(folder.name) and not folder.is_symlink():
            for path in folder.glob("*"):
                if path.name.removesuffix(".part") in STAGED_FILES and path.is_file() and not path.is_symlink():
                    path.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
    with contextlib.suppress(OSError):
        staging.rmdir()


def save_adapter(model: Any, record: dict[str, Any], part: Path, target: Path) -> None:
    """The adapter in float16, half the size of the trained one, whole or not at all."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    part.mkdir(parents=True)
    state = get_peft_model_state_dict(model)
    halves = {name: tensor.detach().cpu().to(torch.float16).contiguous() for name, tensor in state.items()}
    save_file(halves, part / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = record["base"]
    lora.inference_mode = True
    lora.save_pretrained(str(part))
    write_record(part, record)
    os.replace(part, target)
