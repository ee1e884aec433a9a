"""What is lost without a head, with all its attention on the sink, or without the largest dimensions."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, many
from mechlens.methods.activations.collect import refuse_too_long
from mechlens.methods.patching.heads import Head, require_heads
from mechlens.models.attention.watch import Change, watch
from mechlens.models.bridge import LanguageModel, unembed
from mechlens.prompts.batch import TokenBatch

CHUNK = 64
"""Tokens whose logits are held at once: a large vocabulary times a long text doesn't fit into memory."""
ROUNDING = 1e-5
"""By how much a row of float32 may miss its sum."""
Edit = Callable[[int, Float[Tensor, "token d_model"]], Tensor]
"""A level and its residual stream -> what to put in its place."""


def zeroed(heads: Collection[Head]) -> Change:
    """These heads attend to nothing, so that they write nothing.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Bake a small cake.", "Say hello."], ml.template_of(model))
    >>> plain = ml.losses_under(model, batch)
    >>> off = ml.losses_under(model, batch, [ml.zeroed([(0, 1)]), ml.all_on_sink([(0, 1)], 0)])
    >>> without = ml.losses_under(model, batch, edits=[ml.without_dimensions([3], [0])] * 2)
    >>> bool((off != plain).all()), bool((without != plain).all())
    (True, True)
    """
    return _OnHeads(tuple(heads))


def all_on_sink(heads: Collection[Head], sink: int) -> Change:
    """These heads attend to the sink alone, from every query that can see it.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Bake a small cake.", "Say hello."], ml.template_of(model))
    >>> plain = ml.losses_under(model, batch)
    >>> off = ml.losses_under(model, batch, [ml.zeroed([(0, 1)]), ml.all_on_sink([(0, 1)], 0)])
    >>> without = ml.losses_under(model, batch, edits=[ml.without_dimensions([3], [0])] * 2)
    >>> bool((off != plain).all()), bool((without != plain).all())
    (True, True)
    """
    return _OnHeads(tuple(heads), sink)


@dataclass(frozen=True)
class _OnHeads:
    """These heads attend to the sink alone; without one to nothing."""

    heads: tuple[Head, ...]
    sink: int | None = None

    def __call__(self, layer: int, pattern: Tensor, visible: Tensor) -> Tensor:
        own = [head for at, head in self.heads if at == layer]
        if not own:
            return pattern
        pattern = pattern.clone()
        if self.sink is None:
            pattern[own] = 0.0
            return pattern
        _require_places([self.sink], len(visible))
        moved = torch.zeros_like(pattern[own])
        moved[:, :, self.sink] = 1.0
        pattern[own] = torch.where(visible[:, self.sink].view(1, -1, 1), moved, pattern[own])
        return pattern


def away_from(places: Collection[int]) -> Change:
    """No head attends to these tokens from any later one, as if they were masked; what it gave them goes to the others.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Bake a small cake.", "Say hello."], ml.template_of(model))
    >>> plain = ml.losses_under(model, batch)
    >>> off = ml.losses_under(model, batch, [ml.zeroed([(0, 1)]), ml.all_on_sink([(0, 1)], 0)])
    >>> blocked = ml.losses_under(model, batch, [ml.away_from([0])] * 2)
    >>> bool((off != plain).all()), bool((blocked != plain).all())
    (True, True)
    """

    def change(layer: int, pattern: Tensor, visible: Tensor) -> Tensor:
        n = pattern.shape[-1]
        _require_places(places, n)
        hidden = torch.zeros(n, n, dtype=torch.bool, device=pattern.device)
        for place in places:
            hidden[place + 1 :, place] = True
        kept = pattern.masked_fill(hidden, 0.0)
        # A learned sink keeps its share. What a row lacks is that or rounding, beside which what a sink that took
        # nearly all leaves to the others would be lost.
        learned = 1 - pattern.sum(dim=-1, keepdim=True)
        left = kept.sum(dim=-1, keepdim=True) + learned.where(learned > ROUNDING, 0.0)
        return kept / left.clamp_min(torch.finfo(kept.dtype).tiny)

    return change


def without_dimensions(dimensions: Sequence[int], places: Sequence[int]) -> Edit:
    """These dimensions are zero at these tokens, at every level below the last.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Bake a small cake.", "Say hello."], ml.template_of(model))
    >>> plain = ml.losses_under(model, batch)
    >>> off = ml.losses_under(model, batch, [ml.zeroed([(0, 1)]), ml.all_on_sink([(0, 1)], 0)])
    >>> without = ml.losses_under(model, batch, edits=[ml.without_dimensions([3], [0])] * 2)
    >>> bool((off != plain).all()), bool((without != plain).all())
    (True, True)
    """

    def edit(level: int, residual: Tensor) -> Tensor:
        _require_places(places, len(residual))
        wrong = [one for one in dimensions if not 0 <= one < residual.shape[1]]
        if wrong:
            raise UserError(f"there is no dimension {wrong[0]}; choose those from 0 to {residual.shape[1] - 1}")
        changed = residual.clone()
        rows = torch.tensor(list(places), device=residual.device)
        changed[rows[:, None], torch.tensor(list(dimensions), dtype=torch.long, device=residual.device)] = 0.0
        return changed

    return edit


def _require_places(places: Collection[int], n: int) -> None:
    wrong = [place for place in places if not 0 <= place < n]
    if wrong:
        raise UserError(f"there is no token {wrong[0]} in a text of {many(n, 'token')}; they count from 0")


def losses_under(
    model: LanguageModel,
    batch: TokenBatch,
    changes: Sequence[Change | None] | None = None,
    edits: Sequence[Edit | None] | None = None,
) -> Float[Tensor, " text"]:
    """Mean of -log P(token | all before it) over each text's tokens but the first (nats, float64); `changes` and
    `edits` hold what is done to each text, None where nothing is. UserError for heads, tokens or dimensions that there
    are not.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Bake a small cake.", "Say hello."], ml.template_of(model))
    >>> plain = ml.losses_under(model, batch)
    >>> off = ml.losses_under(model, batch, [ml.zeroed([(0, 1)]), ml.all_on_sink([(0, 1)], 0)])
    >>> without = ml.losses_under(model, batch, edits=[ml.without_dimensions([3], [0])] * 2)
    >>> bool((off != plain).all()), bool((without != plain).all())
    (True, True)
    """
    refuse_too_long(model, batch)
    n = len(batch.prompts)
    wrong = next((own for own in (changes, edits) if own is not None and len(own) != n), None)
    if wrong is not None:
        raise UserError(f"what is done is given for {many(len(wrong), 'text')}, and {n} came; give one for each")
    require_heads(model, [head for one in changes or () if isinstance(one, _OnHeads) for head in one.heads])
    found = []
    for i in range(n):
        ids = batch.row(i)
        residual = watch(model, ids, None, edits[i] if edits else None, changes[i] if changes else None)
        parts = zip(torch.split(residual[:-1], CHUNK), torch.split(torch.tensor(ids[1:]), CHUNK), strict=True)
        told = [unembed(model, part).double().log_softmax(dim=-1).gather(1, after[:, None]) for part, after in parts]
        found.append(-torch.cat(told).mean())
    return torch.stack(found).cpu()
