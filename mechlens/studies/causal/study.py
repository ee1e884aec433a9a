"""Does the harmfulness direction change what the model believes, and the refusal direction only whether it refuses?

Directions come from training prompts, layers and strengths from validation prompts, and every reported number from
test prompts, beside random directions and null directions from
shuffled labels (Zhao et al. 2025, sections 3.3 and 3.4).
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.inversion import asked_words, preferred_words
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.interventions import residual_norms
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, loaded, n_layers
from mechlens.models.sites import require_everywhere
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.causal.config import Causal, CausalPlan
from mechlens.studies.causal.directions import NAMES, PUSH, Setting, class_counts, sources
from mechlens.studies.causal.grid import GRID_RANDOM, Grid, grid_layers, run_grid
from mechlens.studies.causal.held_out import HeldOutEffect, replies, reply_table, run_test
from mechlens.studies.causal.readings import MEASURES, ReadTokens, Subjects, read, subjects
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import ContrastSets, labelled, prepare_harm_study
from mechlens.studies.shared.inputs import MAX_DRAWS
from mechlens.studies.shared.quadrants import JudgedAnswers, judge_answers, judge_first_token

MIN_PARSED = 0.8
"""Share of the unsteered replies that must say one of the two words."""
MIN_AUROC = 0.6
"""Lower bound of how well the unsteered replies must tell the classes apart."""


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
        numbers: dict[str, Estimate] = {}
        for name in NAMES:
            numbers |= self._of(f"steer_refusal.{name}", name, "refusal")
            numbers |= self._of(f"refusal_rate_change.{name}", name, "rate")
        for name in NAMES:
            for scope in ("before", "all"):
                numbers |= self._of(f"inversion_shift.{name}.{scope}", name, f"inversion.{scope}")
        return {**self.unsteered, **numbers}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        tables = {
            "operations_by_layer": self.grid.values,
            "pushes_by_layer": self.grid.pushes,
            "refusals_by_layer": self.grid.rates,
            "by_question": self.by_question,
            "tested": self._tested_table(),
            "replies": self.reply_shares(),
        }
        if not self.tested:
            return tables
        return tables | {"steered_answers": self._of_each("answers"), "damage": self.damage()}

    def artifacts(self) -> dict[str, object]:
        """Both directions, where they can be measured."""
        return {f"direction_{name}": tested.direction for name, tested in self.tested.items()}

    def damage(self) -> pd.DataFrame:
        """What the chosen settings break: direction, operation, measure, value, low, high, n."""
        return self._of_each("damage") if self.tested else pd.DataFrame()

    def reply_shares(self) -> pd.DataFrame:
        """Replies on test prompts, unsteered and under a push: direction, scope, label, belief, share, n."""
        frames = [self.replies.assign(direction="none")]
        return pd.concat([*frames, *([self._of_each("replies")] if self.tested else [])], ignore_index=True)

    def _of_each(self, table: str) -> pd.DataFrame:
        frames: list[pd.DataFrame] = [
            getattr(tested, table).assign(direction=name) for name, tested in self.tested.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def _tested_table(self) -> pd.DataFrame:
        """Every measure on test prompts with its controls, measurable or not: direction, measure, who, value, ..."""
        rows = []
        for name, tested in self.tested.items():
            for measure, estimate in tested.pushes.items():
                random, shuffled = tested.random[measure], tested.shuffled[measure]
                for who, effect in (
                    ("direction", estimate), ("random", random.mean), ("random_max", random.maximum),
                    ("shuffled", shuffled.mean), ("shuffled_max", shuffled.maximum),
                ):  # fmt: skip
                    setting = {"direction": name, "layer": tested.setting.layer, "strength": tested.setting.strength}
                    rows.append({**setting, "measure": measure, "who": who, **effect.row()})
        return pd.DataFrame(rows)

    def _of(self, metric: str, direction: str, measure: str) -> dict[str, Estimate]:
        tested = self.tested.get(direction)
        names = (metric, f"{metric}.random", f"{metric}.random_max", f"{metric}.shuffled", f"{metric}.shuffled_max")
        if tested is None:
            return {name: Estimate.missing(min(self.counts[direction])) for name in names}
        if measure.startswith("inversion") and not self.measurable:
            return {name: Estimate.missing(tested.pushes[measure].n) for name in names}
        chance = (tested.random[measure], tested.shuffled[measure])
        values = (tested.pushes[measure], *(part for control in chance for part in (control.mean, control.maximum)))
        return dict(zip(names, values, strict=True))


def _every(plan: CausalPlan) -> int:
    """Distance between the grid's layers."""
    return 1 if plan.full else 3


def work_ahead(model: LanguageModel, plan: CausalPlan) -> Workload:
    """The battery's size, for somebody who waits for it; directions that can't be measured make it smaller."""
    layers = len(grid_layers(model, plan.layers, _every(plan)))
    conditions = len(NAMES) * layers * (2 * len(plan.strengths) + 1) + GRID_RANDOM * layers * len(plan.strengths)
    tested = len(NAMES) * (1 + plan.random_directions + plan.shuffled_directions)
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
    layers = grid_layers(model, plan.layers, _every(plan))
    template = template or template_of(model)
    prompts = labelled(harmful, harmless)
    batch = tokenize(prompts, template)
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge)
    acts = collect(model, batch, positions=["inst", "post[*]"], levels=(*layers, n_layers(model)), cache=cache)
    split = split_by_family(acts.labels, acts.families, fractions=FRACTIONS, seed=plan.seed)
    judged, first_token = judge_first_token(model, judged, acts, split.train)
    contrasts = sources(judged, acts, split.train)
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
    grid = run_grid(model, validation, contrasts, settings, norms, words, plan, cache)
    unsteered = judged.answers.select(rows)
    beliefs = replies(model, test, {"none": [None] * len(rows)}, cache)
    values = read(model, test, [[None] * len(rows)], words, cache)[0]
    return Battery(
        judged=judged,
        split=split,
        words=words,
        grid=grid,
        tested={
            name: run_test(
                model, test, source, grid.chosen[name], norms, words, plan, unsteered, cache,
            )
            for name, source in contrasts.items()
        },
        unsteered=_unsteered(test, values, beliefs["none"], [judged.refused[i] for i in rows], plan),
        replies=reply_table(test, beliefs),
        by_question=_by_question(test, values),
        counts=class_counts(judged, split.train),
        plan=plan,
    )  # fmt: skip


def _some(prompts: Sequence[Prompt], part: Sequence[int], n: int, seed: int) -> list[int]:
    """Up to `n` rows of each class, drawn by family, so that of a pair both sides are there."""
    families = list(dict.fromkeys(prompts[i].group for i in part))
    rank = {family: k for k, family in enumerate(random.Random(seed).sample(families, len(families)))}
    drawn = sorted(part, key=lambda i: rank[prompts[i].group])
    return [i for label in PUSH for i in [i for i in drawn if prompts[i].label == label][:n]]


def _unsteered(
    who: Subjects, values: torch.Tensor, beliefs: Sequence[str], refused: Sequence[bool], plan: CausalPlan
) -> dict[str, Estimate]:
    """Whether the questions are answered at all, and what is refused without an intervention."""
    difference = values[:, MEASURES.index("inversion.all")]
    parsed = torch.tensor([belief in ("harmful", "harmless") for belief in beliefs]).double()
    said_no = torch.tensor(refused).double()
    numbers = {
        "inversion_auroc.unsteered": auroc_estimate(difference, who.harmful, who.families),
        "inversion_parsed": who.estimate(parsed, plan),
    }
    return numbers | {f"refusal_rate.{label}": who.estimate(said_no, plan, who.of(label)) for label in PUSH}


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
    ahead = work_ahead(sets.model, config)
    tqdm.write(
        f"ahead: {ahead.first_tokens:,} prompts read to their first answer token, {ahead.answers:,} answered",
        file=sys.stderr,
    )
    return run_battery(sets.model, sets.positive, sets.negative, config, template=sets.template, cache=writer.cache)


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
