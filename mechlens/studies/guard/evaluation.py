"""How well a guard detects harmful prompts that it hasn't seen, from many sources, beside everything simpler.

Fitted on one source, tested on others: prompts (or goals of attacks) that the guard was fitted on, that an adapter of
the model was trained on, or that an earlier source holds are left out and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.perplexity import instruction_surprise
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard_model import GuardModelOpinion
from mechlens.methods.shown import counts, few, lines
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.studies.guard.config import EvaluationPlan
from mechlens.studies.guard.detectors import (
    Detector,
    TrainAndTest,
    guard_detector,
    guard_model_detector,
    refusal_detectors,
    refusal_direction,
    signed_detector,
    surface_detectors,
)
from mechlens.studies.guard.fitting import read_positions, rules_by_refusal
from mechlens.studies.guard.twins import Twins, surface_twins
from mechlens.studies.shared.contrasts import surface_of
from mechlens.studies.shared.quadrants import JudgedAnswers, judge_answers, judge_first_token
from mechlens.studies.shared.sources import Source, SourcePrompts
from mechlens.studies.shared.training_data import text_sha256, trained_on, was_seen

FPR_OF_BASELINES = 0.05
"""The false-positive rate that baselines are calibrated for, where the guard has the paper's threshold of 0."""


@dataclass(frozen=True)
class EvaluationPrompts:
    """The prompts that a guard may be tested on."""

    prompts: tuple[Prompt, ...]
    """`source` names the source."""
    sources: tuple[Source, ...]
    left_out: pd.DataFrame
    """By source: found, left out and why, tested."""

    def rows(self, name: str) -> list[int]:
        """Row numbers of one source's prompts."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.source == name]

    @cached_property
    def twins(self) -> Twins:
        """Harmful prompts beside harmless ones of their form."""
        return surface_twins(self.prompts)


@dataclass(frozen=True, repr=False)
class GuardEvaluation:
    """Detectors on test prompts; the first is the guard.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> from dataclasses import replace
    >>> test = tuple(replace(prompt, source="held_out") for prompt in fitting.test)
    >>> held_out = ml.SourcePrompts(ml.Source("held_out", "", label_column="label"), test, {})
    >>> examined = ml.examine([held_out], fitting.guard, [model.mechlens.checkpoint])
    >>> plan = ml.EvaluationPlan(resamples=100, permutations=10)
    >>> result = ml.evaluate_guard(model, fitting.guard, fitting.others, fitting.train, examined, plan)
    >>> report = ml.guard_report(result)
    >>> report.numbers["auroc.latent_guard"].n == len(test)
    True
    """

    examined: EvaluationPrompts
    detectors: tuple[Detector, ...]
    judged: JudgedAnswers
    """The model's own answers to the test prompts."""
    train: Activations
    """Of the prompts that the guard was fitted on."""
    refused: dict[str, bool]
    """Those of them that the model refuses, by id."""
    test: Activations
    guard: FittedGuard
    direction: Direction | None
    """Of refusal, from training prompts."""
    batch: TokenBatch
    """The test prompts."""
    plan: EvaluationPlan
    other_weights: bool = False
    """Whether the guard may have been fitted on other weights, such as another checkpoint of a series."""
    guard_models: tuple[str, ...] = ()
    """Detectors that are guard models."""

    @property
    def scores(self) -> Float[Tensor, " prompt"]:
        """The guard's own, of every test prompt."""
        scores = self.detectors[0].scores
        assert scores is not None
        return scores

    def __repr__(self) -> str:
        prompts = self.examined.prompts
        facts = {
            "detectors": few([one.name for one in self.detectors]),
            "prompts": counts([prompt.label for prompt in prompts]),
            "sources": counts([prompt.source or "unnamed" for prompt in prompts]),
            "numbers": "see ml.guard_report of this",
        }
        return lines(f"GuardEvaluation in {self.test.checkpoint.name}", facts)


def examine(
    loaded: Sequence[SourcePrompts], guard: FittedGuard, checkpoints: Sequence[Checkpoint]
) -> EvaluationPrompts:
    """What is left of the sources after overlaps; UserError where a class has no prompt left.

    `checkpoints` are those whose adapters' training prompts count as seen. An attack is seen where its goal is.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> from dataclasses import replace
    >>> test = tuple(replace(prompt, source="held_out") for prompt in fitting.test)
    >>> held_out = ml.SourcePrompts(ml.Source("held_out", "", label_column="label"), test, {})
    >>> examined = ml.examine([held_out], fitting.guard, [model.mechlens.checkpoint])
    >>> len(examined.prompts) == len(test)
    True
    """
    fitted = frozenset(guard.train_sha256)
    taught = frozenset().union(*(trained_on(checkpoint) for checkpoint in checkpoints))
    seen: set[str] = set()
    kept: list[Prompt] = []
    rows = []
    for source in loaded:
        counts = {"in_guard_fit": 0, "in_adapter_training": 0, "in_earlier_source": 0}
        before = len(kept)
        for prompt in source.prompts:
            if was_seen(prompt, fitted):
                counts["in_guard_fit"] += 1
            elif was_seen(prompt, taught):
                counts["in_adapter_training"] += 1
            elif text_sha256(prompt.text) in seen:
                counts["in_earlier_source"] += 1
            else:
                seen.add(text_sha256(prompt.text))
                kept.append(prompt)
        rows.append(
            {"source": source.source.name, "found": len(source.prompts), **counts, "tested": len(kept) - before}
        )
    labels = [prompt.label for prompt in kept]
    if not {"harmful", "harmless"} <= set(labels):
        raise UserError(
            f"after leaving out what was seen before there are {labels.count('harmful')} harmful and "
            f"{labels.count('harmless')} harmless test prompts; both are needed, so add a source"
        )
    return EvaluationPrompts(tuple(kept), tuple(source.source for source in loaded), pd.DataFrame(rows))


def evaluate_guard(
    model: LanguageModel,
    guard: FittedGuard,
    others: Mapping[str, FittedGuard],
    train: Prompts,
    examined: EvaluationPrompts,
    plan: EvaluationPlan,
    *,
    opinions: Mapping[str, GuardModelOpinion] | None = None,
    other_weights: bool = False,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> GuardEvaluation:
    """The guard, other rules (`others`) and baselines, fitted on `train` and applied to the examined prompts.

    `train` are the guard's own training prompts, labelled. `opinions` are those of guard models, by name.
    `other_weights` lets the guard be one that was fitted on another checkpoint.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> from dataclasses import replace
    >>> test = tuple(replace(prompt, source="held_out") for prompt in fitting.test)
    >>> held_out = ml.SourcePrompts(ml.Source("held_out", "", label_column="label"), test, {})
    >>> examined = ml.examine([held_out], fitting.guard, [model.mechlens.checkpoint])
    >>> plan = ml.EvaluationPlan(resamples=100, permutations=10)
    >>> result = ml.evaluate_guard(model, fitting.guard, fitting.others, fitting.train, examined, plan)
    >>> report = ml.guard_report(result)
    >>> report.numbers["auroc.latent_guard"].n == len(test)
    True
    """
    used = template_of(model, template)
    train = as_prompts(train)
    prompts = [*train, *examined.prompts]
    batch = tokenize(prompts, used)
    fitted = collect(model, batch.select(range(len(train))), positions=read_positions(guard.settings), cache=cache)
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge)
    refused = dict(zip(fitted.ids, judged.refused[: len(train)], strict=True))
    direction = refusal_direction(fitted, judged.verdicts[judged.judge][: len(train)], plan.seed)
    guards = {"latent_guard": guard, **others, **rules_by_refusal(fitted, guard.settings, refused)}
    levels = {level for each in guards.values() for level in each.levels} | {0, n_layers(model)}
    levels |= {direction.level} if direction is not None else set()
    rest = batch.select(range(len(train), len(prompts)))
    names = tuple(dict.fromkeys(("inst", *(name for each in guards.values() for name in each.positions), "last")))
    test = collect(model, rest, positions=names, levels=sorted(levels), cache=cache)
    both = TrainAndTest(
        tuple(prompt.label for prompt in prompts),
        tuple(prompt.group for prompt in prompts),
        len(train),
        guard.settings.max_fpr or FPR_OF_BASELINES,
        plan.seed,
    )
    detectors = [
        *(guard_detector(name, each, test, other_weights=other_weights) for name, each in guards.items()),
        *surface_detectors(both, surface_of(model, batch), _joined(fitted, test, 0, "inst")),
        signed_detector(both, "perplexity", instruction_surprise(model, batch, cache), "log-perplexity of the words"),
        *_refusals(model, both, judged, direction, fitted, test, plan),
        *(guard_model_detector(name, said) for name, said in (opinions or {}).items()),
    ]
    return GuardEvaluation(
        examined=examined,
        detectors=tuple(detectors),
        judged=_rest(judged, len(train)),
        train=fitted,
        refused=refused,
        test=test,
        guard=guard,
        direction=direction,
        batch=rest,
        plan=plan,
        other_weights=other_weights,
        guard_models=tuple(opinions or {}),
    )


def _refusals(
    model: LanguageModel,
    both: TrainAndTest,
    judged: JudgedAnswers,
    direction: Direction | None,
    train: Activations,
    test: Activations,
    plan: EvaluationPlan,
) -> list[Detector]:
    top = n_layers(model)
    last = _only(_joined(train, test, top, "last"), train, test, top)
    judged, first_token = judge_first_token(model, judged, last, both.train)
    residuals = None if direction is None else _joined(train, test, direction.level, "last")
    return refusal_detectors(both, judged, first_token, direction, residuals)


def _joined(train: Activations, test: Activations, level: int, position: str) -> Float[Tensor, "prompt d_model"]:
    return torch.cat([train.at(level, position), test.at(level, position)])


def _only(values: Float[Tensor, "prompt d_model"], train: Activations, test: Activations, level: int) -> Activations:
    """Training and test prompts as activations of one level at the last token."""
    return Activations(
        values=values[:, None, None],
        levels=(level,),
        positions=(train.last,),
        ids=(*train.ids, *test.ids),
        labels=(*train.labels, *test.labels),
        families=(*train.families, *test.families),
        site=train.site,
        checkpoint=train.checkpoint,
        template=train.template,
        engine=train.engine,
        last=train.last,
    )


def _rest(judged: JudgedAnswers, n_train: int) -> JudgedAnswers:
    """Answers and verdicts of the test prompts."""
    kept = judged.answers.select(range(n_train, len(judged.prompts)))
    verdicts = {name: given[n_train:] for name, given in judged.verdicts.items()}
    return JudgedAnswers(judged.prompts[n_train:], kept, verdicts)
