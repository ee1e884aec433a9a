"""Patching of several pairs in packed passes: only edits that can change something, and what they change."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechlens.methods.activations.reading import halving
from mechlens.methods.patching.metrics import LogitDifference, Metric
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.task import PairTask, pair_edits, piece
from mechlens.models.bridge import LanguageModel, embedding_rows
from mechlens.models.engine.edits import Recording
from mechlens.models.engine.packed.edits import (
    PackedRuns,
    RunEdit,
    chunks_of_edits,
    packed_edited_logits,
    record_packed,
)


def packed_pieces(
    model: LanguageModel,
    source_model: LanguageModel,
    tasks: Sequence[PairTask],
    plan: PatchPlan,
    layers: Sequence[int],
    heads: Sequence[int],
    metric: Metric,
    max_tokens: int,
) -> list[dict[str, Tensor]]:
    """Of each pair what `piece` keeps; values in the grid's order."""
    recorded, sources = _recorded(model, source_model, tasks, plan.site, layers)
    one_model = source_model is model and plan.random_seed is None
    pieces: list[dict[str, Tensor]] = []
    work: list[tuple[int, RunEdit]] = []
    for run, (task, source) in enumerate(zip(tasks, sources, strict=True)):
        start = recorded.runs[run]
        edits = pair_edits(plan, layers, heads, start, source, task.places)
        # An edit that changes nothing leaves the run as it is.
        ends = piece(plan, metric, torch.empty(0), start, source)
        pieces.append(ends | {"values": ends["start"].expand(len(edits)).clone()})
        changing = [does for does in task.changing(one_model=one_model) for _ in heads or (None,)] * len(layers)
        work += [(at, RunEdit(run, edit)) for at, edit in enumerate(edits) if changing[at]]
    reads = [task.read for task in tasks]
    cleans = [own.logits for own in (sources if plan.mode == "denoising" else recorded.runs[: len(tasks)])]

    tokens, measure = metric.narrowed() if type(metric) is LogitDifference else (None, metric)

    def measured(chunk: list[int]) -> Tensor:
        some = [work[i][1] for i in chunk]
        logits = packed_edited_logits(model, recorded, plan.site, some, reads, tokens)
        ends = [i for i in range(1, len(some) + 1) if i == len(some) or some[i].run != some[i - 1].run]
        parts = zip([0, *ends], ends, strict=False)  # one run's edits stand side by side
        return torch.cat([measure(logits[a:b], _of(cleans[some[a].run], tokens)) for a, b in parts])

    costs = [reads[one.run] - one.edit.position + 1 for _, one in work]
    by_layer = [one.edit.layer for _, one in work]
    longest = max(len(task.start) for task in tasks)
    for chunk in chunks_of_edits(by_layer, costs, max_tokens, len(tokens or range(embedding_rows(model)))):
        by_run = sorted(chunk, key=lambda i: work[i][1].run)
        for i, value in zip(by_run, halving(measured, by_run, longest), strict=True):
            at, one = work[i]
            pieces[one.run]["values"][at] = value
    return pieces


def _of(logits: Tensor, tokens: Sequence[int] | None) -> Tensor:
    return logits if tokens is None else logits[list(tokens)]


def _recorded(
    model: LanguageModel, source_model: LanguageModel, tasks: Sequence[PairTask], site: str, layers: Sequence[int]
) -> tuple[PackedRuns, Sequence[Recording]]:
    """The runs that are edited, first, and the runs that values come from."""
    starts, sources = [task.start for task in tasks], [task.source for task in tasks]
    reads, source_reads = [task.read for task in tasks], [task.source_read for task in tasks]
    if source_model is model:
        recorded = record_packed(model, starts + sources, reads + source_reads, site, layers)
        return recorded, recorded.runs[len(tasks) :]
    others = record_packed(source_model, sources, source_reads, site, layers)
    return record_packed(model, starts, reads, site, layers), others.runs
