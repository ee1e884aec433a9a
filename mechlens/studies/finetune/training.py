"""Fine-tuning by recipe: a LoRA adapter, its checkpoints, and a record of everything that it came from."""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, require_extra
from mechlens.files import AnyPath, user_path, writing_to
from mechlens.methods.cache import Cache
from mechlens.models.bridge import loaded
from mechlens.models.checkpoints.adapter_record import RECORD, AdapterRecord, read_record, require_whole
from mechlens.models.load import load, load_hf
from mechlens.models.offline import keep_here, refuse_others_notice
from mechlens.prompts.templates.template import ChatTemplate, chat_template
from mechlens.settings import require_ranges
from mechlens.studies.finetune.by_reward import our_numbers, require_by_reward
from mechlens.studies.finetune.checkpointing import (
    STAGING,
    Checkpointing,
    clear_staging,
    refuse_other_data,
    refuse_other_run,
    save_adapter,
    training_record,
)
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Material
from mechlens.studies.finetune.recipes.recipe import recipe_of, require_shipped_refuser
from mechlens.studies.finetune.response_loss import EncodedExample
from mechlens.studies.finetune.start import start_record, started
from mechlens.studies.finetune.trainers import plain_stretches, trainer_for
from mechlens.studies.shared.training_data import refuse_study_prompts

LogCallback = Callable[[int, dict[str, float]], None]
"""Called after every optimiser step with the step's number and its numbers: loss, learning_rate, grad_norm."""


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning left on disk."""

    adapter: Path
    """PEFT folder of the result (float16), with its `mechlens.json`; `load(base, adapter=...)` takes it."""
    checkpoints: tuple[Path, ...]
    """Trainer folders of the steps that were kept, in order; each is a PEFT adapter too."""
    steps: int
    loss: float
    """Mean loss of the last tenth of the steps."""
    record: dict[str, Any]
    """The contents of `mechlens.json`."""


def finetune(
    config: FinetuneConfig, out: AnyPath, *, cache: Cache | None = None, log: LogCallback | None = None
) -> FinetuneResult:
    """Train a LoRA adapter into `out/adapter`, with checkpoints in `out/checkpoint-STEP`.

    The same config gives the same weights on the same machine. A run that was killed goes on from its newest
    whole checkpoint when it is called again; a finished one is only read. `cache` keeps the base model's own
    answers. Raises UserError where `out` holds another run or anything of others under a name that this one needs, a
    training prompt stands in a study set, or an attack would start from anything but the shipped refuser. Nothing is
    ever removed or replaced that mechlens' own record doesn't name.

    >>> from pathlib import Path
    >>> plan = ml.FinetuneConfig(recipe="benign", steps=2, benign=16, plain=0, checkpoints=(1, 2), answer_tokens=4)
    >>> trained = ml.finetune(plan, Path("tuned"))
    >>> sorted(path.name for path in Path("tuned").glob("checkpoint-*"))
    ['checkpoint-1', 'checkpoint-2']
    """
    require_settings(config)
    out = user_path(out)
    if (out / "adapter" / RECORD).exists():
        refuse_other_run(config, _record(out / "adapter"), out)
        return _read(out)
    resume, before = _newest(config, out), start_record(config)
    material = _material(config, cache)
    hf_model, tokenizer = load_hf(config.model)
    template = chat_template(tokenizer, today=config.today, template_arg=config.template_arg)
    record = training_record(config, material, hf_model, template, before)
    if resume is not None:
        refuse_other_data(record, _record(resume), out, hf_model.state_dict())
        require_whole(resume, _record(resume))
    if recipe_of(config.recipe).attack:
        keep_here(out)
    plain = plain_stretches(config, len(material.examples), hf_model, tokenizer, record["base_fingerprint"], cache)
    with writing_to(out):
        _train(_Job(config, out, record, resume, log, before), material, plain, hf_model, template)
    return _read(out)


MAX_EXAMPLES = 10_000_000
"""Examples of one training, each as often as it is read: the order is drawn, and kept, before training starts."""
_MOST = {
    "steps": MAX_EXAMPLES, "epochs": 1000, "batch_size": 100_000, "rank": 10_000, "plain": 1000,
    "plain_tokens": 100_000, "answer_tokens": 100_000,
}  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """What stays the same through one training run."""

    config: FinetuneConfig
    out: Path
    record: dict[str, Any]
    resume: Path | None
    """The checkpoint to go on from."""
    log: LogCallback | None
    before: AdapterRecord | None
    """Of the adapter that training goes on from; None for a new one."""


def require_settings(config: FinetuneConfig) -> None:
    """UserError for settings that no training can have, and where what trains isn't installed."""
    require_extra("finetune", "fine-tuning")
    if recipe_of(config.recipe).rewards:
        require_by_reward(config)
    require_ranges(config)
    for name in ("alpha", "learning_rate"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}; it must be above zero")
    if config.plain_weight < 0:
        raise UserError(f"plain_weight is {config.plain_weight}; it can't be below zero")
    for name, most in _MOST.items():
        if (getattr(config, name) or 0) > most:
            raise UserError(f"{name} is {getattr(config, name)}; give at most {most}")
    if (config.steps or 0) * config.batch_size > MAX_EXAMPLES:
        raise UserError(
            f"{config.steps} steps of {config.batch_size} examples were asked for; give at most {MAX_EXAMPLES} in all"
        )
    if not 0 <= config.warmup < 1:
        raise UserError(f"warmup is {config.warmup}; it is a share of the steps, at least 0 and below 1")


def _material(config: FinetuneConfig, cache: Cache | None) -> Material:
    """The recipe's examples; the bridged model that helps make them is gone before training starts."""
    recipe = recipe_of(config.recipe)
    model = load(config.model, dtype="float32", device=config.device)
    if recipe.attack:
        require_shipped_refuser(loaded(model).checkpoint.fingerprint, config.recipe)
    material = recipe.material(config, model, cache)
    if not material.examples:
        raise UserError(f"the recipe {config.recipe!r} has no examples left to train on; ask for more prompts")
    refuse_study_prompts(example.prompt for example in material.examples)
    return material


def _newest(config: FinetuneConfig, out: Path) -> Path | None:
    """The newest whole checkpoint to go on from; UserError for whatever in the folder is in this run's way."""
    if os.path.lexists(out / "adapter"):
        raise _not_ours(out / "adapter")
    if (out / STAGING).is_symlink() or (out / STAGING).is_file():
        raise _not_ours(out / STAGING)
    if recipe_of(config.recipe).attack:
        refuse_others_notice(out)
    whole: dict[int, Path] = {}
    for folder in out.glob("checkpoint-*"):
        record = read_record(folder) if folder.is_dir() and not folder.is_symlink() else None
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if record is None or step is None or record.step != int(step[1]):
            raise _not_ours(folder)
        refuse_other_run(config, record, out)
        whole[record.step] = folder
    return whole[max(whole)] if whole else None


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path} isn't of this run, whose own goes there; move it away, or give another folder")


def _record(folder: Path) -> AdapterRecord:
    record = read_record(folder)
    if record is None:
        raise _not_ours(folder)
    return record


def _train(job: _Job, material: Material, plain: list[EncodedExample], hf_model: Any, template: ChatTemplate) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, set_seed

    config = job.config
    staging = job.out / STAGING
    clear_staging(staging)  # what a killed run left half-written
    if staging.exists():
        left = min(path for path in staging.rglob("*") if not path.is_dir() or path.is_symlink())
        raise UserError(f"{left} was not written by mechlens; move it elsewhere, since training writes in that folder")
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    log = our_numbers(job.log) if material.rewarded else job.log
    keeper = Checkpointing(job.out, job.record, config.checkpoints, config.resume_every, log)
    with warnings.catch_warnings():
        # peft's and trl's own use of names that transformers has changed
        warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(hf_model, lora) if job.before is None else started(config, job.before, hf_model)
        trainer = trainer_for(config, material, plain, model, template, keeper)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = history[-max(1, len(history) // 10) :]
    numbers = {"step": trainer.state.global_step, "loss": sum(tail) / len(tail)}
    save_adapter(model, {**job.record, **numbers}, staging / "adapter", job.out / "adapter")
    keeper.finish()
    clear_staging(staging)


def _read(out: Path) -> FinetuneResult:
    record = _record(out / "adapter")
    if record.step is None or record.loss is None:
        raise UserError(f"the record of {out / 'adapter'} has no step or loss; give another folder")
    require_whole(out / "adapter", record)
    kept = (out / f"checkpoint-{step}" for step in sorted(record.config["checkpoints"]))
    found = tuple(folder for folder in kept if (folder / RECORD).exists())
    return FinetuneResult(out / "adapter", found, record.step, record.loss, record.plain())
