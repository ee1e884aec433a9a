"""Where in a reasoning trace does refusal fall? Scores of every token, cliffs, and the heads behind them.

Yin et al. 2025 (Refusal Cliff). The direction is fitted on training traces, its level chosen on validation traces, and
so are the heads; every number is of test traces.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.token_scores import Line, TokenScores, line_of, token_scores
from mechlens.methods.activations.trace_tokens import THINKING, Trace, trace_batch, up_to_answers
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import direction_grid, random_like
from mechlens.methods.probing.auroc import auroc, auroc_estimate
from mechlens.methods.probing.auroc_grid import score_grid
from mechlens.methods.statistics.cliff import cliff, plateau
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.studies.cliff.config import CliffPlan, FindCliff
from mechlens.studies.cliff.heads import HeadTables, heads_of
from mechlens.studies.cliff.traces import HARMFUL, HARMLESS, read_traces
from mechlens.studies.cliff.verdict import CliffVerdict, cliff_verdict
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import asks, chosen_model, data_inputs, prepared

REFUSED, ACCEPTED = "refused", "accepted"
BEFORE = "answer[-1]"
"""The last token before the answer, of traces without their answers."""
REFUSAL, HARM = "refusal", "harm"
CLIFF = 0.5
"""A trace has a cliff where its drop is this much above the mean of harmless ones: half of the way to complied."""


@dataclass(frozen=True)
class CliffStudy:
    """A model and its traces with what they come to."""

    model: LanguageModel
    template: ChatTemplate
    traces: tuple[Trace, ...]
    """Their prompts are labelled harmful or harmless."""
    verdicts: tuple[str, ...]
    """Refused or accepted, of each answer."""


@dataclass(frozen=True)
class CliffResult:
    """All that the study found, of test traces."""

    verdict: CliffVerdict
    level: int
    """Of refusal, chosen on validation traces."""
    split: Split
    prompts: pd.DataFrame
    """One row a test trace: group, and plateau, final, drop, begins and p along refusal and harm."""
    curves: pd.DataFrame
    """Mean scores by place, line and group."""
    controls: dict[str, Estimate]
    """Numbers beside the verdict's."""
    heads: HeadTables

    def metrics(self) -> dict[str, Estimate]:
        """What decided, and the controls."""
        own = self.verdict
        return {"drop": own.drop, "excess": own.excess, "auroc": own.auroc, **self.controls}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        found = {
            "cliffs": self.prompts,
            "curves": self.curves,
            "heads": self.heads.heads,
            "ablation": self.heads.ablation,
        }
        return {name: table for name, table in found.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """None."""
        return {}


def prepare(config: FindCliff) -> Preparation[CliffStudy]:
    """Traces and model; UserError for whatever can't be had."""
    traces = read_traces(config.traces)
    prompts = [one.prompt for one in traces]
    verdicts = verdicts_by(judge_of(config.judge), prompts, [one.answer for one in traces])
    kept = [i for i, verdict in enumerate(verdicts) if verdict in (REFUSED, ACCEPTED)]
    for name in (REFUSED, ACCEPTED):
        if sum(verdicts[i] == name for i in kept) < 10:
            raise UserError(f"{config.traces} has fewer than 10 traces whose answer is {name}; add some")
    chosen = chosen_model(config, asks(prompts))
    content = CliffStudy(*chosen, tuple(traces[i] for i in kept), tuple(verdicts[i] for i in kept))
    data = data_inputs({"traces": (config.traces, [_whole(one) for one in content.traces])})
    return prepared(content, chosen.model, chosen.inputs(data), [one.prompt for one in content.traces])


def _whole(trace: Trace) -> Prompt:
    """A prompt that holds all of a trace, for its fingerprint."""
    return replace(trace.prompt, text=f"{trace.prompt.text}\n{trace.thinking}\n{trace.answer}")


def execute(config: FindCliff, given: CliffStudy, writer: RunWriter) -> CliffResult:
    """The study as configured."""
    return refusal_cliff(given, config, cache=writer.cache)


def refusal_cliff(given: CliffStudy, plan: CliffPlan, *, cache: Cache | None = None) -> CliffResult:
    """Cliffs of the test traces, beside random directions and shuffled thoughts, and the heads behind them."""
    model, traces = given.model, given.traces
    batch = trace_batch(model, traces, template=given.template)
    families = [one.prompt.group for one in traces]
    groups = [f"{said}_{one.prompt.label}" for said, one in zip(given.verdicts, traces, strict=True)]
    split = split_by_family(groups, families, seed=plan.seed)
    cut = up_to_answers(batch, loaded(model).tokenizer)
    before = replace(collect(model, cut, positions=[BEFORE], cache=cache), labels=given.verdicts)
    words = collect(model, cut, positions=["inst"], cache=cache)
    refusal, harm = _line(before, (REFUSED, ACCEPTED), split), _line(words, (HARMFUL, HARMLESS), split)
    lines = {REFUSAL: refusal, HARM: harm} | {
        f"random {i}": replace(refusal, direction=one)
        for i, one in enumerate(random_like(refusal.direction, plan.random_directions, plan.seed))
    }
    test = list(split.test)
    scores = token_scores(model, batch.select(test), lines, cache=cache)
    harmful = torch.tensor([traces[i].prompt.label == HARMFUL for i in test])
    refused = torch.tensor([given.verdicts[i] == REFUSED for i in test])
    own = [families[i] for i in test]
    found = {name: drops_of(scores, name) for name in lines}
    readable = auroc_estimate(scores.at(REFUSAL, 0), refused, own)
    order = [REFUSAL, *(name for name in lines if name.startswith("random"))]
    verdict = cliff_verdict(
        torch.stack([found[name] for name in order]), harmful, own, readable, resamples=plan.resamples, seed=plan.seed
    )
    controls = _controls(given, plan, test, found, lines, harmful, refused)
    looked = HeadTables()
    if plan.heads:
        choosing, testing = (
            batch.select([i for i in part if traces[i].prompt.label == HARMFUL]) for part in (split.validation, test)
        )
        looked = heads_of(model, choosing, testing, refusal, plan)
    names = [groups[i] for i in test]
    return CliffResult(
        verdict, refusal.direction.level, split, _cliffs(scores, names, plan.seed), _curves(scores, names), controls,
        looked,
    )  # fmt: skip


def _line(acts: Activations, contrast: tuple[str, str], split: Split) -> Line:
    """The mean difference of training traces, at the level that tells validation traces best: of equals the last, since
    what is said follows from there; never the embedding."""
    train, chosen = acts.select(split.train), acts.select(split.validation)
    grid = direction_grid(train, *contrast)
    areas = auroc(score_grid(chosen, grid)[:, 0], torch.tensor([own == contrast[0] for own in chosen.labels]))
    level = max(acts.levels[1:], key=lambda one: (float(areas[acts.levels.index(one)]), one))
    return line_of(grid.at(level, acts.positions[0]), train)


def drops_of(scores: TokenScores, line: str) -> Tensor:
    """Plateau minus final of every trace along a line; NaN where a thought is too short."""
    thinking, values, final = scores.inside(THINKING), scores.of(line), scores.at(line, 0)
    found = []
    for own, row, last in zip(thinking, values, final, strict=True):
        inside = row[own]
        found.append(plateau(inside) - last)
    return torch.stack(found)


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


def _curves(scores: TokenScores, groups: Sequence[str]) -> pd.DataFrame:
    """Mean scores by place, of every group and line."""
    parts = []
    for group in dict.fromkeys(groups):
        rows = [i for i, own in enumerate(groups) if own == group]
        parts += [scores.curve(line, rows).assign(line=line, group=group) for line in (REFUSAL, HARM)]
    joined: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return joined


def _controls(
    given: CliffStudy,
    plan: CliffPlan,
    test: Sequence[int],
    found: Mapping[str, Tensor],
    lines: Mapping[str, Line],
    harmful: Tensor,
    refused: Tensor,
) -> dict[str, Estimate]:
    """Harmless requests, thoughts whose words are shuffled, harm, the share of cliffs, and what goes with them."""
    families = [given.traces[i].prompt.group for i in test]
    drop, there = found[REFUSAL], ~found[REFUSAL].isnan()

    def mean(values: Tensor, rows: Tensor) -> Estimate:
        own = rows & ~values.isnan()
        kept = [family for family, is_in in zip(families, own.tolist(), strict=True) if is_in]
        return mean_estimate(values[own], kept, plan.seed, plan.resamples)

    draw = random.Random(plan.seed)
    mixed = [replace(given.traces[i], thinking=_shuffled(given.traces[i].thinking, draw)) for i in test]
    batch = trace_batch(given.model, mixed, template=given.template)
    shuffled = drops_of(token_scores(given.model, batch, {REFUSAL: lines[REFUSAL]}), REFUSAL)
    beyond = drop - drop[there & ~harmful].mean()
    many = harmful & there
    kept = [family for family, is_in in zip(families, many.tolist(), strict=True) if is_in]
    return {
        "drop.harmless": mean(drop, ~harmful),
        "drop.shuffled": mean(shuffled, harmful),
        "drop.harm": mean(found[HARM], harmful),
        "drop.complied_harmful": mean(drop, harmful & ~refused),
        "drop.refused_harmful": mean(drop, harmful & refused),
        "share.cliff": rate_estimate(beyond[many] > CLIFF, kept, plan.seed, plan.resamples),
        "auroc.drop_complied": auroc_estimate(drop[many], ~refused[many], kept),
    }


def _shuffled(thinking: str, draw: random.Random) -> str:
    words = thinking.split()
    return " ".join(draw.sample(words, len(words)))
