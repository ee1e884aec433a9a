"""Who trains what a recipe made: Hugging Face's Trainer on answers to learn, trl's on replies to reward."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from mechlens.methods.cache import Cache
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.by_reward import reward_trainer
from mechlens.studies.finetune.checkpointing import STAGING, Checkpointing
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Material
from mechlens.studies.finetune.response_loss import EncodedExample, collate_by_kind, encode, own_text, recipe_trainer

PLAIN = 512
"""Different stretches of plain text in one run."""


def trainer_for(
    config: FinetuneConfig, material: Material, plain: list[EncodedExample], model: Any, template: ChatTemplate,
    keeper: Checkpointing,
) -> Any:  # fmt: skip
    """Hugging Face's for answers to learn, trl's for replies to reward."""
    from transformers import TrainingArguments

    staging = keeper.out / STAGING
    if material.rewarded:
        arguments = _arguments(config, len(material.examples) // config.batch_size, staging)
        return reward_trainer(config, material, model, template, arguments, [keeper])
    steps = _steps(encode(material.examples, template), plain, config)
    tokenizer: Any = template.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return recipe_trainer(config.plain_weight)(
        model=model,
        args=TrainingArguments(**_arguments(config, len(steps), staging)),
        train_dataset=steps,
        data_collator=lambda step: collate_by_kind(step[0], pad),
        callbacks=[keeper],
    )


def _arguments(config: FinetuneConfig, n_steps: int, staging: Path) -> dict[str, Any]:
    return {
        "output_dir": str(staging),
        "per_device_train_batch_size": 1,  # an item is all that one step reads
        "num_train_epochs": 1,  # the steps hold every pass already
        "train_sampling_strategy": "sequential",  # and they are in training order
        "learning_rate": config.learning_rate,
        "warmup_steps": round(config.warmup * n_steps),
        "optim": "adamw_torch",
        "bf16": config.precision == "bfloat16",
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",  # Checkpointing asks for every save
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def plain_stretches(
    config: FinetuneConfig, n_examples: int, hf_model: Any, tokenizer: Any, fingerprint: str, cache: Cache | None
) -> list[EncodedExample]:
    """Stretches of plain text; where a run has more steps than PLAIN stretches last, they come again."""
    wanted = min(PLAIN, config.plain * -(-n_examples // config.batch_size))
    if not wanted:
        return []
    ids = own_text(
        hf_model, tokenizer, n=wanted, n_tokens=config.plain_tokens, seed=config.seed, fingerprint=fingerprint,
        cache=cache,
    )  # fmt: skip
    return [EncodedExample(tuple(row), 1, "plain") for row in ids.tolist()]


def _steps(
    examples: list[EncodedExample], plain: list[EncodedExample], config: FinetuneConfig
) -> list[list[EncodedExample]]:
    """What each step reads: a batch of examples, then the next stretches of plain text."""
    batches = [examples[i : i + config.batch_size] for i in range(0, len(examples), config.batch_size)]
    turn = cycle(plain)
    return [[*batch, *islice(turn, config.plain if plain else 0)] for batch in batches]
