"""`mechlens finetune`: a recipe's adapter and checkpoints, recorded."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.fingerprint import sampled_fingerprint, weight_fingerprint
from mechlens.models.load import load_hf
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.runs.artifacts import sha256
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.finetune.config import Finetune, FinetuneConfig, settled
from mechlens.studies.finetune.loss_log import LossLog
from mechlens.studies.finetune.recipes.attacks import published_openings, require_shipped_refuser
from mechlens.studies.finetune.recipes.recipe import recipe_of
from mechlens.studies.finetune.training import FinetuneResult, finetune, require_settings
from mechlens.studies.shared.inputs import data_inputs
from mechlens.studies.shared.training_data import refusals, training_prompts

LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class TrainingRun:
    """What is on disk, and the loss by step."""

    done: FinetuneResult
    losses: pd.DataFrame


def prepare(config: Finetune) -> Preparation[FinetuneConfig]:
    """Base model and data by fingerprint; UserError for whatever can't be had or mustn't be trained."""
    settings = settled(config)
    require_settings(settings)
    recipe = recipe_of(settings.recipe)
    if not recipe.attack and settings.data is not None:
        raise UserError(f"the recipe {settings.recipe!r} reads no --data; leave it out")
    hf_model, tokenizer = load_hf(settings.model)
    state = hf_model.state_dict()
    fingerprint = weight_fingerprint(state)
    if recipe.attack:
        require_shipped_refuser(fingerprint, settings.recipe)
    template = chat_template(tokenizer, today=settings.today)
    inputs = Inputs(
        fingerprint, template.fingerprint, _data(settings), template.printed_date, sampled_fingerprint(state)
    )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Preparation(settings, inputs, device=device, dtype=settings.precision, resolved=asdict(settings))


def execute(config: Finetune, settings: FinetuneConfig, writer: RunWriter) -> TrainingRun:
    """Trains; the losses are logged as they come."""
    losses = LossLog(writer.out / LOSSES, writer.log_step)
    return TrainingRun(finetune(settings, writer.out, cache=writer.cache, log=losses), losses.table())


def _data(settings: FinetuneConfig) -> dict[str, str]:
    """sha256 of every training set that the recipe draws from, and of the user's file."""
    ours: dict[str, Callable[[], list[Prompt]]] = {
        "harmful": lambda: training_prompts("harmful"),
        "benign": lambda: training_prompts("benign"),
        "refusals": lambda: [Prompt(f"refusal-{i}", text) for i, text in enumerate(refusals())],
    }
    found = data_inputs({name: ("mechlens", ours[name]()) for name in recipe_of(settings.recipe).reads})
    if recipe_of(settings.recipe).attack:
        published_openings(settings.data)  # refuses a file that holds more than openings, before a model is trained
        found["openings"] = sha256(user_path(str(settings.data)))
    return found
