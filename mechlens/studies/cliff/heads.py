"""Heads that write against refusal before the answer: chosen on validation traces, switched off on test traces."""

from dataclasses import dataclass, field

import pandas as pd

from mechlens.methods.activations.token_scores import Line, token_scores
from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.patching.heads import Head, chosen_heads, head_scores, without_heads
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.cliff.config import CliffPlan


@dataclass(frozen=True)
class HeadTables:
    """Empty where heads weren't looked at."""

    heads: pd.DataFrame = field(default_factory=pd.DataFrame)
    """What every head writes along refusal, and does alone, on validation traces."""
    ablation: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The score of test traces without some heads, and the loss on plain text."""


def heads_of(
    model: LanguageModel, choosing: TokenBatch, testing: TokenBatch, line: Line, plan: CliffPlan
) -> HeadTables:
    """What heads do on validation traces (`choosing`), and the score of test traces without those that do most."""
    found = head_scores(model, choosing, line)
    mean, alone = found.written.mean(dim=0), found.alone.mean(dim=0)
    heads = [
        {"layer": layer, "head": head, "written": float(mean[layer, head]), "alone": float(alone[layer, head])}
        for layer in range(mean.shape[0])
        for head in range(mean.shape[1])
    ]
    chosen: dict[tuple[str, float], tuple[Head, ...]] = {("none", 0.0): ()}
    for share in plan.heads:
        for which in ("negative", "positive", "random"):
            chosen[which, share] = chosen_heads(mean, share, which, seed=plan.seed)
    families = [prompt.group for prompt in testing.prompts]
    table = []
    for (which, share), own in chosen.items():
        with without_heads(model, own):
            final = token_scores(model, testing, {"refusal": line}).at("refusal", 0)
            loss = float(text_loss(model, PLAIN_TEXT).mean())
        score = mean_estimate(final, families, plan.seed, plan.resamples)
        table.append({"heads": which, "share": share, "n_heads": len(own), **score.row("score"), "plain_loss": loss})
    return HeadTables(pd.DataFrame(heads).assign(agreement=found.agreement), pd.DataFrame(table))
