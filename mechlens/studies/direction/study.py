"""The direction of any concept: where it can be read, how well, and what part of it is only the surface."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError, kind_of, many, quoted
from mechlens.methods.activations.activations import Activations, column_of, one_cell
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.directions.methods import MEAN_DIFFERENCE
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.probing.confounds import Confound, find_confounds, warn_of_confounds
from mechlens.methods.probing.detect import ChosenLevel, Detection
from mechlens.methods.progress import phase
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.steering_test import SteeringTest, steering_test
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.text import PunctuationMode, match_punctuation
from mechlens.runs.headline import Headline
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS, POSITIONS, DetectionPlan, require_ranges
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.direction.verdict import DirectionVerdict, direction_verdict, steering_headline
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.contrasts import ContrastMeasurement, measure, surface_of
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

POSITIVE, NEGATIVE = "positive", "negative"
SPLITS = 20
"""Halvings behind a reliability."""
PLAN = "ml.DetectionPlan(seed=1)"
MIN_OF_A_SIDE = 15
"""So that a fifth of them, the validation part, is three."""


@dataclass(frozen=True, repr=False)
class Concept:
    """A concept's direction in every cell, tested on held-out prompts.

    `verdict` says what the numbers allow, `verdict.headline` in one sentence. `direction` is the one to use, or None;
    `best` is the strongest position that is more than the prompts' surface, or None, and `detection.strongest` and
    `detection.at(position)` are there in any case. `steered` is what adding directions did (`causal=True`),
    `confounds` what else differs between the sides. `table()` has every level and position, `baselines()` what the
    surface reaches, `differences()` the confounds, `tables()` everything, `metrics()` the numbers by name.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> concept = ml.find_concept(model, harmful, harmless, plan=ml.DetectionPlan(permutations=20))
    >>> list(concept.table().columns[:3])
    ['level', 'position', 'auroc']
    """

    measured: ContrastMeasurement
    reliability: Float[Tensor, "level position"]
    """Split-half reliability of the direction, from training prompts."""
    acts: Activations
    batch: TokenBatch
    split: Split
    plan: DetectionPlan
    confounds: tuple[Confound, ...]
    """What else tells the two sides apart better than chance, by the lower bound; the most telling first."""
    punctuation: str
    """What became of final punctuation, in words."""
    steered: SteeringTest | None = None
    """What adding the directions to negative prompts did, where that was asked for."""

    @property
    def direction(self) -> Direction | None:
        """The direction to use: the one that steers, where that was tried, else the best one; None where none is."""
        if self.steered is not None:
            return self.steered.direction
        return None if self.best is None else self.best.direction

    @property
    def best(self) -> ChosenLevel | None:
        """The strongest position whose direction is more than what the prompts' surface tells; None where none is."""
        return self.detection.best

    @property
    def verdict(self) -> DirectionVerdict:
        """What the numbers allow to be said of reading it."""
        return direction_verdict(self.detection)

    @property
    def headline(self) -> Headline:
        """The one sentence: of the direction that steers, where that was tried, else of reading it."""
        return self.verdict.headline if self.steered is None else steering_headline(self.steered, self.verdict)

    @property
    def detection(self) -> Detection:
        """The held-out detection; `find_concept` refuses sets that are too small for one."""
        assert self.measured.detection is not None
        return self.measured.detection

    def metrics(self) -> dict[str, Estimate]:
        """AUROC of each position and of the strongest, its gains over the surface, and the baselines."""
        strongest, best = self.detection.strongest, self.best
        numbers = {f"auroc.{choice.position}": choice.auroc for choice in self.detection.chosen}
        numbers["auroc.strongest"] = strongest.auroc
        if best is not None:
            numbers["auroc.best"] = best.auroc
        shown, n = best or strongest, strongest.auroc.n
        numbers["permutation_p"] = Estimate.exact(shown.permutation.p, n)
        numbers["random_maximum"] = Estimate.exact(shown.random.maximum, n)
        reliable = float(self.reliability[self.acts.levels.index(shown.level), self._column(shown.position)])
        numbers["reliability"] = Estimate.exact(reliable, len(self.split.train))
        numbers |= self.verdict.deciding
        if self.steered is not None:
            numbers["steering.effect"] = self.steered.effect
            if self.steered.random is not None:
                random = self.steered.random
                numbers["steering.random_maximum"] = Estimate.exact(random.maximum, random.n)
                numbers["steering.random_bound"] = Estimate.exact(random.bound, random.n)
        return numbers | self.measured.baselines

    def table(self) -> pd.DataFrame:
        """One row per level and position, with the reliability of the direction there."""
        return self.detection.table().assign(reliability=self.reliability.flatten().tolist())

    def baselines(self) -> pd.DataFrame:
        """One row per surface baseline."""
        rows = [{"baseline": name, **auroc.row("auroc")} for name, auroc in self.measured.baselines.items()]
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        return {
            "auroc_by_level": self.table(),
            "auroc_chosen": self.measured.chosen(),
            "baselines": self.baselines(),
            "surface": pd.concat([one.table() for one in self.detection.ahead], ignore_index=True),
            "confounds": self.differences(),
            "split": pd.DataFrame({"id": self.acts.ids, "part": self.split.parts()}),
            **({"steered": self.steered.table} if self.steered is not None else {}),
        }

    def differences(self) -> pd.DataFrame:
        """One row for each thing in which the sides differ, with the AUROC that it alone reaches."""
        rows = [
            {"confound": one.name, **one.auroc.row("auroc"), "telling": one.telling, "difference_text": one.words}
            for one in self.confounds
        ]
        return pd.DataFrame(rows, columns=["confound", "auroc", "low", "high", "n", "telling", "difference_text"])

    def artifacts(self) -> dict[str, object]:
        """The direction in every cell, and one more: `direction`, the one to use, or where none is, the `strongest`."""
        found: dict[str, object] = {"directions": self.detection.directions}
        if self.direction is not None:
            found["direction"] = self.direction
        else:
            found["strongest"] = self.detection.strongest.direction
        return found

    def _column(self, position: str) -> int:
        return column_of(position, self.acts.positions, self.acts.last)

    def __repr__(self) -> str:
        facts = {
            **self.detection.in_words,
            "steering effect": "" if self.steered is None else self.steered.effect,
            "direction": "none to use" if self.direction is None else repr(self.direction),
            "final punctuation": self.punctuation.removeprefix("final punctuation "),
        }
        return lines(f"Concept in {self.acts.checkpoint.name}: {self.verdict.headline}", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.detection.by_position())


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
    _require_in_order(model, positive, negative)
    if not isinstance(plan, DetectionPlan):
        raise UserError(f"{kind_of(plan)} was given as the plan; give a DetectionPlan, such as {PLAN}")
    METHODS.require(plan.method)
    require_ranges(plan)
    sides = _called(positive, negative) if sides is None else two_sides(sides)
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
    _require_enough(one, other)
    matched = match_punctuation(one, other, punctuation)
    if not paired:
        warn_of_twins(matched.positive, matched.negative)
    prompts = [*matched.positive, *(_twins(matched.positive, matched.negative) if paired else matched.negative)]
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


def _warn(found: Concept, strongest: str, by_steering: str) -> None:
    """A UserWarning where no direction is best or steers, for those who type or those who write Python."""
    if found.best is None:
        usable = "What can be used is the direction that steering chose"
        if found.direction is None:
            further = "" if found.steered is not None else f", or what {by_steering} chooses by steering"
            usable = f"What can be used all the same is the strongest ({strongest}){further}"
        warnings.warn(f"there is no best direction. {found.verdict.headline} {usable}", stacklevel=3)
    if found.steered is not None and found.steered.direction is None:
        warnings.warn(f"there is no direction that steers. {found.steered.sentence}", stacklevel=3)


def _require_in_order(model: object, positive: object, negative: object) -> None:
    """UserError where a model stands among the prompts."""
    given = next((one for one in (positive, negative) if hasattr(one, "cfg")), None)
    if given is not None or isinstance(model, list | tuple):
        raise UserError(
            f"the model comes first, and {kind_of(model)} was given there; "
            "write find_concept(model, positive, negative)"
        )


def _called(positive: Prompts, negative: Prompts) -> tuple[str, str]:
    """What the two sides are called by whoever gives them, where that tells them apart."""
    first, second = (_name(given) for given in (positive, negative))
    return (first, second) if first and second and first != second else (POSITIVE, NEGATIVE)


def two_sides(given: object) -> tuple[str, str]:
    """The names of both sides; UserError for anything else than two different texts."""
    named = tuple(given) if isinstance(given, list | tuple) else ()
    if len(named) != 2 or not all(isinstance(one, str) and one for one in named) or named[0] == named[1]:
        raise UserError(
            f"sides is {quoted(given, 80)}; give the names of both sides, two different texts, such as "
            "sides=('harmful', 'harmless')"
        )
    return named


def _name(given: Prompts) -> str:
    """A column's name, or the label of every prompt."""
    name = getattr(given, "name", "")
    if isinstance(name, str) and name:
        return name
    rows = given if isinstance(given, list | tuple) else []
    labels = {row.label if isinstance(row, Prompt) else "" for row in rows}
    return labels.pop() if len(labels) == 1 else ""


def _twins(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> list[Prompt]:
    """The negative prompts, each in the family of the positive one of its row."""
    if len(positive) != len(negative):
        raise UserError(
            f"there are {len(positive)} {POSITIVE} and {len(negative)} {NEGATIVE} prompts; --paired (paired=True) "
            "needs equally many, row i of both being a pair"
        )
    return [replace(twin, family=prompt.group) for prompt, twin in zip(positive, negative, strict=True)]


def _require_enough(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> None:
    for name, prompts in ((POSITIVE, positive), (NEGATIVE, negative)):
        if len(prompts) < MIN_OF_A_SIDE:
            if len(prompts) == 1 and prompts[0].text in builtin_names():
                called = prompts[0].text
                raise UserError(
                    f"{called!r} was given as the one prompt of the {name} side; the built-in set of that name is "
                    f"ml.builtin_prompts({called!r})"
                )
            raise UserError(
                f"the {name} side has {many(len(prompts), 'prompt')}; a direction with held-out evidence needs at "
                f"least {MIN_OF_A_SIDE} of each side"
            )


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
    _require_enough(positive, negative)
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
    negative, wanted = _twins(positive, negative), len(positive) if config.n is None else config.n
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


def short_sides(positive: str, negative: str) -> tuple[str, str]:
    """What two sources are called: a file's name without its folder, unless both then look the same."""
    first, second = (Path(source).name if Path(source).is_file() else source for source in (positive, negative))
    return (positive, negative) if first == second else (first, second)
