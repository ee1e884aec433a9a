"""What stands beside the cliff: harmless requests, shuffled thoughts, harm, other probes, what the model then does."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechlens.methods.activations.token_scores import Line, TokenScores, token_scores
from mechlens.methods.activations.trace_tokens import THINKING, Trace, trace_batch
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.statistics.cliff import plateau
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.cliff.config import CliffPlan
from mechlens.studies.cliff.lines import ELSEWHERE, HARM, LOGISTIC, REFUSAL

CLIFF = 0.5
"""A trace has a cliff where its drop is this much above the mean of harmless ones: half of the way to complied."""


def drops_of(scores: TokenScores, line: str) -> Tensor:
    """Plateau minus final of every trace along a line; NaN where a thought is too short."""
    thinking, values, final = scores.inside(THINKING), scores.of(line), scores.at(line, 0)
    return torch.stack([plateau(row[own]) - last for own, row, last in zip(thinking, values, final, strict=True)])


@dataclass(frozen=True)
class Tested:
    """Test traces with what is known of them."""

    traces: tuple[Trace, ...]
    harmful: Tensor
    refused: Tensor

    @property
    def families(self) -> list[str]:
        """Of their prompts."""
        return [one.prompt.group for one in self.traces]


def controls(
    model: LanguageModel,
    template: ChatTemplate,
    test: Tested,
    drops: Mapping[str, Tensor],
    lines: Mapping[str, Line],
    plan: CliffPlan,
) -> dict[str, Estimate]:
    """By name; harmful traces unless the name says otherwise."""
    families, harmful, refused = test.families, test.harmful, test.refused
    drop, there = drops[REFUSAL], ~drops[REFUSAL].isnan()

    def mean(values: Tensor, rows: Tensor) -> Estimate:
        own = rows & ~values.isnan()
        return mean_estimate(values[own], _of(families, own), plan.seed, plan.resamples)

    beyond = drop - drop[there & ~harmful].mean()
    many = harmful & there
    kept = _of(families, many)
    found = {
        "drop.harmless": mean(drop, ~harmful),
        "drop.shuffled": mean(_shuffled_drops(model, template, test.traces, lines[REFUSAL], plan.seed), harmful),
        "drop.harm": mean(drops[HARM], harmful),
        "drop.logistic": mean(drops[LOGISTIC], harmful),
        "drop.complied_harmful": mean(drop, harmful & ~refused),
        "drop.refused_harmful": mean(drop, harmful & refused),
        "share.cliff": rate_estimate(beyond[many] > CLIFF, kept, plan.seed, plan.resamples),
        "auroc.drop_complied": auroc_estimate(drop[many], ~refused[many], kept),
    }
    return found | ({"drop.elsewhere": mean(drops[ELSEWHERE], harmful)} if ELSEWHERE in drops else {})


def _of(families: Sequence[str], rows: Tensor) -> list[str]:
    return [family for family, own in zip(families, rows.tolist(), strict=True) if own]


def _shuffled_drops(
    model: LanguageModel, template: ChatTemplate, traces: Sequence[Trace], line: Line, seed: int
) -> Tensor:
    """The drops of the same traces with the words of each thought in any order."""
    draw = random.Random(seed)
    mixed = [replace(one, thinking=_shuffled(one.thinking, draw)) for one in traces]
    batch = trace_batch(model, mixed, template=template)
    return drops_of(token_scores(model, batch, {REFUSAL: line}), REFUSAL)


def _shuffled(thinking: str, draw: random.Random) -> str:
    words = thinking.split()
    return " ".join(draw.sample(words, len(words)))
