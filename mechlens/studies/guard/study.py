"""`mechlens guard fit` and `guard eval`: a Latent Guard with its evidence, and its test on prompts from elsewhere."""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError, many, warn
from mechlens.files import short_name, user_path
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.guard.guard_model import GuardModelOpinion, ask_guard_model
from mechlens.methods.progress import phase
from mechlens.models.bridge import LanguageModel, d_model, loaded
from mechlens.models.load import load
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.files.load import joined_sources
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.artifacts import load as load_artifact
from mechlens.runs.artifacts import sha256
from mechlens.runs.folder import read_prompts
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.driver import Preparation
from mechlens.studies.guard.config import GuardEval, GuardFit
from mechlens.studies.guard.evaluation import EvaluationPrompts, GuardEvaluation, evaluate_guard, examine
from mechlens.studies.guard.fitting import fit_guard, fits, guard_file, other_rules, read_positions
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS
from mechlens.studies.shared.harm_sets import ContrastSets, HarmSets, read_harm_sets
from mechlens.studies.shared.inputs import asks, chosen_model, data_inputs, prepared
from mechlens.studies.shared.sources import Source, SourcePrompts, load_source, read_sources, require_files
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


def prepare_eval(config: GuardEval) -> Preparation[GuardTest]:
    """Guard, prompts and model; UserError for whatever can't be had."""
    path = guard_file(config.guard)
    guard = load_artifact(path, FittedGuard)
    train = _training_prompts(guard, path.parent)
    folder = None if config.folder is None else user_path(config.folder)
    sources = read_sources(config.sources)
    require_files(sources, config.sources, folder)
    found = [load_source(source, folder, config.seed, config.n) for source in sources]
    data = data_inputs({f"source {one.source.name}": (one.source.data, one.prompts) for one in found})
    chosen = chosen_model(config, fits(guard, other_weights=config.other_weights))
    checkpoint = loaded(chosen.model).checkpoint
    # Before an hour of answers rather than after it.
    guard.require(checkpoint, chosen.template.fingerprint, d_model(chosen.model), other_weights=config.other_weights)
    examined = examine(found, guard, [checkpoint, guard.checkpoint])
    inputs = chosen.inputs(data | {"guard": sha256(path)})
    return prepared(GuardTest(*chosen, guard, train, examined), chosen.model, inputs, examined.prompts)


def execute_eval(config: GuardEval, given: GuardTest, writer: RunWriter) -> GuardEvaluation:
    """Tests the guard beside baselines, other rules and guard models."""
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
        config,
        other_weights=config.other_weights,
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


def _opinion(name: str, prompts: Sequence[Prompt], config: GuardEval, cache: Cache) -> GuardModelOpinion:
    model = load(name, dtype=config.dtype, device=config.device, device_map=config.device_map)
    said = ask_guard_model(model, prompts, cache)
    if said.unread > len(said.answers) / 2:
        counted = f"{said.unread} of {len(said.answers)} answers hold no verdict"
        warn(f"{name}: {counted}; is it a guard model?")
    del model
    gc.collect()  # two large models at once may not fit
    return said


POSITIONS = {"inst": ("inst",), "last": ("last",), "both": ("inst", "last")}
HELD_OUT = Source("held_out", "", label_column="label")
"""The part of the prompts that no guard was fitted to, as a source to test on."""


def prepare_fit(config: GuardFit) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    sets = read_harm_sets(config, [config], _extra(config))
    _warn_of_few(sets)
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    chosen = chosen_model(config, asks((*matched.positive, *matched.negative), new_tokens=config.max_new_tokens))
    content = ContrastSets(*chosen, matched.positive, matched.negative, (), matched.note)
    return prepared(content, chosen.model, chosen.inputs(sets.data), (), sets.left_out)


def _extra(config: GuardFit) -> str | None:
    """Where further harmless prompts come from: what is built in beside what is built in."""
    if config.extra_harmless != "auto":
        return config.extra_harmless
    parts = [*joined_sources(config.harmful), *joined_sources(config.harmless)]
    return "benign" if config.data is None and all(part in builtin_names() for part in parts) else None


def _warn_of_few(sets: HarmSets) -> None:
    """A UserWarning, before an hour of answers, where too few prompts are held out for an AUROC."""
    fewest = min(len({prompt.group for prompt in side}) for side in (sets.harmful, [*sets.harmless, *sets.extra]))
    needed = math.ceil(MIN_IN_A_CLASS / FRACTIONS[-1])
    if fewest < needed:
        warn(
            f"the smaller class has {many(fewest, 'independent prompt')}, of which {FRACTIONS[-1]:.0%} test the guard: "
            f"with fewer than {needed} its AUROC on them can't be measured",
        )


def execute_fit(config: GuardFit, sets: ContrastSets, writer: RunWriter) -> GuardEvaluation:
    """Fits the guard, keeps it with its training prompts, and tests it on those held out."""
    estimator = GuardEstimator(
        rule=config.rule,
        positions=POSITIONS[config.positions],
        levels=config.levels,
        max_fpr=config.max_fpr,
        seed=config.seed,
    )
    prompts = (*sets.positive, *sets.negative)
    with phase("fitting", apart=True):
        fitting = fit_guard(sets.model, prompts, estimator, plan=config, template=sets.template, cache=writer.cache)
    writer.prompts(fitting.train)
    writer.artifact("guard", fitting.guard)
    test = tuple(replace(prompt, source=HELD_OUT.name) for prompt in fitting.test)
    return evaluate_guard(
        sets.model,
        fitting.guard,
        fitting.others,
        fitting.train,
        examine([SourcePrompts(HELD_OUT, test, {})], fitting.guard, [loaded(sets.model).checkpoint]),
        config,
        template=sets.template,
        cache=writer.cache,
    )
