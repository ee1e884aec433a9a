"""`mechlens guard fit`: a Latent Guard from labelled prompts, with its evidence, recorded."""

from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.methods.guard.guard import GuardEstimator
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.guard.config import GuardFit
from mechlens.studies.guard.evaluation import EvaluationPlan, evaluate_guard, examine
from mechlens.studies.guard.fit import fit_guard
from mechlens.studies.guard.report import record_guard
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.model import chosen_model, record_inputs
from mechlens.studies.shared.sources import Source, SourcePrompts
from mechlens.studies.shared.training_data import LeftOut, record_left_out

POSITIONS = {"inst": ("inst",), "last": ("last",), "both": ("inst", "last")}
HELD_OUT = Source("held_out", "", label_column="label")
"""The part of the prompts that no guard was fitted to, as a source to test on."""


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    prompts: tuple[Prompt, ...]
    punctuation: str
    left_out: LeftOut
    inputs: Inputs


def prepare(config: GuardFit) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    sets = read_harm_sets(config, [config], config.extra_harmless)
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    model, template, inputs = chosen_model(config, sets.data)
    return Prepared(model, template, (*matched.positive, *matched.negative), matched.note, sets.left_out, inputs)


def run(config: GuardFit) -> Path:
    """Fits, tests on held-out prompts and records; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="guard_fit", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: GuardFit, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    estimator = GuardEstimator(
        rule=config.rule,
        positions=POSITIONS[config.positions],
        levels=config.levels,
        max_fpr=config.max_fpr,
        seed=config.seed,
    )
    fitting = fit_guard(prepared.model, prepared.prompts, estimator, template=prepared.template, shelf=writer.shelf)
    writer.prompts(fitting.train)
    sources = {**writer.run.inputs.data, "model": writer.run.inputs.model or ""}
    writer.artifact("guard", fitting.guard, inputs=sources)
    test = tuple(replace(prompt, source=HELD_OUT.name) for prompt in fitting.test)
    plan = EvaluationPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
    )
    result = evaluate_guard(
        prepared.model,
        fitting.guard,
        fitting.others,
        fitting.train,
        examine([SourcePrompts(HELD_OUT, test, {})], fitting.guard, [loaded(prepared.model).checkpoint]),
        plan,
        template=prepared.template,
        shelf=writer.shelf,
    )
    record_guard(writer, result, prepared.model, prepared.template, prepared.punctuation)
