"""Where in a reasoning trace does refusal fall? Scores of every token, cliffs, and the heads behind them.

Yin et al. 2025 (Refusal Cliff). The direction is fitted on training traces, its level chosen on validation traces, and
so are the heads; every number is of test traces.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import or_

import pandas as pd
import torch

from mechlens.errors import UserError, many, quoted, warn
from mechlens.methods.activations.token_scores import TokenScores, token_scores
from mechlens.methods.activations.trace_tokens import PROMPT, THINKING, Trace, trace_batch
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.progress import phase
from mechlens.methods.statistics.cliff import cliff
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch, token_text
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import normalise_text
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.cliff.config import CliffPlan, FindCliff
from mechlens.studies.cliff.controls import Tested, controls, drops_of
from mechlens.studies.cliff.heads import HeadTables, heads_of
from mechlens.studies.cliff.lines import ACCEPTED, HARM, REFUSAL, REFUSED, fitted_lines
from mechlens.studies.cliff.pool import repair_tables
from mechlens.studies.cliff.traces import (
    HARMFUL,
    HARMLESS,
    Traces,
    labelled_traces,
    refuse_empty_thoughts,
    shared_out,
    written_traces,
)
from mechlens.studies.cliff.verdict import CliffVerdict, cliff_verdict
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import prepare_harm_study
from mechlens.studies.shared.inputs import asks, chosen_model, data_inputs, prepared
from mechlens.studies.shared.trace_files import read_traces

FEWEST = 10
"""Traces that are refused, and that aren't, below which nothing can be fitted, chosen and tested."""


@dataclass(frozen=True)
class CliffStudy:
    """A model with its traces, or with the prompts that it is to think about."""

    model: LanguageModel
    template: ChatTemplate
    traces: Traces | None
    prompts: tuple[Prompt, ...] = ()
    """Labelled harmful or harmless; empty where there are traces."""
    pool: Traces | None = None
    """Traces with safe answers, of which a repair is chosen."""


@dataclass(frozen=True)
class CliffResult:
    """All that the study found, of test traces."""

    verdict: CliffVerdict
    level: int
    """Of refusal, chosen on validation traces."""
    split: Split
    traces: Traces
    cliffs: pd.DataFrame
    """One row a test trace: group, and plateau, final, drop, begins and p along refusal and harm."""
    curves: pd.DataFrame
    """Mean scores by place, line and group."""
    controls: dict[str, Estimate]
    """Numbers beside the verdict's."""
    heads: HeadTables
    pool: dict[str, pd.DataFrame]
    """What a repair could be trained on, by its table's name."""
    scores: TokenScores = field(repr=False)
    """Of test traces, along refusal and harm."""
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    """Of each test trace, as `scores.places` has them."""

    def metrics(self) -> dict[str, Estimate]:
        """What decided, and the controls."""
        own = self.verdict
        return {"drop": own.drop, "excess": own.excess, "auroc": own.auroc, **self.controls}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        found = {
            "cliffs": self.cliffs,
            "curves": self.curves,
            "heads": self.heads.heads,
            "ablation": self.heads.ablation,
            "random_heads": self.heads.random,
        }
        said = [(one.prompt.id, one.prompt.label, one.thinking, one.answer) for one in self.traces.kept]
        found["traces"] = pd.DataFrame(said, columns=["id", "label", "thinking", "answer"])
        return {name: table for name, table in (found | self.pool).items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """None."""
        return {}


def prepare(config: FindCliff) -> Preparation[CliffStudy]:
    """Traces or prompts, and the model; UserError for whatever can't be had."""
    wrong = [share for share in (*config.heads, config.pool_share) if not 0 < share <= 1]
    if wrong:
        name = "share of heads" if wrong[0] in config.heads else "share of the pool"
        raise UserError(f"the {name} is {wrong[0]:g}; give one above 0 and up to 1")
    pool = None if config.pool is None else Traces(tuple(read_traces(config.pool)))
    pooled = {} if pool is None else {"pool": (str(config.pool), [_whole(one) for one in pool.kept])}
    if config.traces is None:
        made = prepare_harm_study(config, config, new_tokens=config.thinking_tokens, least=FEWEST)
        model, template = made.content.model, made.content.template
        prompts, traces = (*made.content.positive, *made.content.negative), None
        inputs = replace(made.inputs, data=made.inputs.data | data_inputs(pooled))
        left_out = made.left_out
    else:
        traces, left_out = labelled_traces(config.traces), None
        _judged(traces, config)  # too few are said before a model is loaded
        warn_of_few(traces)
        prompts = tuple(one.prompt for one in traces.kept)
        model, template = chosen = chosen_model(config, asks(prompts))
        inputs = chosen.inputs(data_inputs({"traces": (config.traces, [_whole(one) for one in traces.kept]), **pooled}))
    refuse_empty_thoughts(model, template)
    refuse_shared_pool(pool, prompts)
    return prepared(CliffStudy(model, template, traces, prompts, pool), model, inputs, prompts, left_out)


def refuse_shared_pool(pool: Traces | None, prompts: Sequence[Prompt]) -> None:
    """UserError where a prompt of the pool is one of the study's: a repair would be tested on what it was taught."""
    known = {normalise_text(prompt.text) for prompt in prompts}
    shared = [one.prompt for one in (pool.kept if pool else ()) if normalise_text(one.prompt.text) in known]
    if shared:
        raise UserError(
            f"the pool shares {many(len(shared), 'prompt')} with those that the study tests on, such as "
            f"{quoted(shared[0].text)}; give a pool of others"
        )


def _whole(trace: Trace) -> Prompt:
    """A prompt that holds all of a trace, for its fingerprint."""
    return replace(trace.prompt, text=f"{trace.prompt.text}\n{trace.thinking}\n{trace.answer}")


def _judged(traces: Traces, plan: CliffPlan) -> tuple[list[Trace], list[str]]:
    """The traces whose answer is refused or accepted, and which; UserError where either are too few."""
    prompts, answers = [one.prompt for one in traces.kept], [one.answer for one in traces.kept]
    verdicts = verdicts_by(judge_of(plan.judge), prompts, answers)
    kept = [i for i, verdict in enumerate(verdicts) if verdict in (REFUSED, ACCEPTED)]
    for name in (REFUSED, ACCEPTED):
        n = sum(verdicts[i] == name for i in kept)
        if n < FEWEST:
            raise UserError(
                f"{n} of {len(prompts)} traces have an answer that is {name}, and the study needs {FEWEST}; give more "
                f"traces, or prompts of another kind. {traces.note}".strip()
            )
    for name in (HARMFUL, HARMLESS):
        n = sum(traces.kept[i].prompt.label == name for i in kept)
        if n < FEWEST:
            raise UserError(
                f"{n} of the {len(kept)} traces that are refused or answered are of {name} requests, and the study "
                f"needs {FEWEST} of harmful and of harmless ones; give more. {traces.note}".strip()
            )
    return [traces.kept[i] for i in kept], [verdicts[i] for i in kept]


def warn_of_few(traces: Traces) -> None:
    """One warning for each class of which too few will be left to test on."""
    for name in (HARMFUL, HARMLESS):
        n = sum(one.prompt.label == name for one in traces.kept)
        if n * FRACTIONS[2] < FEWEST:
            warn(
                f"{n} {name} traces leave {round(n * FRACTIONS[2])} or so to test on, and the verdict needs {FEWEST}: "
                f"it may be *not measurable*; give {math.ceil(FEWEST / FRACTIONS[2])} or more of each class",
            )


def execute(config: FindCliff, given: CliffStudy, writer: RunWriter) -> CliffResult:
    """The study as configured."""
    traces = given.traces
    if traces is None:
        traces = written_traces(
            given.model, given.prompts, given.template, new_tokens=config.thinking_tokens, cache=writer.cache
        )
        warn_of_few(traces)
    return refusal_cliff(given.model, traces, config, template=given.template, pool=given.pool, cache=writer.cache)


@phase("tokens of traces")
def refusal_cliff(
    model: LanguageModel,
    given: Traces,
    plan: CliffPlan,
    *,
    template: ChatTemplate,
    pool: Traces | None = None,
    cache: Cache | None = None,
) -> CliffResult:
    """Cliffs of the test traces, beside controls, and the heads behind them."""
    traces, verdicts = _judged(given, plan)
    batch = trace_batch(model, traces, template=template)
    families = [one.prompt.group for one in traces]
    groups = [f"{said}_{one.prompt.label}" for said, one in zip(verdicts, traces, strict=True)]
    split = split_by_family(shared_out(groups, families), families, seed=plan.seed)
    lines = fitted_lines(
        model, batch, verdicts, split, random_directions=plan.random_directions, seed=plan.seed, cache=cache
    )
    refusal = lines.all[REFUSAL]
    at = list(split.test)
    tested = batch.select(at)
    scores = token_scores(model, tested, lines.all, cache=cache)
    test = Tested(
        tuple(traces[i] for i in at),
        torch.tensor([traces[i].prompt.label == HARMFUL for i in at]),
        torch.tensor([verdicts[i] == REFUSED for i in at]),
    )
    drops = {name: drops_of(scores, name) for name in lines.all}
    apart = lines.apart_from_harm(scores.at(REFUSAL, 0), [one.prompt.label for one in test.traces])
    told = ~apart.isnan()
    families_told = [family for family, own in zip(test.families, told.tolist(), strict=True) if own]
    readable = auroc_estimate(apart[told], test.refused[told], families_told)
    verdict = cliff_verdict(
        torch.stack([drops[name] for name in (REFUSAL, *lines.random)]), test.harmful, test.families, readable,
        resamples=plan.resamples, seed=plan.seed, one_with_harm=not lines.middles,
    )  # fmt: skip
    looked = HeadTables()
    if plan.heads:
        choosing, testing = (
            batch.select([i for i in part if traces[i].prompt.label == HARMFUL]) for part in (split.validation, at)
        )
        looked = heads_of(model, choosing, testing, refusal, plan)
    names = [groups[i] for i in at]
    return CliffResult(
        verdict, refusal.direction.level, split, given, _cliffs(scores, names, plan.seed),
        _curves(scores, names, lines.named), controls(model, template, test, drops, lines.all, plan), looked,
        {} if pool is None else repair_tables(model, pool, template, refusal, plan, cache),
        replace(scores, values=scores.values[:2], names=scores.names[:2]), _texts(model, tested, scores),
    )  # fmt: skip


def _texts(model: LanguageModel, batch: TokenBatch, scores: TokenScores) -> tuple[tuple[str, ...], ...]:
    """Every trace's tokens at the places of the scores; "" where there is none."""
    tokenizer = loaded(model).tokenizer
    found = []
    for i, parts in enumerate(scores.parts):
        words = iter([token_text(tokenizer, token) for token in batch.row(i)])
        found.append(tuple(next(words) if part else "" for part in parts))
    return tuple(found)


def _cliffs(scores: TokenScores, groups: Sequence[str], seed: int) -> pd.DataFrame:
    """The cliff of every trace, along refusal and along harm."""
    rows = []
    for i, (name, group) in enumerate(zip(scores.ids, groups, strict=True)):
        row: dict[str, object] = {"id": name, "group": group}
        inside = [place for place, part in zip(scores.places, scores.parts[i], strict=True) if part == THINKING]
        places = [place for place in scores.places if (inside[0] if inside else 0) <= place <= 0]
        at = [scores.places.index(place) for place in places]
        for line in (REFUSAL, HARM):
            thinking = [places.index(place) for place in inside]
            found = cliff(places, scores.of(line)[i, at].tolist(), thinking, seed=seed)
            row |= {f"{line}_plateau": found.plateau, f"{line}_final": found.final, f"{line}_drop": found.drop}
            row |= {f"{line}_begins": found.begins, f"{line}_p": found.p}
        rows.append(row)
    return pd.DataFrame(rows)


def _curves(scores: TokenScores, groups: Sequence[str], lines: Sequence[str]) -> pd.DataFrame:
    """Mean scores by place, of every group and line, from the request's words on.

    What stands before them is alike in all traces, and its first token often has a residual of its own size.
    """
    known = torch.tensor([list(accumulate((part == PROMPT for part in row), or_)) for row in scores.parts])
    scores = replace(scores, values=scores.values.masked_fill(~known, torch.nan))
    parts = []
    for group in dict.fromkeys(groups):
        rows = [i for i, own in enumerate(groups) if own == group]
        parts += [scores.curve(line, rows).assign(line=line, group=group) for line in lines]
    joined: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return joined
