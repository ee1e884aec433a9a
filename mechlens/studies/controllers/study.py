"""A steering controller beside its rivals: fitted, given the best strength on validation prompts, tested elsewhere.

Hegazy et al. 2025 (Guiding Giants). Test prompts are held-out ones of the training sources, those of another source,
and, where templates are given, the held-out ones inside jailbreak templates.
"""

import math
from dataclasses import dataclass, field, replace

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.progress import phase
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.controllers.controller import Controller
from mechlens.models.bridge import loaded
from mechlens.prompts.batch import tokenize
from mechlens.runs.writer import RunWriter
from mechlens.studies.controllers.asked import Asked, prepare_asked
from mechlens.studies.controllers.config import RivalsPlan, SteerTrain
from mechlens.studies.controllers.measured import (
    answered,
    answers_table,
    by_first_token,
    chosen_strengths,
    decisions,
    refusals_by_source,
    strengths_tried,
    totals,
)
from mechlens.studies.controllers.rivals import CONTROLLER, Rivals, rivals_of
from mechlens.studies.controllers.verdict import FEWEST, SteeringVerdict, steering_verdict
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.quadrants import judge_answers, refusal_tokens


@dataclass(frozen=True)
class ControllerResult:
    """All that was found."""

    verdict: SteeringVerdict
    rivals: Rivals
    strengths: dict[str, float]
    """Of each rival, chosen on validation prompts."""
    choice: pd.DataFrame
    """Rival, strength, refused harmful and harmless validation prompts, their difference."""
    refusals: pd.DataFrame
    """Rival, where test prompts come from, label, and the share that is refused."""
    totals: pd.DataFrame
    """Rival, refused harmful minus refused harmless over all test prompts, damage, length and repetition."""
    decisions: pd.DataFrame
    """Of each test prompt: the controller's gate, the published one's, and whether the condition holds."""
    weights: pd.DataFrame
    """Mean layer weights, by controller, layer and label."""
    gate_auroc: Estimate
    """Of the gate for harmful test prompts."""
    chance: pd.DataFrame
    """Of the first answer token: orders of the layer weights and random directions."""
    answers: pd.DataFrame
    controller: Controller = field(repr=False)
    """With the numbers that speak for it."""

    def metrics(self) -> dict[str, Estimate]:
        """What decided, and the controller's refusals."""
        own = self.verdict
        found = {
            "gap.controller": own.controller, "gap.constant": own.constant, "beyond_constant": own.beyond_constant,
            "beyond_none": own.beyond_none,
            "beyond_shuffled": own.beyond_shuffled,
        }  # fmt: skip
        found["auroc.gate"] = self.gate_auroc
        if own.beyond_shuffled.measurable:
            found["shuffled_p"] = Estimate.exact(own.shuffled_p, own.beyond_shuffled.n)
        for _, row in self.refusals[self.refusals["rival"] == CONTROLLER].iterrows():
            name = f"refused.{row['prompts'].replace(' ', '_')}.{row['label']}"
            found[name] = Estimate.of_beside(row, "refused", row["n"])
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        return {
            "choice": self.choice, "refusals": self.refusals, "totals": self.totals, "decisions": self.decisions,
            "weights": self.weights, "chance": self.chance, "answers": self.answers,
        }  # fmt: skip

    def artifacts(self) -> dict[str, object]:
        """The controller, as `ml.open` reads it, and the one as published."""
        return {"controller": self.controller, "published_controller": self.rivals.published}


def prepare(config: SteerTrain) -> Preparation[Asked]:
    """Prompts and model; UserError for whatever can't be had."""
    if not config.strengths or not all(0 < one < math.inf for one in config.strengths):
        raise UserError("strengths are shares of the residual norm; give one or more above 0, such as --strengths 0.1")
    if not 0 <= config.heads <= 1:
        raise UserError(f"heads is {config.heads:g}; it is a share of all heads, from 0 to 1")
    return prepare_asked(config, FEWEST)


def execute(config: SteerTrain, asked: Asked, writer: RunWriter) -> ControllerResult:
    """The study as configured."""
    return steering_rivals(asked, config, cache=writer.cache)


@phase("steering controllers")
def steering_rivals(asked: Asked, plan: RivalsPlan, *, cache: Cache | None = None) -> ControllerResult:
    """The controller and its rivals on test prompts."""
    model, split = asked.model, asked.split
    batch = tokenize(asked.prompts, asked.template)
    known = sorted({*split.train, *split.validation})
    said = answer(model, batch.select(known), max_new_tokens=plan.max_new_tokens, cache=cache)
    judged = judge_answers([asked.prompts[i] for i in known], said, plan.judge)
    tokens = refusal_tokens(judged, range(len(known)), loaded(model).tokenizer).ids
    rivals = rivals_of(model, batch, split.train, split.validation, plan, asked.template, tokens, cache=cache)
    choice = strengths_tried(model, batch.select(split.validation), rivals, plan, cache)
    strengths = chosen_strengths(choice)
    where = [(name, prompt) for name, part in asked.tests.items() for prompt in part]
    test = tokenize([prompt for _, prompt in where], asked.template)
    places = [name for name, _ in where]
    answers, refused = answered(model, test, rivals, strengths, plan, cache)
    harmful = torch.tensor([prompt.label == "harmful" for prompt in test.prompts])
    families = [prompt.group for prompt in test.prompts]
    strength = strengths[CONTROLLER]
    first, chance = by_first_token(model, test, rivals, strength, harmful, tokens, plan, cache)
    verdict = steering_verdict(refused, first, harmful, families, resamples=plan.resamples, seed=plan.seed)
    decided, weights = decisions(model, test, rivals, places)
    evidence = {"strength": strengths[CONTROLLER], "gap": verdict.controller.value, "n": float(len(places))}
    return ControllerResult(
        verdict=verdict, rivals=rivals, strengths=strengths, choice=choice,
        refusals=refusals_by_source(refused, places, test.prompts, plan),
        totals=totals(model, asked.template, test, rivals, strengths, answers, refused, plan),
        decisions=decided, weights=weights, chance=chance,
        gate_auroc=auroc_estimate(torch.tensor(decided["gate"].to_numpy()), harmful, families),
        answers=answers_table(answers, refused, test.prompts, places),
        controller=replace(rivals.controller, evidence=evidence),
    )  # fmt: skip
