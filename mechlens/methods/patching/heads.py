"""Which heads push a score up or down just before the answer: what each writes, and what is lost without it.

Yin et al. 2025 (Refusal Cliff) call the heads that write against refusal there suppression heads. What a head writes
along a direction leaves out what later blocks make of it; switching it off, alone and at that token, doesn't.
"""

import contextlib
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechlens.errors import UserError, kind_of, quoted
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.token_scores import Line
from mechlens.methods.activations.trace_tokens import up_to_answers
from mechlens.methods.progress import progress_bar
from mechlens.models.attention.outputs import by_head as heads_apart
from mechlens.models.attention.outputs import output_matrix, output_taps
from mechlens.models.bridge import LanguageModel, device_of, loaded, n_layers
from mechlens.models.engine import forward
from mechlens.models.engine.caches import with_cache
from mechlens.models.engine.forward import Reader, Stop
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.engine.site_reader import by_head, tapped
from mechlens.models.native import native, native_blocks
from mechlens.models.sites import n_heads
from mechlens.prompts.batch import TokenBatch

Head = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True)
class HeadScores:
    """What every head does to a score at the last token before the answer, in units of the line; 0 above its level.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> batch = ml.trace_batch(model, [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix and bake.")])
    >>> scores = ml.head_scores(model, batch, line)
    >>> scores.written.shape == scores.alone.shape, bool((scores.written[:, 2:] == 0).all())
    (True, True)
    """

    written: Float[Tensor, "prompt layer head"] = field(repr=False)
    """What it writes along the direction."""
    alone: Float[Tensor, "prompt layer head"] = field(repr=False)
    """The score minus what it is with this head switched off at that token: below 0 for one that suppresses."""

    @property
    def agreement(self) -> float:
        """Correlation of both over all heads below the level, of means over prompts."""
        below = (self.written != 0).any(dim=0)
        both = torch.stack([self.written.mean(dim=0)[below], self.alone.mean(dim=0)[below]])
        return float(torch.corrcoef(both)[0, 1]) if both.shape[1] > 2 else math.nan


def head_scores(model: LanguageModel, batch: TokenBatch, line: Line) -> HeadScores:
    """What each head writes along a line at the last token before the answer, and the exact effect of each alone.

    `batch` holds traces (`trace_batch`). UserError for a model whose heads' output isn't a plain matrix product.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> batch = ml.trace_batch(model, [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix and bake.")])
    >>> scores = ml.head_scores(model, batch, line)
    >>> scores.written.shape == scores.alone.shape, bool((scores.written[:, 2:] == 0).all())
    (True, True)
    """
    layers = range(min(line.direction.level, n_layers(model)))
    taps = output_taps(model, layers)
    if not taps:
        raise UserError("no head comes before level 0, the embedding; choose a line of a higher level")
    if not forward.fits_fast_path(model):
        raise UserError(f"heads can't be switched off one by one in this model: {forward.why_plain(model)}")
    cut = up_to_answers(batch, loaded(model).tokenizer)
    shape = (len(cut.prompts), n_layers(model), n_heads(model, "z"))
    written, alone = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    values = collect(model, cut, site="z", levels=list(layers), positions=["answer[-1]"]).values[:, :, 0].double()
    unit, scale = line.direction.unit.double(), line.one - line.zero
    for layer, tap in taps.items():
        along = (output_matrix(model, tap).cpu().double() @ unit).reshape(shape[2], -1)
        written[:, layer] = torch.einsum("phd,hd->ph", values[:, layer], along) / scale
    bar = progress_bar(total=shape[0], title="heads one by one", unit="prompt")
    with bar:
        for i in range(shape[0]):
            alone[i, : len(layers)] = _alone(model, cut.row(i), line, taps) / scale
            bar.update(1)
    return HeadScores(written, alone)


@torch.inference_mode()
def _alone(
    model: LanguageModel, ids: Sequence[int], line: Line, taps: dict[int, nn.Module]
) -> Float[Tensor, "layer head"]:
    """How far the projection falls with each head switched off at the last token: one row for each head."""
    heads, level = n_heads(model, "z"), line.direction.level
    n = 1 + len(taps) * heads

    def switching_off(layer: int) -> "_Off":
        return _Off(model, 1 + layer * heads, heads)

    prefix = forward.prefix_cache(model, ids[:-1])
    reader = Reader([level], n_layers(model), torch.zeros(n, 1, dtype=torch.long), stops=True)
    tokens = torch.full((n, 1), ids[-1], device=device_of(model))
    with contextlib.ExitStack() as stack:
        hf_model = stack.enter_context(native(model))
        stack.enter_context(tapped({tap: switching_off(layer) for layer, tap in taps.items()}))
        stack.enter_context(reader.attached(native_blocks(model)))
        stack.enter_context(contextlib.suppress(Stop))
        cache = SharedRows.apart(n, n_layers(model)).cache(prefix)
        hf_model(tokens, **with_cache(hf_model, cache))
    along = reader.stacked()[:, 0, 0].double() @ line.direction.unit.double()
    return (along[0] - along[1:]).reshape(len(taps), heads)


@dataclass(frozen=True)
class _Off:
    """Sets in a layer's `z` the first head to zero in row `first`, the second in the next row, and so on."""

    model: LanguageModel
    first: int
    heads: int

    def __call__(self, value: Tensor) -> None:
        own = torch.arange(self.heads, device=value.device)
        by_head(self.model, "z", value)[self.first + own, -1, own] = 0


def head_pairs(heads: object) -> tuple[Head, ...]:
    """The heads as pairs of layer and head; UserError for anything else, such as one pair alone."""
    given = tuple(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else (heads,)
    if _is_pair(given):
        raise UserError(f"heads is one pair, {given}; give a list of such pairs: [{given}]")
    for one in given:
        if isinstance(one, str) or not isinstance(one, Iterable) or not _is_pair(tuple(one)):
            raise UserError(
                f"heads has {quoted(one)} ({kind_of(one)}); each is a pair of layer and head, such as (0, 1)"
            )
    return tuple((int(layer), int(head)) for layer, head in given)


def _is_pair(given: tuple[object, ...]) -> bool:
    return len(given) == 2 and all(isinstance(one, Integral) and not isinstance(one, bool) for one in given)


def require_heads(model: LanguageModel, heads: Collection[Head]) -> None:
    """UserError for heads that the model has not."""
    wrong = [one for one in heads if not (0 <= one[0] < n_layers(model) and 0 <= one[1] < n_heads(model, "z"))]
    if wrong:
        raise UserError(
            f"there is no head {wrong[0][1]} in layer {wrong[0][0]}; there are layers 0 to {n_layers(model) - 1} with "
            f"heads 0 to {n_heads(model, 'z') - 1}"
        )


@contextlib.contextmanager
def without_heads(model: LanguageModel, heads: Sequence[Head], *, renormalise: bool = False) -> Iterator[LanguageModel]:
    """The model with some heads switched off at every token, for the length of a `with` block.

    Their columns of the output matrices are zero inside, so reading and answering stay as fast. With `renormalise` what
    a layer's other heads write at a token is scaled up to the length that it had with all of them; the authors of the
    Refusal Cliff do that to a whole batch at once, so that a prompt's numbers hang on those beside it. UserError for
    heads that there are not.

    >>> model = ml.load("smollm2")
    >>> before = ml.collect(model, "Say hello.", positions=["last"]).values
    >>> with ml.without_heads(model, [(0, 1)]):
    ...     inside = ml.collect(model, "Say hello.", positions=["last"]).values
    >>> after = ml.collect(model, "Say hello.", positions=["last"]).values
    >>> bool((inside == before).all()), bool((after == before).all())
    (False, True)
    """
    heads = head_pairs(heads)
    require_heads(model, heads)
    taps = output_taps(model, sorted({layer for layer, _ in heads}))
    kept: list[tuple[nn.Module, nn.Parameter, Any]] = []
    try:
        for layer, tap in taps.items():
            original = tap._parameters["weight"]
            assert original is not None
            kept.append((tap, original, tap.__dict__.get("forward")))  # that of a block around this one
            weight = original.detach().clone()
            heads_apart(weight if isinstance(tap, Conv1D) else weight.T, n_heads(model, "z"))[
                [head for at, head in heads if at == layer]
            ] = 0
            tap._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            if renormalise:
                tap.forward = _as_long_as_with(tap, original)  # a hook would count as the user's, and slow all down
        yield model
    finally:
        for tap, original, outer in kept:
            tap.__dict__.pop("forward", None)
            if outer is not None:
                tap.forward = outer
            tap._parameters["weight"] = original


def _as_long_as_with(tap: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer's product, with each token's output as long as this weight makes it."""
    own = tap.forward

    def scaled(given: Tensor) -> Tensor:
        output: Tensor = own(given)
        bias = tap._parameters.get("bias")
        whole = given @ (weight if isinstance(tap, Conv1D) else weight.T)
        whole = whole if bias is None else whole + bias
        scale: Tensor = whole.norm(dim=-1, keepdim=True) / output.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return output * scale

    return scaled


def chosen_heads(
    scores: Float[Tensor, "layer head"], share: float, which: Literal["negative", "positive", "random"], *, seed: int
) -> tuple[Head, ...]:
    """A share of all heads, at least one: those of the lowest scores, of the highest, or drawn from all.

    >>> import torch
    >>> ml.chosen_heads(torch.tensor([[0.0, -2.0], [1.0, 0.5]]), 0.25, "negative", seed=0)
    ((0, 1),)
    """
    n = max(1, round(share * scores.numel()))
    if not 0 < share <= 1:
        raise UserError(f"the share of heads is {share:g}; give one above 0 and up to 1")
    order = scores.flatten().argsort(descending=which == "positive", stable=True).tolist()
    picked = random.Random(seed).sample(order, n) if which == "random" else order[:n]
    return tuple((i // scores.shape[1], i % scores.shape[1]) for i in picked)
