"""`mechlens guard fit`: a Latent Guard from labelled prompts, with its evidence."""

from dataclasses import replace

from mechlens.methods.guard.guard import GuardEstimator
from mechlens.models.bridge import loaded
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.guard.config import GuardFit
from mechlens.studies.guard.evaluation import EvaluationPlan, GuardEvaluation, evaluate_guard, examine
from mechlens.studies.guard.fitting import fit_guard
from mechlens.studies.shared.harm_sets import ContrastSets, read_harm_sets
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.model import chosen_model, prepared
from mechlens.studies.shared.sources import Source, SourcePrompts

POSITIONS = {"inst": ("inst",), "last": ("last",), "both": ("inst", "last")}
HELD_OUT = Source("held_out", "", label_column="label")
"""The part of the prompts that no guard was fitted to, as a source to test on."""


def prepare(config: GuardFit) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    sets = read_harm_sets(config, [config], config.extra_harmless)
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    chosen = chosen_model(config)
    content = ContrastSets(*chosen, matched.positive, matched.negative, (), matched.note)
    return prepared(content, chosen.model, chosen.inputs(sets.data), (), sets.left_out)


def execute(config: GuardFit, sets: ContrastSets, writer: RunWriter) -> GuardEvaluation:
    """Fits the guard, keeps it with its training prompts, and tests it on those held out."""
    estimator = GuardEstimator(
        rule=config.rule,
        positions=POSITIONS[config.positions],
        levels=config.levels,
        max_fpr=config.max_fpr,
        seed=config.seed,
    )
    prompts = (*sets.positive, *sets.negative)
    fitting = fit_guard(sets.model, prompts, estimator, template=sets.template, cache=writer.cache)
    writer.prompts(fitting.train)
    writer.artifact("guard", fitting.guard)
    test = tuple(replace(prompt, source=HELD_OUT.name) for prompt in fitting.test)
    plan = EvaluationPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
        judge=config.judge,
    )
    return evaluate_guard(
        sets.model,
        fitting.guard,
        fitting.others,
        fitting.train,
        examine([SourcePrompts(HELD_OUT, test, {})], fitting.guard, [loaded(sets.model).checkpoint]),
        plan,
        template=sets.template,
        cache=writer.cache,
    )
