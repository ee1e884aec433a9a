"""The direction of any concept: where it can be read, how well, and what part of it is only the surface."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError, kind_of, warn
from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.cache import Cache
from mechlens.methods.directions.methods import MEAN_DIFFERENCE
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.probing.confounds import find_confounds, warn_of_confounds
from mechlens.methods.probing.detect import Detection
from mechlens.methods.progress import phase
from mechlens.methods.steering.steering_test import steering_test
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.text import PunctuationMode, match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS, POSITIONS, DetectionPlan, require_ranges
from mechlens.studies.direction.concept import Concept
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.direction.sides import (
    NEGATIVE,
    POSITIVE,
    names_given,
    require_enough,
    require_in_order,
    short_sides,
    twins,
    two_sides,
)
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.contrasts import measure, surface_of
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.inputs import (
    asks,
    chosen_model,
    data_inputs,
    distinct_ids,
    prepared,
    read_prompts,
    refuse_shared,
)
from mechlens.studies.shared.likely_pairs import warn_of_twins
from mechlens.studies.shared.training_data import leave_out_trained

SPLITS = 20
"""Halvings behind a reliability."""
PLAN = "ml.DetectionPlan(seed=1)"


def find_concept(
    model: LanguageModel,
    positive: Prompts,
    negative: Prompts,
    positions: Sequence[str] = POSITIONS,
    plan: DetectionPlan = DetectionPlan(),
    *,
    causal: bool = False,
    paired: bool = False,
    sides: tuple[str, str] | None = None,
    punctuation: PunctuationMode = "match",
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Concept:
    """Directions by the plan's method at every level and named position, with held-out evidence.

    Half of the prompt families train, a fifth chooses the level, the rest is reported. `best` is None, with a
    warning that says what ties, where no direction is more than the words, the token standing there, the length or
    another difference between the sides (`confounds`, which are warned about too); `detection.strongest` and
    `detection.at(position)` are there all the same. `causal` tries what adding directions does (`SteeringTest`),
    and `direction` is then the one that does most beyond random ones. `paired` says that row i of both sides is a
    pair of one topic, and keeps it whole: pairs split over training and test put AUROCs far below 0.5. `sides` are
    their names, which the directions keep in their files: without it labels that all prompts of a side carry, or
    the names of columns. `punctuation` is as in `match_punctuation`, and as at `mechlens direction`: "match" takes
    the last mark off every prompt where it differs between the sides, and `Concept.punctuation` says so. UserError
    where a side has fewer than 15 prompts, or a prompt stands on both.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> concept = ml.find_concept(model, harmful, harmless, plan=ml.DetectionPlan(permutations=20))
    >>> list(concept.table().columns[:3])
    ['level', 'position', 'auroc']
    """
    require_in_order(model, positive, negative)
    if not isinstance(plan, DetectionPlan):
        raise UserError(f"{kind_of(plan)} was given as the plan; give a DetectionPlan, such as {PLAN}")
    METHODS.require(plan.method)
    require_ranges(plan)
    sides = names_given(positive, negative) if sides is None else two_sides(sides)
    found = _found(
        model, positive, negative, positions, plan, causal=causal, paired=paired, sides=sides, punctuation=punctuation,
        template=template, cache=cache,
    )  # fmt: skip
    _warn(found, "`detection.strongest.direction`", "causal=True")
    return found


def _found(
    model: LanguageModel,
    positive: Prompts,
    negative: Prompts,
    positions: Sequence[str],
    plan: DetectionPlan,
    *,
    causal: bool,
    paired: bool,
    sides: tuple[str, str],
    punctuation: PunctuationMode,
    template: TemplateChoice,
    cache: Cache | None,
) -> Concept:
    one, other = (
        as_prompts(given, name=name, label=name) for name, given in ((POSITIVE, positive), (NEGATIVE, negative))
    )
    refuse_shared((f"the {POSITIVE} side", one), (f"the {NEGATIVE} side", other))
    require_enough(one, other)
    matched = match_punctuation(one, other, punctuation)
    if not paired:
        warn_of_twins(matched.positive, matched.negative)
    prompts = [*matched.positive, *(twins(matched.positive, matched.negative) if paired else matched.negative)]
    batch = tokenize(prompts, template_of(model, template))
    acts = collect(model, batch, positions=positions, cache=cache)
    split = split_by_family(acts.labels, acts.families, fractions=FRACTIONS, seed=plan.seed)
    confounds = find_confounds(prompts, torch.tensor([p.label == POSITIVE for p in prompts]), plan.seed)
    warn_of_confounds(confounds, (POSITIVE, NEGATIVE))
    with phase("statistics"):
        surface = surface_of(model, batch)
        measured = measure("concept", acts, acts.labels, (POSITIVE, NEGATIVE), split, surface, plan, confounds)
        if measured.detection is None:
            raise UserError(
                f"some part of the split has fewer than 3 prompts of a side (in all {measured.counts}); add prompts"
            )
        reliability = _reliability(acts.select(split.train), measured.detection)
    shown = tuple(one for one in confounds if one.auroc.measurable and one.auroc.low > 0.5)
    steered = None
    if causal:
        steered = steering_test(model, measured.detection.directions, batch, split, plan, cache=cache)
    measured = replace(measured, detection=measured.detection.called(sides))
    if steered is not None and steered.direction is not None:
        steered = replace(steered, direction=replace(steered.direction, contrast=sides))
    return Concept(measured, reliability, acts, batch, split, plan, shown, matched.note, steered)


FEW_TO_CHOOSE = 10
"""Families of validation prompts below which levels that tie are warned about."""


def _warn(found: Concept, strongest: str, by_steering: str) -> None:
    """A UserWarning where no direction is best or steers, for those who type or those who write Python."""
    if found.best is None:
        usable = "What can be used is the direction that steering chose"
        if found.direction is None:
            further = "" if found.steered is not None else f", or what {by_steering} chooses by steering"
            usable = f"What can be used all the same is the strongest ({strongest}){further}"
        warn(f"there is no best direction. {found.verdict.headline} {usable}")
    top = found.best or found.detection.strongest
    families = len({found.batch.prompts[i].group for i in found.split.validation})
    if (tied := found.detection.tied(top.position)) > 1 and families < FEW_TO_CHOOSE:
        also = f", and so does {by_steering}" if found.steered is None else ""
        warn(
            f"{tied} levels at {top.position} tell the validation prompts apart equally well (AUROC "
            f"{top.validation_auroc:.2f}), which are of {families} families only, so that level {top.level} was chosen "
            f"among them hardly better than by chance; on test prompts its AUROC is {top.auroc.brief}. More families "
            f"would choose better{also}"
        )
    if found.steered is not None and found.steered.direction is None:
        warn(f"there is no direction that steers. {found.steered.sentence}")


def _reliability(train: Activations, found: Detection) -> Float[Tensor, "level position"]:
    """Of every cell's direction; of a method other than the mean difference only at the chosen levels, else NaN."""
    plan = found.plan
    if plan.method == MEAN_DIFFERENCE:
        return split_half(train, POSITIVE, NEGATIVE, SPLITS, plan.seed)
    reliability = torch.full(train.values.shape[1:3], torch.nan, dtype=torch.float64)
    for column, choice in enumerate(found.chosen):
        cell = one_cell(train, choice.level, choice.position)
        value = split_half(cell, POSITIVE, NEGATIVE, SPLITS, plan.seed, plan.method)
        reliability[train.levels.index(choice.level), column] = value[0, 0]
    return reliability


def prepare(config: FindDirection) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    positive, negative = _sides(config)
    (positive, negative), left_out = leave_out_trained([config], {"positive": positive, "negative": negative})
    sets = {"positive": (config.positive, positive), "negative": (config.negative, negative)}
    refuse_shared(sets["positive"], sets["negative"])
    data = data_inputs(sets)
    require_enough(positive, negative)
    matched = match_punctuation(positive, negative, config.punctuation)
    prompts = (*matched.positive, *matched.negative)
    chosen = chosen_model(config, asks(prompts, config.positions))
    content = ContrastSets(*chosen, tuple(positive), tuple(negative), (), matched.note)
    return prepared(content, chosen.model, chosen.inputs(data), prompts, left_out)


def _sides(config: FindDirection) -> tuple[list[Prompt], list[Prompt]]:
    """Both sides; of pairs the same rows are drawn of both, and row i of both is of one family."""
    asked = replace(config, n=None) if config.paired else config
    positive, negative = distinct_ids(
        positive=read_prompts(config.positive, "positive", asked),
        negative=read_prompts(config.negative, "negative", asked),
    )
    if not config.paired:
        return positive, negative
    negative, wanted = twins(positive, negative), len(positive) if config.n is None else config.n
    if wanted > len(positive):
        raise UserError(f"a sample of {wanted} was asked for, but there are {len(positive)} pairs")
    rows = sorted(random.Random(config.seed).sample(range(len(positive)), wanted))
    return [positive[i] for i in rows], [negative[i] for i in rows]


def execute(config: FindDirection, sets: ContrastSets, writer: RunWriter) -> Concept:
    """Finds and tests the direction."""
    found = _found(
        sets.model, sets.positive, sets.negative, config.positions, config, causal=config.causal, paired=False,
        sides=short_sides(config.positive, config.negative), punctuation=config.punctuation, template=sets.template,
        cache=writer.cache,
    )  # fmt: skip
    _warn(found, "strongest.safetensors in the run folder", "--causal, in Python causal=True")
    return found
