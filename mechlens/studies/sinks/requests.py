"""Harmful and harmless requests: sinks among named positions, and refusal and directions under every experiment."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.cache import Cache
from mechlens.methods.probing.beyond_words import levels_of
from mechlens.methods.progress import phase
from mechlens.methods.sinks.found import Sinks, find_sinks
from mechlens.methods.sinks.positions import position_mass
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.shared.quadrants import JudgedAnswers, judge_answers, refusal_tokens
from mechlens.studies.shared.sink_positions import Asked, asked_of, first_of_each, position_table
from mechlens.studies.sinks.config import SinkPlan
from mechlens.studies.sinks.experiments import Experiment
from mechlens.studies.sinks.passes import Home, Passes, hidden_table, under_experiments

EDITED = 12
"""Prompts of each class that every experiment is run on; all are answered and read."""


@dataclass(frozen=True)
class Requests:
    """What became of requests; of a model without a chat template there are none."""

    judged: JudgedAnswers = field(repr=False)
    tokens: RefusalTokens
    sinks: Sinks
    """Of the prompts that experiments are run on."""
    positions: pd.DataFrame
    """By place: attention of the answer, AUROC of harm and refusal there, and refusal where it is hidden."""
    effects: pd.DataFrame
    """By experiment: refusal log-odds, and what becomes of the directions."""


@phase("requests")
def asked_requests(
    model: LanguageModel, batch: TokenBatch, experiments: Sequence[Experiment], plan: SinkPlan, cache: Cache | None
) -> Requests:
    """The requests answered, their positions looked at, and all experiments on some of each class."""
    answers = answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache)
    judged = judge_answers(batch.prompts, answers, plan.judge)
    tokens = refusal_tokens(judged, range(len(batch.prompts)), loaded(model).tokenizer)
    acts = collect(model, batch, positions=["inst", "post[*]"], cache=cache)
    families = [one.group for one in batch.prompts]
    asked = asked_of([one.label for one in batch.prompts], judged.verdicts[judged.judge], families)
    chance = {"seed": plan.seed, "resamples": plan.resamples}
    table = position_table(position_mass(model, batch, answers.tokens), acts, asked, **chance)
    rows = first_of_each([one.label for one in batch.prompts], EDITED)
    some = batch.select(rows)
    sinks = find_sinks(model, some)
    passes = Passes(model, some, tokens.ids, _harmful(some), tuple(_homes(acts, asked, rows, plan.seed)))
    plain = passes.under()
    return Requests(
        judged, tokens, sinks, hidden_table(passes, plain, table, plan),
        under_experiments(passes, plain, experiments, sinks.places, plan),
    )  # fmt: skip


def _harmful(batch: TokenBatch) -> Bool[Tensor, " prompt"]:
    return torch.tensor([one.label == "harmful" for one in batch.prompts])


def _homes(acts: Activations, asked: Sequence[Asked], rows: Sequence[int], seed: int) -> list[Home]:
    """Harm at the request's last token and refusal at the template's, each at one level, of the prompts in `rows`."""
    found = []
    for one, position in zip(asked, ("inst", acts.positions[-1]), strict=True):
        if not one.measurable:
            continue
        own = [i for i in rows if i in one.rows]
        some = replace(
            one, rows=[rows.index(i) for i in own], positive=one.positive[[one.rows.index(i) for i in own]],
            families=tuple(one.families[one.rows.index(i)] for i in own),
        )  # fmt: skip
        if some.measurable:
            found.append(Home(some, position, _level(acts, one, position, seed), some.folds(seed)))
    return found


def _level(acts: Activations, one: Asked, position: str, seed: int) -> int:
    """The level that most folds of all prompts choose; of equals the lowest."""
    values: Float[Tensor, "prompt level d"] = acts.values[one.rows, :, acts.positions.index(position)]
    chosen = [level for part in levels_of(values, one.folds(seed)) for level in part]
    return acts.levels[max(sorted(set(chosen)), key=chosen.count)]
