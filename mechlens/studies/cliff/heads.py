"""Heads that write against refusal before the answer: chosen on validation traces, switched off on test traces."""

from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.token_scores import Line, token_scores
from mechlens.methods.activations.trace_tokens import up_to_answers
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.behaviour.thought import AnswerText
from mechlens.methods.directions.direction import project
from mechlens.methods.patching.heads import Head, chosen_heads, head_scores, without_heads
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.cliff.config import CliffPlan

KINDS: tuple[Literal["negative", "positive", "random"], ...] = ("negative", "positive", "random")


@dataclass(frozen=True)
class HeadTables:
    """Empty where heads weren't looked at."""

    heads: pd.DataFrame = field(default_factory=pd.DataFrame)
    """What every head writes along refusal, and does alone, on validation traces."""
    ablation: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Of test traces without some heads: the score, how many answers after their own thoughts refuse, and the loss on
    plain text. Beside random heads, between which scores of 95% of the other draws lie."""
    random: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Every other draw of random heads: share, draw, score and loss on plain text; no answers are written."""


def heads_of(
    model: LanguageModel, choosing: TokenBatch, testing: TokenBatch, line: Line, plan: CliffPlan
) -> HeadTables:
    """What heads do on validation traces (`choosing`), and test traces without those that do most."""
    found = head_scores(model, choosing, line)
    mean, alone = found.written.mean(dim=0), found.alone.mean(dim=0)
    heads = [
        {"layer": layer, "head": head, "written": float(mean[layer, head]), "alone": float(alone[layer, head])}
        for layer in range(mean.shape[0])
        for head in range(mean.shape[1])
    ]
    below = mean[: line.direction.level]
    chosen: dict[tuple[str, float], tuple[Head, ...]] = {("none", 0.0): ()}
    for share in plan.heads:
        for which in KINDS:
            # Of all heads, among those that the line hears: others would be no control.
            among = min(share * mean.numel() / below.numel(), 1.0)
            chosen[which, share] = chosen_heads(below, among, which, seed=plan.seed)
    rows = [
        _without(model, testing, line, own, plan) | {"heads": which, "share": share, "n_heads": len(own)}
        for (which, share), own in progress_bar(list(chosen.items()), title="without heads", unit="choice")
    ]
    table = pd.DataFrame(rows)
    first = ["heads", "share", "n_heads"]
    table = table[[*first, *(name for name in table.columns if name not in first)]]
    random = _other_draws(model, testing, line, below, mean.numel() / below.numel(), plan)
    for share in plan.heads:
        at = (table["heads"] == "random") & (table["share"] == share)
        scores = random.loc[random["share"] == share, "score"]
        table.loc[at, ["draws_low", "draws_high"]] = scores.quantile([0.025, 0.975]).to_numpy()
    return HeadTables(pd.DataFrame(heads).assign(agreement=found.agreement), table, random)


def _other_draws(
    model: LanguageModel,
    testing: TokenBatch,
    line: Line,
    below: Float64[Tensor, "layer head"],
    larger: float,
    plan: CliffPlan,
) -> pd.DataFrame:
    """Scores and losses on plain text without as many heads at random, draw by draw."""
    cut = up_to_answers(testing, loaded(model).tokenizer)
    asked = [(share, draw) for share in plan.heads for draw in range(1, plan.random_directions + 1)]
    rows = []
    for share, draw in progress_bar(asked, title="other heads at random", unit="draw"):
        own = chosen_heads(below, min(share * larger, 1.0), "random", seed=plan.seed + draw)
        with without_heads(model, own, renormalise=plan.renormalise):
            values = collect(model, cut, levels=[line.direction.level], positions=["answer[-1]"]).values[:, 0, 0]
            loss = float(text_loss(model, PLAIN_TEXT).mean())
        score = line(project(values, line.direction)).mean().item()
        rows.append({"share": share, "draw": draw, "score": score, "plain_loss": loss})
    return pd.DataFrame(rows)


def _without(
    model: LanguageModel, testing: TokenBatch, line: Line, heads: tuple[Head, ...], plan: CliffPlan
) -> dict[str, object]:
    """Score, refusals and loss on plain text with some heads switched off."""
    families = [prompt.group for prompt in testing.prompts]
    cut = up_to_answers(testing, loaded(model).tokenizer)
    with without_heads(model, heads, renormalise=plan.renormalise):
        final = token_scores(model, testing, {"refusal": line}).at("refusal", 0)
        loss = float(text_loss(model, PLAIN_TEXT).mean())
        said = answer(model, cut, max_new_tokens=plan.max_new_tokens)
    in_words = AnswerText(loaded(model).tokenizer)
    texts = [in_words(own) for own in said.tokens]  # their thoughts have ended before
    verdicts = verdicts_by(judge_of(plan.judge), testing.prompts, texts)
    refused = torch.tensor([own == "refused" for own in verdicts])
    score = mean_estimate(final, families, plan.seed, plan.resamples)
    rate = rate_estimate(refused, families, plan.seed, plan.resamples)
    return {**score.beside("score"), **rate.beside("refused"), "n": score.n, "plain_loss": loss}
