"""All that is measured about sinks, by layer and head and by level, of every text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of, many
from mechlens.methods.progress import progress_bar
from mechlens.methods.sinks.found import Sinks, find_sinks, readable
from mechlens.methods.sinks.measures import (
    column_entropy,
    first_share,
    massive,
    massive_dimensions,
    residual_peak,
    row_entropy,
    sink_logit,
    sink_mass,
    sink_rate,
    sinks_against_others,
)
from mechlens.methods.sinks.result import HEAD_MEASURES, LEVEL_MEASURES, Massive, SinkMap
from mechlens.models.attention.outputs import output_matrix, output_taps, written
from mechlens.models.attention.watch import Attended, attention_layers, watch
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.models.sites import n_heads
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import TemplateChoice

ENTRIES = 4
"""Largest entries of the residual stream that are kept of every text."""


def measure_sinks(
    model: LanguageModel,
    texts: Prompts | TokenBatch,
    *,
    sinks: Sinks | None = None,
    template: TemplateChoice = "tokenizer",
) -> SinkMap:
    """How much of every head's attention the texts' sinks take, what their values and residual stream look like, and
    how much each head writes.

    The sinks are found first (`find_sinks`) unless they are given. UserError for a model whose attention can't be read.

    >>> model = ml.load("smollm2")
    >>> found = ml.measure_sinks(model, ["Bake a small cake.", "Say hello to all of them."])
    >>> found.of("mass").shape[0], float(found.of("first").max()) < 1
    (2, True)
    """
    batch = readable(model, texts, template)
    sinks = find_sinks(model, batch) if sinks is None else sinks
    if not isinstance(sinks, Sinks):
        raise UserError(f"the sinks are {kind_of(sinks)}; give what find_sinks returns, or leave them out")
    if len(sinks.places) != len(batch.prompts):
        raise UserError(f"the sinks are of {many(len(sinks.places), 'text')}, and {len(batch.prompts)} came; give both")
    for prompt, n, own in zip(batch.prompts, batch.lengths.tolist(), sinks.received, strict=True):
        if n != len(own):
            raise UserError(f"text {prompt.id!r} has {many(n, 'token')}, and the sinks given for it are of a text of "
                            f"{len(own)}; find them in these texts")  # fmt: skip
    matrices = {layer: output_matrix(model, output_taps(model, [layer])[layer]) for layer in attention_layers(model)}
    shape = (len(batch.prompts), n_layers(model))
    heads = torch.full((len(HEAD_MEASURES), *shape, n_heads(model, "z")), torch.nan)
    levels = torch.full((len(LEVEL_MEASURES), shape[0], shape[1] + 1), torch.nan)
    entries: list[tuple[Massive, ...]] = []
    for i in progress_bar(range(shape[0]), title="attention", unit="text"):
        one = _Text(sinks.places[i], matrices, heads[:, i], levels[:, i])
        one.at(shape[1], watch(model, batch.row(i), one.see, one.at))
        entries.append(tuple(one.largest))
    return SinkMap(
        heads, levels, sinks, tuple(entries), tuple(one.id for one in batch.prompts),
        tuple(one.group for one in batch.prompts),
    )  # fmt: skip


@dataclass
class _Text:
    """What one pass over a text fills in."""

    places: Sequence[int]
    matrices: Mapping[int, Tensor]
    heads: Float[Tensor, "measure layer head"]
    levels: Float[Tensor, "level_measure level"]
    largest: list[Massive] = field(default_factory=list)

    def see(self, one: Attended) -> None:
        """A layer's attention."""
        self.heads[:, one.layer] = of_layer(one, self.places, self.matrices[one.layer])

    def at(self, level: int, residual: Float[Tensor, "token d_model"]) -> None:
        """A level's residual stream."""
        self.levels[:, level] = of_level(residual, self.places)
        new = [Massive(level, *own) for own in massive_dimensions(residual, ENTRIES)]
        best: dict[int, Massive] = {}
        for entry in sorted((*self.largest, *new), key=lambda own: -abs(own.value)):
            best.setdefault(entry.dimension, entry)
        self.largest = list(best.values())[:ENTRIES]


def of_layer(one: Attended, places: Sequence[int], matrix: Tensor) -> Float[Tensor, "measure head"]:
    """Each of HEAD_MEASURES."""
    visible = one.visible.cpu()
    pattern, logits = one.pattern.cpu(), one.logits.cpu()
    values = written(one.values, matrix).cpu()
    regular = torch.ones(values.shape[1], dtype=torch.bool)
    regular[list(places)] = False
    gate = one.left / torch.where(one.mixed == 0, torch.nan, one.mixed)
    found = {
        "mass": sink_mass(pattern, visible, places),
        "first": first_share(pattern),
        "rate": sink_rate(pattern, visible, places),
        "logit": sink_logit(logits, visible, places),
        "learned": one.learned.mean(dim=1).cpu(),
        "value": sinks_against_others(values, places),
        "output": written(one.left, matrix).cpu()[:, regular].mean(dim=1),
        "gate": gate.nanmean(dim=(1, 2)).cpu(),
        "row_entropy": row_entropy(pattern, visible),
        "column_entropy": column_entropy(pattern, visible),
    }
    return torch.stack([found[name] for name in HEAD_MEASURES])


def of_level(residual: Float[Tensor, "token d_model"], places: Sequence[int]) -> Float[Tensor, " measure"]:
    """Each of LEVEL_MEASURES."""
    found = {
        "peak": residual_peak(residual.norm(dim=1).cpu(), places),
        "massive": massive(residual),
        "largest": residual.abs().max(),
    }
    return torch.stack([found[name].cpu() for name in LEVEL_MEASURES])
