"""The cliff as a judge: which traces of a pool a model should be repaired on (Yin et al. 2025, Cliff-as-a-Judge).

The model thinks about each prompt of the pool itself; chosen are the largest drops, and beside them the lowest final
scores, the highest plateaus and as many at random. What is written is a file for `finetune --recipe repair`: the
model's own thought, and the pool's safe answer after it.
"""

import random
from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.methods.activations.token_scores import Line, token_scores
from mechlens.methods.activations.trace_tokens import Trace, trace_batch
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.cliff.config import CliffPlan
from mechlens.studies.cliff.controls import drops_of
from mechlens.studies.cliff.lines import REFUSAL
from mechlens.studies.cliff.traces import Traces, written_traces


def repair_tables(
    model: LanguageModel, pool: Traces, template: ChatTemplate, line: Line, plan: CliffPlan, cache: Cache | None
) -> dict[str, pd.DataFrame]:
    """By name: `pool`, every prompt's plateau, final and drop, and `repair_cliff`, `_final`, `_plateau`, `_random`.

    UserError where the model thinks about none of them.
    """
    prompts = [one.prompt for one in pool.kept]
    own = written_traces(model, prompts, template, new_tokens=plan.thinking_tokens, cache=cache).kept
    if not own:
        raise UserError(f"the model has no thought that ends about any of the {len(prompts)} prompts of the pool")
    table = scored_pool(model, pool, own, template, line, cache)
    return {"pool": table, **chosen_tables(table, plan.pool_share, plan.seed)}


def scored_pool(
    model: LanguageModel,
    pool: Traces,
    own: Sequence[Trace],
    template: ChatTemplate,
    line: Line,
    cache: Cache | None,
) -> pd.DataFrame:
    """One row for each of the model's own traces, with the pool's answer; none where a thought has no plateau."""
    scores = token_scores(model, trace_batch(model, own, template=template), {REFUSAL: line}, cache=cache)
    final, drop = scores.at(REFUSAL, 0), drops_of(scores, REFUSAL)
    safe = {one.prompt.id: one.answer for one in pool.kept}
    table = pd.DataFrame({
        "id": [one.prompt.id for one in own], "prompt": [one.prompt.text for one in own],
        "system": [one.prompt.system for one in own], "category": [one.prompt.category for one in own],
        "thinking": [one.thinking for one in own], "answer": [safe[one.prompt.id] for one in own],
        "own_answer": [one.answer for one in own], "plateau": (drop + final).tolist(), "final": final.tolist(),
        "drop": drop.tolist(),
    })  # fmt: skip
    return table[~torch.isnan(drop).numpy()].reset_index(drop=True)


def chosen_tables(table: pd.DataFrame, share: float, seed: int) -> Mapping[str, pd.DataFrame]:
    """The share of the pool's rows that each ranking puts first, and as many at random."""
    n = max(1, round(share * len(table)))
    picked = random.Random(seed).sample(range(len(table)), n) if len(table) else []
    found = {
        "cliff": table.sort_values("drop", ascending=False, kind="stable").head(n),
        "final": table.sort_values("final", kind="stable").head(n),
        "plateau": table.sort_values("plateau", ascending=False, kind="stable").head(n),
        "random": table.iloc[sorted(picked)],
    }
    return {f"repair_{name}": rows.drop(columns=["own_answer"]).reset_index(drop=True) for name, rows in found.items()}
