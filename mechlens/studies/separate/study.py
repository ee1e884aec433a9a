"""Are harmfulness and refusal one variable or two? The separation study (Zhao et al. 2025, sections 2 and 3).

Every prompt is answered and judged; the residual stream at `inst` and at the template tokens after it is
collected at every level; every prompt is scored once, by directions whose families and levels never saw it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.chosen_judge import judges_of, once_settled
from mechlens.methods.behaviour.judges import Judge
from mechlens.methods.behaviour.model_judge import ModelJudge
from mechlens.methods.behaviour.served.answering import answers_to
from mechlens.methods.behaviour.served.completions import require_served
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import MIN_FAMILIES
from mechlens.methods.probing.confounds import compare_sides
from mechlens.methods.progress import phase
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.effects import CosineCurve
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.load import load, require_wrappable
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.runs.results.paired import BY_PROMPT
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.separate.analysis import HARMFUL, HARMLESS, Analysis, analyse
from mechlens.studies.separate.config import Separate, SeparationPlan
from mechlens.studies.separate.contrasts import OutOfFoldContrast, Question, measure_contrast
from mechlens.studies.separate.geometry import Geometry, measure_geometry
from mechlens.studies.shared.contrasts import Surface, surface_of
from mechlens.studies.shared.harm_sets import ContrastSets, labelled, prepare_harm_study
from mechlens.studies.shared.quadrants import FirstTokenJudgement, JudgedAnswers, judge_answers, judge_first_token
from mechlens.studies.shared.two_beliefs import Beliefs, measure_beliefs


@dataclass(frozen=True)
class WithoutTemplate:
    """What harmful prompts are answered when the tokens after `inst` are left out (Zhao et al. 2025, Table 1)."""

    refusal_rates: dict[str, Estimate]
    """Of harmful prompts, with the full template and without the tokens after `inst`."""
    accepted_auroc: Estimate
    """Harmfulness at `inst`, of harmful prompts that are accepted so, against accepted harmless ones."""
    served_agreement: Estimate | None = None
    """Share of a server's answers to such prompts that are the loaded model's own."""

    def metrics(self) -> dict[str, Estimate]:
        """Its numbers by their names in run.json."""
        rates = {f"refusal_rate.{name}": rate for name, rate in self.refusal_rates.items()}
        served = self.served_agreement
        rates |= {} if served is None else {"served_agreement.no_post_tokens": served}
        return rates | {"harmful_auroc.inst.accepted_without_template": self.accepted_auroc}


@dataclass(frozen=True, repr=False)
class Separation:
    """What the study found, and everything its numbers were made from.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SeparationPlan(resamples=50, permutations=10, random_directions=2, max_new_tokens=4)
    >>> study = ml.separate(model, harmful, harmless, [], plan)
    >>> ml.separation_verdict(study.metrics()).sentence != ""
    True
    """

    judged: JudgedAnswers
    first_token: FirstTokenJudgement
    analysis: Analysis
    within: dict[str, OutOfFoldContrast]
    """Contrasts fitted inside one class: harmful.accepted, harmful.refused, refused.harmful, refused.harmless."""
    geometry: Geometry
    beliefs: Beliefs
    without_template: WithoutTemplate
    acts: Activations
    batch: TokenBatch
    plan: SeparationPlan

    @property
    def cosine(self) -> CosineCurve:
        """Harmfulness at `inst` against refusal at the last position."""
        return self.geometry.directions

    @property
    def contrasts(self) -> dict[str, OutOfFoldContrast]:
        """Every contrast by name: over all prompts, then inside one class."""
        return {"harmful": self.analysis.harm, "refused": self.analysis.refusal, **self.within}

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json; what can't be measured is there with its count."""
        numbers = self.analysis.metrics() | {"first_token_auroc": self.first_token.auroc}
        if (served := self.judged.answers.served) is not None:
            numbers["served_agreement"] = served.agreement(self.plan.seed)
        return numbers | self.without_template.metrics() | self.geometry.metrics() | self.beliefs.metrics()

    def table(self) -> pd.DataFrame:
        """Every contrast at every level and position."""
        return pd.concat([contrast.grid for contrast in self.contrasts.values()], ignore_index=True)

    def chosen(self) -> pd.DataFrame:
        """Every contrast at the levels chosen inside the folds, with nulls."""
        return pd.concat([contrast.chosen for contrast in self.contrasts.values()], ignore_index=True)

    def baselines(self) -> pd.DataFrame:
        """Surface baselines of every contrast."""
        return self._baselines

    @cached_property
    def _baselines(self) -> pd.DataFrame:
        return pd.concat([contrast.baselines() for contrast in self.contrasts.values()], ignore_index=True)

    def agreement(self) -> pd.DataFrame:
        """Cohen's kappa of every two judges."""
        rows = [
            {"judge": judge, "other": other, **agreed.kappa.row("kappa")}
            for judge, other, agreed in self.judged.agreements(self.plan.seed)
        ]
        return pd.DataFrame(rows, columns=["judge", "other", "kappa", "low", "high"] if rows else None)

    def folds(self) -> pd.DataFrame:
        """The fold that each prompt is held out in, by fold seed: columns id, seed, fold."""
        return pd.DataFrame(
            [
                {"id": self.acts.ids[row], "seed": self.plan.seed + i, "fold": number}
                for i, folds in enumerate(self.analysis.folds)
                for number, fold in enumerate(folds)
                for row in fold.scored
            ]
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        found = self.analysis.dissociation
        return {
            "quadrant_counts": self.judged.counts(),
            "answers": self.judged.table().assign(log_odds=self.first_token.log_odds.tolist()),
            "agreement": self.agreement(),
            "auroc_by_level": self.table(),
            "auroc_chosen": self.chosen(),
            "baselines": self.baselines(),
            "dissociation": found.prompts if found else pd.DataFrame(),
            "dissociation_by_position": found.at_one_position if found else pd.DataFrame(),
            "erasures": self.analysis.erasures(),
            "cosines": self.geometry.table(),
            "effect_norms": self.geometry.interaction,
            "beliefs": self.beliefs.prompts,
            "scores_by_level": self.beliefs.by_level,
            "folds": self.folds(),
            BY_PROMPT: self.analysis.by_prompt(self.acts.ids),
        }

    def artifacts(self) -> dict[str, object]:
        """Directions of every measurable contrast, and the centroids of the beliefs."""
        made: dict[str, object] = {"activations_checkpoint": self.acts.checkpoint}
        grids = {name: contrast.directions for name, contrast in self.contrasts.items()}
        made |= {f"directions_{name}": grid for name, grid in grids.items() if grid is not None}
        centroids = {"centroids_harm": self.beliefs.harm, "centroids_refusal": self.beliefs.refusal}
        return made | {name: centroid for name, centroid in centroids.items() if centroid is not None}

    def __repr__(self) -> str:
        from mechlens.studies.separate.verdict import separation_verdict

        verdict = separation_verdict(self.metrics())
        return lines(f"Separation in {self.acts.checkpoint.name}: {verdict.headline}", verdict.deciding)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.chosen())


def separate(
    model: LanguageModel,
    harmful: Prompts,
    harmless: Prompts,
    extra_harmless: Prompts = (),
    plan: SeparationPlan = SeparationPlan(),
    *,
    template: TemplateChoice = "tokenizer",
    judges: Sequence[Judge] = (),
    cache: Cache | None = None,
) -> Separation:
    """The whole study on one model.

    `harmful` and `harmless` are the contrast; `extra_harmless` prompts only fill the quadrants and the refusal
    contrasts, so that matched pairs stay matched. With few refusals, whatever needs them is not measurable.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SeparationPlan(resamples=50, permutations=10, random_directions=2, max_new_tokens=4)
    >>> study = ml.separate(model, harmful, harmless, [], plan)
    >>> ml.separation_verdict(study.metrics()).sentence != ""
    True
    """
    judges = judges or judges_of(plan.judge)
    extra = as_prompts(extra_harmless, name="extra")
    prompts = labelled(harmful, harmless, extra)
    more = {prompt.id for prompt in extra}
    contrasted = [prompt for prompt in prompts if prompt.id not in more]
    ours, theirs = ([prompt for prompt in contrasted if prompt.label == side] for side in (HARMFUL, HARMLESS))
    compare_sides(ours, theirs, (HARMFUL, HARMLESS))
    batch = tokenize(prompts, template_of(model, template))
    decided = once_settled(judges, loaded(model).tokenizer)
    answers = answers_to(model, batch, plan, decided=decided, cache=cache)
    rows = [i for i, prompt in enumerate(prompts) if prompt.label == HARMFUL]
    bare = batch.select(rows).without_post()
    without_post = answers_to(model, bare, plan, decided=decided, cache=cache)
    with phase("judging"):
        judged = judge_answers(prompts, answers, judges)
        judged_without = judge_answers(bare.prompts, without_post, judges)
    acts = collect(model, batch, positions=["inst", "post[*]"], cache=cache)
    with phase("statistics"):
        matched = {prompt.id for prompt in prompts} - {prompt.id for prompt in extra}
        return _measured(model, judged, judged_without, rows, acts, batch, matched, plan)


def _measured(
    model: LanguageModel,
    judged: JudgedAnswers,
    judged_without: JudgedAnswers,
    rows: Sequence[int],
    acts: Activations,
    batch: TokenBatch,
    matched: set[str],
    plan: SeparationPlan,
) -> Separation:
    """Every number, once all prompts are answered and read; `judged_without` the template are these `rows`."""
    surface = surface_of(model, batch)
    paired = torch.tensor([prompt.id in matched for prompt in judged.prompts])
    topics = [prompt.category for prompt in judged.prompts]
    analysis = analyse(acts, judged.quadrants(), paired, topics, surface, plan)
    judged, first_token = judge_first_token(model, judged, acts, analysis.folds[0][0].fitted)
    harm = analysis.harm.scores
    return Separation(
        judged=judged,
        first_token=first_token,
        analysis=analysis,
        within=_within(acts, analysis, paired.tolist(), surface, plan),
        geometry=measure_geometry(
            acts,
            judged.quadrants(),
            matched,
            level=harm.level("inst") if harm else acts.levels[len(acts.levels) // 2],
            seed=plan.seed,
        ),
        beliefs=measure_beliefs(acts, judged.quadrants(), analysis.folds[0], plan.seed, plan.resamples),
        without_template=_without_template(judged, judged_without, rows, analysis, plan),
        acts=acts,
        batch=batch,
        plan=plan,
    )


def _within(
    acts: Activations, analysis: Analysis, paired: Sequence[bool], surface: Surface, plan: SeparationPlan
) -> dict[str, OutOfFoldContrast]:
    """Contrasts of one factor inside a class of the other."""
    quadrants = analysis.places.quadrants
    # Matched prompts only: harm is contrasted where the words are alike but for it.
    matched = tuple(quadrant if own else "" for quadrant, own in zip(quadrants, paired, strict=True))
    questions = (
        Question("harmful.accepted", "accepted_harmful", "accepted_harmless", matched),
        Question("harmful.refused", "refused_harmful", "refused_harmless", matched),
        Question("refused.harmful", "refused_harmful", "accepted_harmful", quadrants),
        Question("refused.harmless", "refused_harmless", "accepted_harmless", quadrants),
    )
    return {q.name: measure_contrast(q, acts, analysis.folds, surface, plan) for q in questions}


def _without_template(
    judged: JudgedAnswers, without: JudgedAnswers, rows: Sequence[int], analysis: Analysis, plan: SeparationPlan
) -> WithoutTemplate:
    families = [judged.prompts[i].group for i in rows]
    full = torch.tensor([judged.refused[i] for i in rows]).double()
    rates = {
        "full_template": mean_estimate(full, families, plan.seed, plan.resamples),
        "no_post_tokens": mean_estimate(torch.tensor(without.refused).double(), families, plan.seed, plan.resamples),
    }
    inside = torch.tensor(judged.accepted) & ~torch.tensor([prompt.label == HARMFUL for prompt in judged.prompts])
    inside[[row for row, accepted in zip(rows, without.accepted, strict=True) if accepted]] = True
    served = without.answers.served
    agreed = None if served is None else served.agreement(plan.seed)
    return WithoutTemplate(rates, analysis.harm.auroc("inst", inside), agreed)


def prepare(config: Separate) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    require_served(config)
    if config.judge_model is not None:
        require_wrappable(config.judge_model)
    return prepare_harm_study(
        config, config, config.extra_harmless, config.wrap, new_tokens=config.max_new_tokens, least=MIN_FAMILIES
    )


def execute(config: Separate, sets: ContrastSets, writer: RunWriter) -> Separation:
    """The study on the configured model and prompts."""
    return separate(
        sets.model,
        sets.positive,
        sets.negative,
        sets.extra,
        config,
        template=sets.template,
        judges=_judges(config),
        cache=writer.cache,
    )


def _judges(config: Separate) -> tuple[Judge, ...]:
    """The chosen judge, both published lists, and a model where one is to stand beside them."""
    if config.judge_model is None:
        return judges_of(config.judge)
    model = load(config.judge_model, dtype=config.dtype, device=config.device)
    return (*judges_of(config.judge), ModelJudge(model, loaded(model).checkpoint.name))
