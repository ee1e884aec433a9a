"""Are harmfulness and refusal two things? The separation study (Zhao et al. 2025, sections 2 and 3).

Every prompt is answered and judged; the residual stream at `inst` and at the template tokens after it is
collected at every level; directions are fitted on training families, levels chosen on validation, and
everything reported comes from test families.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judges_of
from mechlens.methods.behaviour.judges import Judge
from mechlens.methods.behaviour.model_judge import ModelJudge
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.effects import CosineCurve
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.load import load
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.driver import Preparation
from mechlens.studies.separate.config import Separate, SeparationPlan
from mechlens.studies.separate.geometry import Geometry, measure_geometry
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS, ContrastMeasurement, Surface, measure, surface_of
from mechlens.studies.shared.harm_sets import ContrastSets, labelled, prepare_harm_study
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.quadrants import (
    IN_NO_QUADRANT,
    QUADRANTS,
    FirstTokenJudgement,
    JudgedAnswers,
    judge_answers,
    judge_first_token,
)
from mechlens.studies.shared.two_beliefs import Beliefs, measure_beliefs

REFUSED, ACCEPTED = "refused", "accepted"
HARMFUL, HARMLESS = "harmful", "harmless"


@dataclass(frozen=True)
class Separation:
    """What the study found, and everything its numbers were made from."""

    judged: JudgedAnswers
    first_token: FirstTokenJudgement
    split: Split
    split_note: str
    contrasts: dict[str, ContrastMeasurement]
    """By name: harmful, refused, harmful.accepted, harmful.refused, refused.harmful, refused.harmless."""
    geometry: Geometry
    beliefs: Beliefs
    refusal_rates: dict[str, Estimate]
    """Share of all harmful prompts refused with the full template and without the tokens after `inst`; nothing is
    fitted for it, so no prompt is left out."""
    acts: Activations
    batch: TokenBatch
    plan: SeparationPlan

    @property
    def cosine(self) -> CosineCurve:
        """Harmfulness at `inst` against refusal at the last position."""
        return self.geometry.directions

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json; what can't be measured is there with its count."""
        last = self.acts.positions[-1]
        harmful, refused = self.contrasts["harmful"], self.contrasts["refused"]
        quadrants = self.judged.quadrants()
        counts = {name: float(quadrants.count(name)) for name in (*QUADRANTS, *IN_NO_QUADRANT)}
        if not counts["unfinished"]:
            del counts["unfinished"]  # runs of earlier versions have no such number
        missing = Estimate.missing(min(harmful.counts.values()))
        numbers = {
            "harmful_auroc.inst": harmful.auroc("inst"),
            "harmful_auroc.last": harmful.auroc(last),
            "token_identity_auroc.inst": harmful.baselines.get("token_identity_auroc.inst", missing),
            "token_identity_auroc.last": harmful.baselines.get(f"token_identity_auroc.{last}", missing),
            "tfidf_auroc": harmful.baselines.get("tfidf_auroc", missing),
            "mean_embedding_auroc": harmful.baselines.get("mean_embedding_auroc", missing),
            "refused_auroc.inst": refused.auroc("inst"),
            "refused_auroc.last": refused.auroc(last),
            "harmful_auroc.inst.accepted": self.contrasts["harmful.accepted"].auroc("inst"),
            "harmful_auroc.inst.refused": self.contrasts["harmful.refused"].auroc("inst"),
            "refused_auroc.last.harmful": self.contrasts["refused.harmful"].auroc(last),
            "refused_auroc.last.harmless": self.contrasts["refused.harmless"].auroc(last),
            "first_token_auroc": self.first_token.auroc,
        }
        numbers |= {f"n.{name}": Estimate.exact(n, len(self.judged.prompts)) for name, n in counts.items()}
        numbers |= {f"refusal_rate.{name}": rate for name, rate in self.refusal_rates.items()}
        return numbers | self.geometry.metrics() | self.beliefs.metrics()

    def table(self) -> pd.DataFrame:
        """Every contrast at every level and position."""
        return pd.concat([contrast.table() for contrast in self.contrasts.values()], ignore_index=True)

    def chosen(self) -> pd.DataFrame:
        """Every contrast at its chosen levels, with nulls."""
        return pd.concat([contrast.chosen() for contrast in self.contrasts.values()], ignore_index=True)

    def baselines(self) -> pd.DataFrame:
        """Surface baselines of every contrast."""
        rows = [
            {"contrast": name, "baseline": baseline, **estimate.row("auroc")}
            for name, contrast in self.contrasts.items()
            for baseline, estimate in contrast.baselines.items()
        ]
        return pd.DataFrame(rows)

    def agreement(self) -> pd.DataFrame:
        """Cohen's kappa of every two judges."""
        rows = [
            {"judge": judge, "other": other, **agreed.kappa.row("kappa")}
            for judge, other, agreed in self.judged.agreements(self.plan.seed)
        ]
        return pd.DataFrame(rows, columns=["judge", "other", "kappa", "low", "high"] if rows else None)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        ids = [prompt.id for prompt in self.judged.prompts]
        return {
            "quadrant_counts": self.judged.counts(),
            "answers": self.judged.table().assign(log_odds=self.first_token.log_odds.tolist()),
            "agreement": self.agreement(),
            "auroc_by_level": self.table(),
            "auroc_chosen": self.chosen(),
            "baselines": self.baselines(),
            "cosines": self.geometry.table(),
            "effect_norms": self.geometry.interaction,
            "beliefs": self.beliefs.prompts,
            "scores_by_level": self.beliefs.by_level,
            "split": pd.DataFrame({"id": ids, "part": self.split.parts()}),
        }

    def artifacts(self) -> dict[str, object]:
        """Directions of every measurable contrast, and the centroids of the beliefs."""
        detections = {name: contrast.detection for name, contrast in self.contrasts.items()}
        made: dict[str, object] = {"activations_checkpoint": self.acts.checkpoint}
        made |= {f"directions_{name}": held.directions for name, held in detections.items() if held is not None}
        centroids = {"centroids_harm": self.beliefs.harm, "centroids_refusal": self.beliefs.refusal}
        return made | {name: centroid for name, centroid in centroids.items() if centroid is not None}


def separate(
    model: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    extra_harmless: Sequence[Prompt],
    plan: SeparationPlan,
    *,
    template: ChatTemplate | None = None,
    judges: Sequence[Judge] = (),
    cache: Cache | None = None,
) -> Separation:
    """The whole study on one model.

    `harmful` and `harmless` are the contrast; `extra_harmless` prompts only fill the quadrants and the refusal
    contrasts, so that matched pairs stay matched. With few refusals, whatever needs them is not measurable.
    """
    judges = judges or judges_of(plan.judge)
    prompts = labelled(harmful, harmless, extra_harmless)
    batch = tokenize(prompts, template or template_of(model))
    answers = answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache)
    judged = judge_answers(prompts, answers, judges)
    acts = collect(model, batch, positions=["inst", "post[*]"], cache=cache)
    split, note = _split(judged, plan)
    judged, first_token = judge_first_token(model, judged, acts, split.train)
    paired = {prompt.id for prompt in (*harmful, *harmless)}
    contrasts = _contrasts(acts, judged, split, surface_of(model, batch), paired, plan)
    harm = contrasts["harmful"].detection
    return Separation(
        judged=judged,
        first_token=first_token,
        split=split,
        split_note=note,
        contrasts=contrasts,
        geometry=measure_geometry(
            acts,
            judged.quadrants(),
            paired,
            level=harm.at("inst").level if harm else acts.levels[len(acts.levels) // 2],
            seed=plan.seed,
        ),
        beliefs=measure_beliefs(acts, judged.quadrants(), split, plan.seed, plan.resamples),
        refusal_rates=_refusal_rates(model, judged, batch, plan, judges, cache),
        acts=acts,
        batch=batch,
        plan=plan,
    )


def _split(judged: JudgedAnswers, plan: SeparationPlan) -> tuple[Split, str]:
    """By family, keeping the quadrants' shares where each has enough prompts."""
    families = [prompt.group for prompt in judged.prompts]
    quadrants = judged.quadrants()
    if min(quadrants.count(name) for name in QUADRANTS) >= MIN_IN_A_CLASS:
        try:
            split = split_by_family(quadrants, families, fractions=FRACTIONS, seed=plan.seed)
        except UserError:
            pass  # too few families of some kind; the classes alone can always be kept
        else:
            return split, "families shared out by quadrant"
    labels = [prompt.label for prompt in judged.prompts]
    split = split_by_family(labels, families, fractions=FRACTIONS, seed=plan.seed)
    return split, "families shared out by class (some quadrant is too small to share out)"


def _contrasts(
    acts: Activations, judged: JudgedAnswers, split: Split, surface: Surface, paired: set[str], plan: SeparationPlan
) -> dict[str, ContrastMeasurement]:
    quadrants = judged.quadrants()
    harm = [prompt.label if prompt.id in paired else "" for prompt in judged.prompts]
    matched = [quadrant if label else "" for quadrant, label in zip(quadrants, harm, strict=True)]
    verdicts = judged.verdicts[judged.judge]
    questions: dict[str, tuple[Sequence[str], tuple[str, str]]] = {
        "harmful": (harm, (HARMFUL, HARMLESS)),
        "refused": (verdicts, (REFUSED, ACCEPTED)),
        # Matched prompts only: harm is contrasted where the words are alike but for it.
        "harmful.accepted": (matched, ("accepted_harmful", "accepted_harmless")),
        "harmful.refused": (matched, ("refused_harmful", "refused_harmless")),
        "refused.harmful": (quadrants, ("refused_harmful", "accepted_harmful")),
        "refused.harmless": (quadrants, ("refused_harmless", "accepted_harmless")),
    }
    return {
        name: measure(name, acts, labels, contrast, split, surface, plan)
        for name, (labels, contrast) in questions.items()
    }


def _refusal_rates(
    model: LanguageModel,
    judged: JudgedAnswers,
    batch: TokenBatch,
    plan: SeparationPlan,
    judges: Sequence[Judge],
    cache: Cache | None,
) -> dict[str, Estimate]:
    """Refusal of harmful prompts with the whole template, and with the prompt cut after `inst` (Table 1)."""
    rows = [i for i, prompt in enumerate(judged.prompts) if prompt.label == HARMFUL]
    cut = answer(model, batch.select(rows).without_post(), max_new_tokens=plan.max_new_tokens, cache=cache)
    without = judge_answers([judged.prompts[i] for i in rows], cut, judges)
    families = [judged.prompts[i].group for i in rows]
    full = torch.tensor([judged.refused[i] for i in rows]).double()
    return {
        "full_template": mean_estimate(full, families, plan.seed, plan.resamples),
        "no_post_tokens": mean_estimate(torch.tensor(without.refused).double(), families, plan.seed, plan.resamples),
    }


def prepare(config: Separate) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    return prepare_harm_study(config, config, config.extra_harmless, config.wrap)


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
