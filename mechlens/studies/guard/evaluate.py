"""`mechlens guard eval`: a guard tested on prompts from other sources, beside baselines."""

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard_model import GuardModelAnswer, ask_guard_model
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.load import load, short_name
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.artifacts import load as load_artifact
from mechlens.runs.artifacts import sha256
from mechlens.runs.prompt_table import read_prompts
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.guard.config import GuardEval
from mechlens.studies.guard.evaluation import (
    EvaluationPlan,
    EvaluationPrompts,
    GuardEvaluation,
    evaluate_guard,
    examine,
)
from mechlens.studies.guard.fitting import other_rules, read_positions
from mechlens.studies.shared.inputs import data_inputs, require_sampling
from mechlens.studies.shared.model import chosen_model, prepared
from mechlens.studies.shared.sources import load_source, read_sources
from mechlens.studies.shared.training_data import text_sha256


@dataclass(frozen=True)
class GuardTest:
    """A guard, the model that it reads, and the prompts that both were fitted and are tested on."""

    model: LanguageModel
    template: ChatTemplate
    guard: FittedGuard
    train: tuple[Prompt, ...]
    examined: EvaluationPrompts
    punctuation: str = "prompts are asked as their sources write them"


def prepare(config: GuardEval) -> Preparation[GuardTest]:
    """Guard, prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    path = user_path(config.guard)
    guard = load_artifact(path, FittedGuard)
    train = _training_prompts(guard, path.parent)
    folder = None if config.folder is None else user_path(config.folder)
    found = [load_source(source, folder, config.seed, config.n) for source in read_sources(config.sources)]
    data = data_inputs({f"source {one.source.name}": (one.source.data, one.prompts) for one in found})
    chosen = chosen_model(config)
    checkpoint = loaded(chosen.model).checkpoint
    # Before an hour of answers rather than after it.
    guard.require(checkpoint, chosen.template.fingerprint, other_weights=config.other_weights)
    examined = examine(found, guard, [checkpoint, guard.checkpoint])
    inputs = chosen.inputs(data | {"guard": sha256(path)})
    return prepared(GuardTest(*chosen, guard, train, examined), chosen.model, inputs, examined.prompts)


def execute(config: GuardEval, given: GuardTest, writer: RunWriter) -> GuardEvaluation:
    """Tests the guard beside baselines, other rules and guard models."""
    plan = EvaluationPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
        judge=config.judge,
        other_weights=config.other_weights,
    )
    batch = tokenize(given.train, given.template)
    acts = collect(given.model, batch, positions=read_positions(given.guard.settings), cache=writer.cache)
    opinions = {
        short_name(name): _opinion(name, given.examined.prompts, config, writer.cache) for name in config.guard_models
    }
    return evaluate_guard(
        given.model,
        given.guard,
        other_rules(acts, given.guard.settings),
        given.train,
        given.examined,
        plan,
        opinions=opinions,
        template=given.template,
        cache=writer.cache,
    )


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


def _opinion(name: str, prompts: Sequence[Prompt], config: GuardEval, cache: Cache) -> list[GuardModelAnswer]:
    model = load(name, dtype=config.dtype, device=config.device, device_map=config.device_map)
    said = ask_guard_model(model, prompts, cache)
    unread = sum(one.harmful is None for one in said)
    if unread > len(said) / 2:
        warnings.warn(
            f"{name}: {unread} of {len(said)} answers are neither safe nor unsafe; is it a guard model?", stacklevel=2
        )
    del model
    gc.collect()  # two large models at once may not fit
    return said
