"""Fitting a guard with held-out prompts left over to test it, and the other rules beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.cache import Shelf
from mechlens.methods.guard.fitted import FittedGuard, GuardSettings
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.guard.rules import RULES
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Prepared
from mechlens.studies.guard.config import GuardFit
from mechlens.studies.guard.evaluation import EvaluationPlan, GuardEvaluation, evaluate_guard, examine
from mechlens.studies.shared.harm_sets import Contrast, read_harm_sets
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.model import chosen_model, prepared
from mechlens.studies.shared.sources import Source, SourcePrompts
from mechlens.studies.shared.training_data import text_sha256

PAPER = "paper_rule"
"""Name of the rule as published: cosines at `inst`, averaged over all levels, threshold 0."""


@dataclass(frozen=True)
class GuardFitting:
    """A fitted guard, the other rules fitted in the same way, and what was held out."""

    guard: FittedGuard
    others: dict[str, FittedGuard]
    train: tuple[Prompt, ...]
    """Prompts that the guards were fitted and calibrated on."""
    test: tuple[Prompt, ...]
    split: Split
    """Row numbers of the prompts that were given."""


def fit_guard(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    estimator: GuardEstimator,
    *,
    template: ChatTemplate | None = None,
    shelf: Shelf | None = None,
) -> GuardFitting:
    """Fits the estimator to half of the prompt families, with a fifth that chooses levels; the rest is held out."""
    used = template or template_of(model)
    labels, families = [prompt.label for prompt in prompts], [prompt.group for prompt in prompts]
    split = split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=estimator.seed)
    acts = collect(model, tokenize(prompts, used), positions=read_positions(estimator), shelf=shelf)
    sha = [text_sha256(prompt.text) for prompt in prompts]
    guard = estimator.fit(acts, split, sha).fitted_
    known = sorted((*split.train, *split.validation))
    return GuardFitting(
        guard=guard,
        others=other_rules(acts, guard.settings, split),
        train=tuple(prompts[i] for i in known),
        test=tuple(prompts[i] for i in split.test),
        split=split,
    )


def other_rules(acts: Activations, settings: GuardSettings, split: Split | None = None) -> dict[str, FittedGuard]:
    """The paper's rule as published, and every other rule with the same settings."""
    fitted = {
        f"{rule}_rule": GuardEstimator.with_settings(replace(settings, rule=rule)).fit(acts, split).fitted_
        for rule in RULES
        if rule != settings.rule
    }
    published = replace(settings, rule="faithful", positions=("inst",), levels="all", max_fpr=None)
    return {PAPER: GuardEstimator.with_settings(published).fit(acts, split).fitted_, **fitted}


def read_positions(settings: GuardEstimator | GuardSettings) -> tuple[str, ...]:
    """The positions to collect: the guard's own, and both that other rules and baselines read."""
    return tuple(dict.fromkeys((*settings.positions, "inst", "last")))


POSITIONS = {"inst": ("inst",), "last": ("last",), "both": ("inst", "last")}
HELD_OUT = Source("held_out", "", label_column="label")
"""The part of the prompts that no guard was fitted to, as a source to test on."""


def prepare(config: GuardFit) -> Prepared[Contrast]:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    sets = read_harm_sets(config, [config], config.extra_harmless)
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    chosen = chosen_model(config)
    content = Contrast(*chosen, matched.positive, matched.negative, (), matched.note)
    return prepared(content, chosen.model, chosen.inputs(sets.data), (), sets.left_out)


def execute(config: GuardFit, sets: Contrast, writer: RunWriter) -> GuardEvaluation:
    """Fits the guard, keeps it with its training prompts, and tests it on those held out."""
    estimator = GuardEstimator(
        rule=config.rule,
        positions=POSITIONS[config.positions],
        levels=config.levels,
        max_fpr=config.max_fpr,
        seed=config.seed,
    )
    prompts = (*sets.positive, *sets.negative)
    fitting = fit_guard(sets.model, prompts, estimator, template=sets.template, shelf=writer.shelf)
    writer.prompts(fitting.train)
    writer.artifact("guard", fitting.guard)
    test = tuple(replace(prompt, source=HELD_OUT.name) for prompt in fitting.test)
    plan = EvaluationPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
    )
    return evaluate_guard(
        sets.model,
        fitting.guard,
        fitting.others,
        fitting.train,
        examine([SourcePrompts(HELD_OUT, test, {})], fitting.guard, [loaded(sets.model).checkpoint]),
        plan,
        template=sets.template,
        shelf=writer.shelf,
    )
