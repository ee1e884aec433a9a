"""Does the harmfulness direction change what the model believes, and the refusal direction only whether it refuses?

Directions come from training prompts, layers and strengths from validation prompts, and every reported number from
test prompts, beside random directions and directions of shuffled labels (Zhao et al. 2025, sections 3.3 and 3.4).
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.behaviour.inversion import asked_words, preferred_words
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.interventions import residual_norms
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, loaded, n_layers
from mechlens.models.engine.writes import require_everywhere
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.settings import Answering
from mechlens.studies.causal.answers import replies, reply_table
from mechlens.studies.causal.config import Causal
from mechlens.studies.causal.directions import HARMFUL, HARMLESS, NAMES, PUSH, Setting, class_counts, sources
from mechlens.studies.causal.grid import GRID_RANDOM, Grid, grid_layers, run_grid
from mechlens.studies.causal.held_out import HeldOutEffect, run_test
from mechlens.studies.causal.readings import MEASURES, ReadTokens, Resampling, Subjects, read, subjects
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import ContrastSets, prepare_harm_study
from mechlens.studies.shared.inputs import MAX_DRAWS
from mechlens.studies.shared.quadrants import JudgedAnswers, judge_answers, judge_first_token

FRACTIONS = (0.5, 0.2, 0.3)
MIN_PARSED = 0.8
"""Share of the unsteered replies that must say one of the two words."""
MIN_AUROC = 0.6
"""Lower bound of how well the unsteered replies must tell the classes apart."""


@dataclass(frozen=True)
class CausalPlan:
    """The choices of a causal battery."""

    seed: int
    layers: tuple[int, ...] = ()
    """Layers of the grid; none given takes every so many."""
    every: int = 3
    """Distance between the grid's layers."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the median residual norm; the last two are about the published coefficients 1 and 2."""
    n_validation: int = 16
    """Prompts of each class in the grid."""
    n_test: int = 32
    """Prompts of each class in the test."""
    n_random: int = 20
    n_shuffled: int = 20
    max_new_tokens: int = 24
    n_resamples: int = 1000
    judge: str = "phrases"
    """A name of `mechlens.choices.JUDGES`."""


@dataclass(frozen=True)
class Workload:
    """How much is ahead, counted in prompts that are run."""

    first_tokens: int
    """Prompts read to their first answer token."""
    answers: int
    """Prompts answered."""


@dataclass(frozen=True)
class Battery:
    """What the battery found, and everything its numbers were made from."""

    judged: JudgedAnswers
    split: Split
    words: ReadTokens
    grid: Grid
    tested: dict[str, HeldOutEffect]
    """By direction; one that too few prompts define is missing."""
    unsteered: dict[str, Estimate]
    """inversion_auroc.unsteered, inversion_parsed and rates of refusal on test prompts, nothing done."""
    replies: pd.DataFrame
    """Unsteered replies to the questions, by class."""
    by_question: pd.DataFrame
    """Unsteered difference of the two words, by question and class."""
    counts: dict[str, tuple[int, int]]
    """Training prompts of the two classes of each direction."""
    plan: CausalPlan

    @property
    def measurable(self) -> bool:
        """Whether this model answers the questions, and answers them by what is harmful."""
        parsed, told = self.unsteered["inversion_parsed"], self.unsteered["inversion_auroc.unsteered"]
        return parsed.value >= MIN_PARSED and told.low > MIN_AUROC

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json, each with its controls."""
        found: dict[str, Estimate] = {}
        for name in NAMES:
            found |= self._of(f"steer_refusal.{name}", name, "refusal")
            found |= self._of(f"refusal_rate_change.{name}", name, "rate")
        for name in NAMES:
            for scope in ("before", "all"):
                found |= self._of(f"inversion_shift.{name}.{scope}", name, f"inversion.{scope}")
        return {**self.unsteered, **found}

    def _of(self, metric: str, direction: str, measure: str) -> dict[str, Estimate]:
        tested = self.tested.get(direction)
        names = (metric, f"{metric}.random", f"{metric}.random_max", f"{metric}.shuffled", f"{metric}.shuffled_max")
        if tested is None:
            return {name: Estimate.missing(min(self.counts[direction])) for name in names}
        if measure.startswith("inversion") and not self.measurable:
            return {name: Estimate.missing(tested.pushes[measure].n) for name in names}
        chance = (tested.random[measure], tested.shuffled[measure])
        values = (tested.pushes[measure], *(one for control in chance for one in (control.mean, control.maximum)))
        return dict(zip(names, values, strict=True))


def work_ahead(model: LanguageModel, plan: CausalPlan) -> Workload:
    """The battery's size, for somebody who waits for it; directions that can't be measured make it smaller."""
    layers = len(grid_layers(model, plan.layers, plan.every))
    conditions = len(NAMES) * layers * (2 * len(plan.strengths) + 1) + GRID_RANDOM * layers * len(plan.strengths)
    tested = len(NAMES) * (1 + plan.n_random + plan.n_shuffled)
    read = 3 * (2 * plan.n_validation * conditions + 2 * plan.n_test * tested)
    answers = plan.n_validation * len(NAMES) * layers * (2 * len(plan.strengths) + 1) + plan.n_test * tested
    return Workload(read, answers + len(NAMES) * 2 * plan.n_test * 5)


def run_battery(
    model: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    plan: CausalPlan,
    *,
    template: ChatTemplate | None = None,
    cache: Cache | None = None,
) -> Battery:
    """The whole battery on one model; what its refusals or replies don't suffice for is not measurable."""
    require_everywhere(model)
    layers = grid_layers(model, plan.layers, plan.every)
    template = template or template_of(model)
    prompts = _labelled(harmful, harmless)
    chance = Resampling(plan.seed, plan.n_resamples)
    answering = Answering(max_new_tokens=plan.max_new_tokens, judge=plan.judge)
    batch = tokenize(prompts, template)
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge)
    acts = collect(model, batch, positions=["inst", "post[*]"], levels=(*layers, n_layers(model)), cache=cache)
    split = split_by_family(acts.labels, acts.families, fractions=FRACTIONS, seed=plan.seed)
    judged, first_token = judge_first_token(model, judged, acts, split.train, plan.seed)
    found = sources(judged, acts, split.train)
    norms = residual_norms(acts.select(split.train))
    validation = subjects(
        [prompts[i] for i in _some(prompts, split.validation, plan.n_validation, plan.seed)], template
    )
    rows = _some(prompts, split.test, plan.n_test, plan.seed)
    test = subjects([prompts[i] for i in rows], template)
    reference = logits_under(model, validation.asked.batch, [])
    tokenizer = loaded(model).tokenizer
    words = ReadTokens(asked_words(tokenizer, reference), preferred_words(tokenizer, reference), first_token.tokens)
    settings = [Setting(layer, strength) for layer in layers for strength in plan.strengths]
    grid = run_grid(model, validation, found, settings, norms, words, chance, answering, cache)
    unsteered = _taken(judged.answers, rows)
    beliefs = replies(model, test, {"none": [None] * len(rows)}, cache)
    values = read(model, test, [[None] * len(rows)], words, cache)[0]
    return Battery(
        judged=judged,
        split=split,
        words=words,
        grid=grid,
        tested={
            name: run_test(
                model, test, source, grid.chosen[name], norms, words, chance, (plan.n_random, plan.n_shuffled),
                unsteered, answering, cache,
            )
            for name, source in found.items()
        },
        unsteered=_unsteered(test, values, beliefs["none"], [judged.refused[i] for i in rows], chance),
        replies=reply_table(test, beliefs),
        by_question=_by_question(test, values),
        counts=class_counts(judged, split.train),
        plan=plan,
    )  # fmt: skip


def _labelled(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[Prompt]:
    """All prompts with their class; refuses an empty class and ids that clash."""
    for name, prompts in ((HARMFUL, harmful), (HARMLESS, harmless)):
        if not prompts:
            raise UserError(f"there are no {name} prompts; the battery contrasts two classes, so give both")
    labelled = [replace(prompt, label=HARMFUL) for prompt in harmful]
    labelled += [replace(prompt, label=HARMLESS) for prompt in harmless]
    if len({prompt.id for prompt in labelled}) < len(labelled):
        raise UserError("two prompts have the same id; ids must be unique over both classes")
    return labelled


def _some(prompts: Sequence[Prompt], part: Sequence[int], n: int, seed: int) -> list[int]:
    """Up to `n` rows of each class, drawn by family, so that of a pair both sides are there."""
    families = list(dict.fromkeys(prompts[i].group for i in part))
    rank = {family: k for k, family in enumerate(random.Random(seed).sample(families, len(families)))}
    drawn = sorted(part, key=lambda i: rank[prompts[i].group])
    return [i for label in PUSH for i in [i for i in drawn if prompts[i].label == label][:n]]


def _taken(answers: Answers, rows: Sequence[int]) -> Answers:
    return replace(
        answers,
        ids=tuple(answers.ids[i] for i in rows),
        texts=tuple(answers.texts[i] for i in rows),
        tokens=tuple(answers.tokens[i] for i in rows),
    )


def _unsteered(
    who: Subjects, values: torch.Tensor, beliefs: Sequence[str], refused: Sequence[bool], chance: Resampling
) -> dict[str, Estimate]:
    """Whether the questions are answered at all, and what is refused without an intervention."""
    difference = values[:, MEASURES.index("inversion.all")]
    parsed = torch.tensor([belief in ("harmful", "harmless") for belief in beliefs]).double()
    said_no = torch.tensor(refused).double()
    found = {
        "inversion_auroc.unsteered": auroc_estimate(
            difference, who.harmful, who.families, chance.seed, chance.n_resamples
        ),
        "inversion_parsed": who.estimate(parsed, chance),
    }
    return found | {f"refusal_rate.{label}": who.estimate(said_no, chance, who.of(label)) for label in PUSH}


def _by_question(who: Subjects, values: torch.Tensor) -> pd.DataFrame:
    return (
        pd.DataFrame(
            {
                "wording": who.asked.questions,
                "label": who.labels,
                "difference": values[:, MEASURES.index("inversion.all")].tolist(),
                "own_words_difference": values[:, MEASURES.index("own_words.all")].tolist(),
                "n": 1,
            }
        )
        .groupby(["wording", "label"], sort=False, as_index=False)
        .agg({"difference": "mean", "own_words_difference": "mean", "n": "sum"})
    )


LEAST = {"n_validation": 4, "n_test": 8, "random_directions": 1, "shuffled_directions": 1, "resamples": 1}


def prepare(config: Causal) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    _require_sizes(config)
    return prepare_harm_study(config, config)


def execute(config: Causal, sets: ContrastSets, writer: RunWriter) -> Battery:
    """The battery on the configured model and prompts."""
    plan = CausalPlan(
        seed=config.seed,
        layers=config.layers,
        every=1 if config.full else 3,
        strengths=config.strengths,
        n_validation=config.n_validation,
        n_test=config.n_test,
        n_random=config.random_directions,
        n_shuffled=config.shuffled_directions,
        max_new_tokens=config.max_new_tokens,
        n_resamples=config.resamples,
        judge=config.judge,
    )
    ahead = work_ahead(sets.model, plan)
    tqdm.write(
        f"ahead: {ahead.first_tokens:,} prompts read to their first answer token, {ahead.answers:,} answered",
        file=sys.stderr,
    )
    return run_battery(sets.model, sets.positive, sets.negative, plan, template=sets.template, cache=writer.cache)


def _require_sizes(config: Causal) -> None:
    """UserError where there is too little to sample, or no strength to choose from."""
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}; give at least {least}")
        if getattr(config, name) > MAX_DRAWS:
            raise UserError(f"{name} is {getattr(config, name)}; give at most {MAX_DRAWS}")
    if not config.strengths or min(config.strengths) <= 0:
        raise UserError(f"the strengths are {config.strengths}; give at least one, all above 0")
    if config.full and config.layers:
        raise UserError("--full asks for every layer and --layers for some; give one of them")
