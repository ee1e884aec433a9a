"""What is lost without a head, with all its attention on the sink, or without the largest dimensions."""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of, many, quoted
from mechlens.methods.activations.collect import refuse_too_long
from mechlens.methods.patching.heads import Head, head_pairs, require_heads
from mechlens.models.attention.changes import Change, Hidden, require_places
from mechlens.models.attention.watch import require_watchable, watch
from mechlens.models.bridge import LanguageModel, unembed
from mechlens.prompts.batch import TokenBatch
from mechlens.registry import whole_numbers

CHUNK = 64
"""Tokens whose logits are held at once: a large vocabulary times a long text doesn't fit into memory."""
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
    return _OnHeads(head_pairs(heads))


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
    return _OnHeads(head_pairs(heads), *whole_numbers("sink", [sink], "token"))


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
        require_places([self.sink], len(visible))
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

    return Hidden(whole_numbers("places", places, "token"))


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

    columns, rows = whole_numbers("dimensions", dimensions, "dimension"), whole_numbers("places", places, "token")

    def edit(level: int, residual: Tensor) -> Tensor:
        require_places(rows, len(residual))
        wrong = [one for one in columns if not 0 <= one < residual.shape[1]]
        if wrong:
            raise UserError(f"there is no dimension {wrong[0]}; choose those from 0 to {residual.shape[1] - 1}")
        changed = residual.clone()
        for row in rows:
            for column in columns:
                changed[row, column] = 0.0
        return changed

    return edit


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
    require_watchable(model)
    refuse_too_long(model, batch)
    n = len(batch.prompts)
    _require_made("changes", changes, n, 3, "zeroed, all_on_sink or away_from")
    _require_made("edits", edits, n, 2, "without_dimensions")
    if int(batch.lengths.min()) < 2:
        name = batch.prompts[int(batch.lengths.argmin())].id
        raise UserError(f"text {name!r} has 1 token, and a loss is of those after the first; give a longer one")
    require_heads(model, [head for one in changes or () if isinstance(one, _OnHeads) for head in one.heads])
    found = []
    for i in range(n):
        ids = batch.row(i)
        residual = watch(model, ids, None, edits[i] if edits else None, changes[i] if changes else None)
        parts = zip(torch.split(residual[:-1], CHUNK), torch.split(torch.tensor(ids[1:]), CHUNK), strict=True)
        told = [unembed(model, part).double().log_softmax(dim=-1).gather(1, after[:, None]) for part, after in parts]
        found.append(-torch.cat(told).mean())
    return torch.stack(found).cpu()


def _require_made(name: str, given: object, n: int, values: int, makers: str) -> None:
    """UserError unless there is one for each of `n` texts, each a function of so many values."""
    if given is None:
        return
    if not isinstance(given, Sequence) or isinstance(given, str):
        told = "one alone" if callable(given) or isinstance(given, Hidden) else kind_of(given)
        raise UserError(f"{name} is {told}; give a list with one for each of {many(n, 'text')}")
    if len(given) != n:
        raise UserError(f"what is done is given for {many(len(given), 'text')}, and {n} came; give one for each")
    for one in given:
        if not (one is None or (isinstance(one, Hidden) and name == "changes") or _takes(one, values)):
            told = "a function of other values" if callable(one) else f"{quoted(one)} ({kind_of(one)})"
            raise UserError(f"{name} has {told}; each is None or what {makers} makes")


def _takes(one: object, values: int) -> bool:
    if not callable(one):
        return False
    try:
        inspect.signature(one).bind(*range(values))
    except TypeError:
        return False
    except ValueError:  # one of C's, which doesn't say what it takes
        return True
    return True
