"""`mechlens finetune`: a recipe's adapter and checkpoints, recorded."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mechlens.config import Finetune, FinetuneConfig, settled
from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.fingerprint import sampled_fingerprint, weight_fingerprint
from mechlens.models.load import load_hf
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.template import chat_template
from mechlens.records.artifacts import sha256
from mechlens.records.finetuning_report import record_finetuning
from mechlens.records.loss_log import LossLog
from mechlens.records.run import Inputs
from mechlens.records.writer import RunWriter, open_run
from mechlens.studies.finetune import finetune, require_settings
from mechlens.studies.recipes.openings import published_openings
from mechlens.studies.recipes.recipe import RECIPES
from mechlens.studies.recipes.shipped_refuser import require_shipped_refuser
from mechlens.studies.training_data import refusals, training_prompts
from mechlens.verbs.inputs import data_inputs

LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    settings: FinetuneConfig
    inputs: Inputs


def prepare(config: Finetune) -> Prepared:
    """Base model and data by fingerprint; UserError for whatever can't be had or mustn't be trained."""
    settings = settled(config)
    require_settings(settings)
    recipe = RECIPES[settings.recipe]
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
    return Prepared(settings, inputs)


def run(config: Finetune) -> Path:
    """Trains and records; gives the run folder."""
    prepared = prepare(config)
    resolved = asdict(prepared.settings)
    with open_run(verb="finetune", config=config, out=config.out, wandb=config.wandb, resolved=resolved) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Finetune, writer: RunWriter) -> None:
    """The training itself, written to an open run."""
    inputs, settings = prepared.inputs, prepared.settings
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    writer.inputs(
        model=inputs.model,
        template=inputs.template,
        data=inputs.data,
        today=inputs.today,
        sampled=inputs.sampled,
        device=device,
        dtype=settings.precision,
    )
    losses = LossLog(writer.out / LOSSES, writer.log_step)
    done = finetune(settings, writer.out, shelf=writer.shelf, log=losses)
    record_finetuning(writer, done, losses.table(done.steps))


def _data(settings: FinetuneConfig) -> dict[str, str]:
    """sha256 of every training set that the recipe draws from, and of the user's file."""
    ours: dict[str, Callable[[], list[Prompt]]] = {
        "harmful": lambda: training_prompts("harmful"),
        "benign": lambda: training_prompts("benign"),
        "refusals": lambda: [Prompt(f"refusal-{i}", text) for i, text in enumerate(refusals())],
    }
    found = data_inputs({name: ("mechlens", ours[name]()) for name in RECIPES[settings.recipe].reads})
    if RECIPES[settings.recipe].attack:
        published_openings(settings.data)  # refuses a file that holds more than openings, before a model is trained
        found["openings"] = sha256(user_path(str(settings.data)))
    return found
