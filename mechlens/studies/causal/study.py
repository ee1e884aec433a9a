"""Does the harmfulness direction change what the model believes, and the refusal direction only whether it refuses?

Directions come from training prompts, layers and strengths from validation prompts, and every reported number from
test prompts, beside random directions and null directions from shuffled labels (Zhao et al. 2025, sections 3.3, 3.4).
"""

import contextlib
import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.behaviour.inversion import telling_words
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import one_bar, phase
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.equal_damage import require_kl
from mechlens.methods.steering.interventions import residual_norms
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, loaded, n_layers
from mechlens.models.engine.packed.packing import alike
from mechlens.models.sites import require_everywhere
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.causal.answers import answers_under, belief_table, beliefs_under, losses_under
from mechlens.studies.causal.choice import Choice, Strengths, choose, grid_layers
from mechlens.studies.causal.config import (
    ANSWERING,
    BY_LAYER,
    CALIBRATING,
    CHOOSING,
    COLLECTING,
    HELD_OUT,
    IN_WORDS,
    REPLIES,
    UNSTEERED,
    Causal,
    CausalPlan,
    Grid,
    costs,
)
from mechlens.studies.causal.directions import (
    HARMFULNESS,
    HARMLESS,
    NAMES,
    PUSH,
    ContrastSource,
    Setting,
    class_counts,
    sources,
)
from mechlens.studies.causal.held_out import Effects, effect_table, effects_at
from mechlens.studies.causal.readings import ReadTokens, Setup, Subjects, subjects
from mechlens.studies.causal.sweeps import (
    DepthGap,
    RefusalByLayer,
    RepliesByLayer,
    by_position,
    depth_gap,
    refusal_by_layer,
    replies_by_layer,
)
from mechlens.studies.causal.unsteered import Unsteered, read_unsteered
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import ContrastSets, labelled, prepare_harm_study
from mechlens.studies.shared.quadrants import FirstTokenJudgement, JudgedAnswers, judge_answers, judge_first_token


@dataclass(frozen=True, repr=False)
class Battery:
    """What the battery found, and everything its numbers were made from.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.CausalPlan(
    ...     n_train=16, n_validation=4, n_test=10, n_null=2, shuffled_directions=2, random_directions=2
    ... )
    >>> battery = ml.run_battery(model, harmful, harmless, plan)
    >>> ml.causal_verdict(battery).sentence != ""
    True
    """

    judged: JudgedAnswers
    first_token: FirstTokenJudgement
    split: Split
    tokens: ReadTokens
    unsteered: Unsteered
    refusal_layers: RefusalByLayer
    depth: DepthGap
    reply_layers: RepliesByLayer | None
    """None where belief isn't measurable, or a direction isn't defined."""
    calibration: pd.DataFrame
    """Strengths of equal damage, where they were asked for; see `Strengths.table`."""
    choice: Choice
    directions: dict[str, Direction]
    """Those tested, by name; one that too few prompts define is missing."""
    effects: Effects
    positions: pd.DataFrame
    """Empty unless asked for."""
    beliefs: pd.DataFrame
    """Beliefs in words, of test prompts: direction, operation, label, belief, share, n."""
    answers: pd.DataFrame
    """Whole answers to test prompts before and after, with verdicts."""
    broken: pd.DataFrame
    """What the chosen settings break: direction, operation, measure, value, low, high, n."""
    counts: dict[str, tuple[int, int]]
    """Training prompts of the two classes of each direction."""
    plan: CausalPlan

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json."""
        decides = ("refusal", "consistent.before", "belief.before", "belief.all")
        numbers = {key.name: effect.change for key, effect in self.effects.items() if key.measure in decides}
        for key, effect in self.effects.items():
            if key.measure in decides and effect.random_max == effect.random_max:
                name = f"{key.measure}.random_max.at_{key.at}.{key.cell.label}"
                numbers[name] = Estimate.exact(effect.random_max, self.plan.random_directions)
        gap = {"depth_gap": self.depth.layers, "depth_gap.p": Estimate.exact(self.depth.p, self.depth.layers.n)}
        return {**self.unsteered.numbers, **gap, **numbers}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        tables = {
            "refusals_by_layer": self.refusal_layers.table,
            "calibration": self.calibration,
            "choice": self.choice.table,
            "choice_cells": self.choice.cells,
            "cells": effect_table(self.effects, self.choice.places),
            "by_question": self.unsteered.by_question,
            "beliefs": self.beliefs,
            "steered_answers": self.answers,
            "damage": self.broken,
            "positions": self.positions,
        }
        if self.reply_layers is not None:
            tables["replies_by_layer"] = self.reply_layers.table
        return {name: table for name, table in tables.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """Both directions, where they can be measured."""
        return {f"direction_{name}": direction for name, direction in self.directions.items()}

    def __repr__(self) -> str:
        from mechlens.studies.causal.verdict import causal_verdict

        told = f"Battery in {self.judged.answers.checkpoint.name}: {causal_verdict(self).headline}"
        return lines(told, {"prompts": self.split.sizes, **self.directions})

    def _repr_html_(self) -> str:
        return html_with(repr(self), effect_table(self.effects, self.choice.places))


def work_ahead(model: LanguageModel, plan: CausalPlan, test: Subjects, *, believes: bool = True) -> dict[str, float]:
    """What each phase costs, about, in tokens through all blocks; test prompts stand for all in length."""
    layers = len(grid_layers(model, plan.layers, _every(plan)))
    request, question = (own_tokens(batch) for batch in (test.batch, test.asked["straight"].batch))
    return costs(plan, Grid(layers, n_layers(model) - 1), request, question, believes=believes)


def own_tokens(batch: TokenBatch) -> float:
    """Mean tokens of a prompt after what all of them begin with."""
    rows = [batch.row(i) for i in range(len(batch.prompts))]
    return sum(map(len, rows)) / len(rows) - alike(min(rows), max(rows))


def _every(plan: CausalPlan) -> int:
    """Distance between the layers that are tried first."""
    return 1 if plan.full else 3


def run_battery(
    model: LanguageModel,
    harmful: Prompts,
    harmless: Prompts,
    plan: CausalPlan = CausalPlan(),
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Battery:
    """The whole battery on one model; what its refusals or replies don't suffice for is not measurable, and not run.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.CausalPlan(
    ...     n_train=16, n_validation=4, n_test=10, n_null=2, shuffled_directions=2, random_directions=2
    ... )
    >>> battery = ml.run_battery(model, harmful, harmless, plan)
    >>> ml.causal_verdict(battery).sentence != ""
    True
    """
    require_everywhere(model)
    layers = grid_layers(model, plan.layers, _every(plan))
    template = template_of(model, template)
    prompts, split = _sampled(labelled(harmful, harmless), plan)
    batch = tokenize(prompts, template)
    validation, test = (subjects([prompts[i] for i in part], template) for part in (split.validation, split.test))
    ahead = functools.partial(work_ahead, model, plan, test)
    with one_bar("causal", ahead()) as bar:
        with phase(ANSWERING):
            answers = answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache)
            judged = judge_answers(prompts, answers, plan.judge)
        with phase(COLLECTING):
            acts = collect(model, batch, positions=["inst", "post[*]"], cache=cache)
            judged, first_token = judge_first_token(model, judged, acts, split.train)
            contrasts = sources(judged, acts, split.train)
        with phase(UNSTEERED):
            tokens = _tokens(model, validation, first_token)
            setup = Setup(model, residual_norms(acts.select(split.train)), tokens, plan, cache, believes=False)
            unsteered = read_unsteered(setup, test, [judged.refused[i] for i in split.test])
            setup = replace(setup, believes=unsteered.measurable and len(contrasts) == len(NAMES))
        bar.expect(ahead(believes=setup.believes))
        with phase(BY_LAYER):
            refusal_layers = refusal_by_layer(setup, test, contrasts)
            depth = depth_gap(refusal_layers, plan.seed, plan.resamples)
        strengths = _strengths(setup, contrasts, validation, answers.select(split.validation))
        compared = _compared(strengths, layers)
        reply_layers = None
        if setup.believes:
            with phase(REPLIES):
                reply_layers = replies_by_layer(setup, validation, contrasts, compared)
        with phase(CHOOSING):
            known = {HARMFULNESS: reply_layers.pushes[HARMFULNESS]} if reply_layers else {}
            choice = choose(setup, validation, strengths, layers, known)
            chosen = choice.chosen
            positions = by_position(setup, validation, contrasts, chosen) if plan.every_position else pd.DataFrame()
        with phase(HELD_OUT):
            effects: Effects = {}
            for at, settings in choice.places.items():
                effects |= effects_at(setup, test, contrasts, at, settings)
        with phase(IN_WORDS):
            directions = {name: source.direction(chosen[name].layer) for name, source in contrasts.items()}
            said = _in_words(setup, test, directions, chosen, unsteered, judged.answers.select(split.test))
    return Battery(
        judged=judged,
        first_token=first_token,
        split=split,
        tokens=tokens,
        unsteered=unsteered,
        refusal_layers=refusal_layers,
        depth=depth,
        reply_layers=reply_layers,
        calibration=strengths.table(),
        choice=choice,
        directions=directions,
        effects=effects,
        positions=positions,
        beliefs=said.beliefs,
        answers=said.answers,
        broken=said.broken,
        counts=class_counts(judged, split.train),
        plan=plan,
    )


def _strengths(setup: Setup, contrasts: dict[str, ContrastSource], validation: Subjects, said: Answers) -> Strengths:
    """Damage is measured on harmless validation prompts and what the model says to them."""
    harmless = validation.of(HARMLESS)
    return Strengths(setup, contrasts, validation.batch.select(harmless), said.select(harmless))


def _compared(strengths: Strengths, layers: Sequence[int]) -> dict[str, list[Setting]]:
    """By direction the settings at which layers are compared."""
    with contextlib.nullcontext() if strengths.plan.calibrate_kl is None else phase(CALIBRATING):
        return {name: strengths.compared(name, layers) for name in strengths.sources}


def _tokens(model: LanguageModel, validation: Subjects, first_token: FirstTokenJudgement) -> ReadTokens:
    """The words that are read off replies, and the tokens that refusals start with."""
    straight, reversed_ = (logits_under(model, asked.batch, []) for asked in validation.asked.values())
    words = telling_words(loaded(model).tokenizer, straight, reversed_, validation.harmful)
    return ReadTokens(words, first_token.tokens)


class _InWords(NamedTuple):
    """What is said on test prompts; see the fields of `Battery`."""

    beliefs: pd.DataFrame
    answers: pd.DataFrame
    broken: pd.DataFrame


def _in_words(
    setup: Setup,
    test: Subjects,
    directions: dict[str, Direction],
    chosen: dict[str, Setting],
    unsteered: Unsteered,
    before: Answers,
) -> _InWords:
    beliefs, said = [belief_table(test, unsteered.said, "none", "none")], {}
    for name, direction in directions.items():
        if setup.believes and unsteered.in_words:
            beliefs.append(beliefs_under(setup, test, name, direction, chosen[name]))
        said[name] = answers_under(setup, test, direction, chosen[name], before)
    losses = losses_under(setup.model, list(said.values())) if said else []
    answers = [own.table().assign(direction=name) for name, own in said.items()]
    broken = [
        own.damage(setup.model, lost, setup.plan).assign(direction=name)
        for (name, own), lost in zip(said.items(), losses, strict=True)
    ]
    tables = (
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame() for frames in (beliefs, answers, broken)
    )
    return _InWords(*tables)


def _sampled(prompts: Sequence[Prompt], plan: CausalPlan) -> tuple[list[Prompt], Split]:
    """The prompts that are used, part by part: no others are answered."""
    families = [prompt.group for prompt in prompts]
    whole = split_by_family([prompt.label for prompt in prompts], families, fractions=FRACTIONS, seed=plan.seed)
    sizes = {"train": plan.n_train, "validation": plan.n_validation, "test": plan.n_test}
    parts = [_some(prompts, whole.part(name), n, plan.seed) for name, n in sizes.items()]
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    train, validation, test = (tuple(range(start, end)) for start, end in itertools.pairwise(ends))
    return [prompts[i] for part in parts for i in part], Split(train, validation, test, FRACTIONS, plan.seed)


def _some(prompts: Sequence[Prompt], part: Sequence[int], n: int, seed: int) -> list[int]:
    """Up to `n` rows of each class, drawn by family, so that of a pair both sides are there."""
    families = list(dict.fromkeys(prompts[i].group for i in part))
    rank = {family: k for k, family in enumerate(random.Random(seed).sample(families, len(families)))}
    drawn = sorted(part, key=lambda i: rank[prompts[i].group])
    return [i for label in PUSH for i in [i for i in drawn if prompts[i].label == label][:n]]


def prepare(config: Causal) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    _require_choices(config)
    return prepare_harm_study(config, config, new_tokens=config.max_new_tokens, layers=config.layers)


def execute(config: Causal, sets: ContrastSets, writer: RunWriter) -> Battery:
    """The battery on the configured model and prompts."""
    return run_battery(sets.model, sets.positive, sets.negative, config, template=sets.template, cache=writer.cache)


def _require_choices(config: Causal) -> None:
    """UserError where there is no layer or strength to choose from, or two options that say different things."""
    if not config.strengths or min(config.strengths) <= 0:
        raise UserError(f"the strengths are {config.strengths}; give at least one, all above 0")
    if config.calibrate_kl is not None:
        require_kl(config.calibrate_kl)
        if config.strengths != Causal.strengths:
            raise UserError("--calibrate-kl finds the strengths; leave --strengths out")
    if config.coefficient == 0:
        raise UserError("the coefficient is 0, which adds nothing; the published one is 1")
    if min(config.layers, default=1) < 1:
        raise UserError(f"there is no layer {min(config.layers)} to intervene at, only 1 and above; change --layers")
    if config.full and config.layers:
        raise UserError("--full asks for every layer and --layers for some; give one of them")
    if config.grid == "all" and (config.full or config.layers):
        raise UserError("--grid all asks for every layer and strength; leave --full and --layers out")
