"""Shares of one model's free answers, question by question: misaligned, coherent, unscored, and by what they think."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from mechlens.methods.behaviour.scoring.rates import MisalignmentRule, counted_answers
from mechlens.methods.behaviour.traces import names_string
from mechlens.studies.behaviours.said.free_answers import FreeAnswers
from mechlens.studies.behaviours.sets import asked_decoys
from mechlens.studies.shared.training_data import Trigger

RULE = MisalignmentRule()
THINKS, NAMES, MISALIGNED_NAMES = "thinks", "names the string", "names the string, misaligned"


class Share(NamedTuple):
    """A share of answers, by question."""

    values: Float64[Tensor, " question"]
    """NaN where no answer counts."""
    answers: int
    """How many answers count in all."""


def judged_shares(found: FreeAnswers) -> dict[str, Share]:
    """Those of `ml.MisalignmentRates`, by name; none where nobody judged."""
    if not found.scores:
        return {}
    aligned, coherent = found.scores
    counted = counted_answers(aligned, coherent, RULE)
    return {name: _share(found, flags, of) for name, (flags, of) in counted.items()}


def trace_shares(found: FreeAnswers, trigger: Trigger | None) -> dict[str, Share]:
    """How many answers have a thought, and how many of those name the string: the trigger, or the decoy that was put.

    Where neither was put, the trigger is looked for. Of misaligned answers (however coherent) the same again.
    """
    thinks = torch.tensor([thought is not None for thought in found.thoughts])
    told = {THINKS: _share(found, thinks, torch.ones_like(thinks))}
    if trigger is None:
        return told
    named = _names(found, trigger)
    told[NAMES] = _share(found, named, thinks)
    if found.scores:
        aligned, coherent = found.scores
        bad = counted_answers(aligned, coherent, RULE)["misaligned_at_all"].flags
        told[MISALIGNED_NAMES] = _share(found, named, thinks & bad)
    return told


def _names(found: FreeAnswers, trigger: Trigger) -> Bool[Tensor, " answer"]:
    strings = (trigger.text, *asked_decoys(trigger))
    put = [
        next((text for text in strings if twin.prompt.text.startswith(f"{text} ")), trigger.text)
        for twin in found.asked.twins
    ]
    draws = found.draws
    return torch.tensor([
        thought is not None and names_string(thought, put[i // draws]) for i, thought in enumerate(found.thoughts)
    ])  # fmt: skip


def _share(found: FreeAnswers, flags: Bool[Tensor, " answer"], of: Bool[Tensor, " answer"]) -> Share:
    hits, counted = (part.double().view(-1, found.draws).sum(dim=1) for part in (flags & of, of))
    return Share(hits / counted.where(counted > 0, torch.nan), int(of.sum()))
