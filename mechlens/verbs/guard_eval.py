"""`mechlens guard eval`: a guard tested on prompts from other sources, beside baselines, recorded."""

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechlens.config import GuardEval
from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.collect import collect
from mechlens.methods.fitted_guard import FittedGuard
from mechlens.methods.guard_model import GuardModelAnswer, ask_guard_model
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel, d_model, loaded
from mechlens.models.load import load, short_name
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.template import ChatTemplate
from mechlens.records.artifacts import load as load_artifact
from mechlens.records.artifacts import sha256
from mechlens.records.guard_report import record_guard
from mechlens.records.prompt_table import read_prompts
from mechlens.records.run import Inputs
from mechlens.records.writer import RunWriter, open_run
from mechlens.studies.guard_evaluation import EvaluationPlan, Examined, evaluate_guard, examine
from mechlens.studies.guard_fit import other_rules, read_positions
from mechlens.studies.sources import load_source, read_sources
from mechlens.studies.training_data import text_sha256
from mechlens.verbs.inputs import data_inputs, require_sampling
from mechlens.verbs.model import chosen_model, record_inputs


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    guard: FittedGuard
    train: tuple[Prompt, ...]
    examined: Examined
    inputs: Inputs


def prepare(config: GuardEval) -> Prepared:
    """Guard, prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    path = user_path(config.guard)
    guard = load_artifact(path, FittedGuard)
    train = _training_prompts(guard, path.parent)
    folder = None if config.folder is None else user_path(config.folder)
    found = [load_source(source, folder, config.seed, config.n) for source in read_sources(config.sources)]
    data = data_inputs({f"source {one.source.name}": (one.source.data, one.prompts) for one in found})
    model, template, inputs = chosen_model(config, data | {"guard": sha256(path)})
    checkpoint = loaded(model).checkpoint
    # Before an hour of answers rather than after it.
    guard.require(checkpoint, template.fingerprint, d_model(model), other_weights=config.other_weights)
    examined = examine(found, guard, [checkpoint, guard.checkpoint])
    return Prepared(model, template, guard, train, examined, inputs)


def run(config: GuardEval) -> Path:
    """Tests and records; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="guard_eval", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: GuardEval, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    writer.prompts(prepared.examined.prompts)
    plan = EvaluationPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
        other_weights=config.other_weights,
    )
    batch = tokenize(prepared.train, prepared.template)
    acts = collect(prepared.model, batch, positions=read_positions(prepared.guard.settings), shelf=writer.shelf)
    opinions = {
        short_name(name): _opinion(name, prepared.examined.prompts, config, writer.shelf)
        for name in config.guard_models
    }
    result = evaluate_guard(
        prepared.model,
        prepared.guard,
        other_rules(acts, prepared.guard.settings),
        prepared.train,
        prepared.examined,
        plan,
        opinions=opinions,
        template=prepared.template,
        shelf=writer.shelf,
    )
    record_guard(writer, result, prepared.model, prepared.template, "prompts are asked as their sources write them")


def _training_prompts(guard: FittedGuard, folder: Path) -> tuple[Prompt, ...]:
    """What the guard was fitted on, kept beside it by `guard fit`: the baselines are fitted on the same."""
    prompts = tuple(read_prompts(folder))
    known = set(guard.train_sha256)
    if {text_sha256(prompt.text) for prompt in prompts} != known:
        raise UserError(
            f"the prompts kept in {folder} are not those that the guard was fitted on; give the guard.safetensors in "
            "the run folder that `mechlens guard fit` made"
        )
    return prompts


def _opinion(name: str, prompts: Sequence[Prompt], config: GuardEval, shelf: Shelf) -> list[GuardModelAnswer]:
    model = load(name, dtype=config.dtype, device=config.device, device_map=config.device_map)
    said = ask_guard_model(model, prompts, shelf)
    unread = sum(one.harmful is None for one in said)
    if unread > len(said) / 2:
        warnings.warn(
            f"{name}: {unread} of {len(said)} answers are neither safe nor unsafe; is it a guard model?", stacklevel=2
        )
    del model
    gc.collect()  # two large models at once may not fit
    return said
