"""What blocks have at any site, by exact partial passes: the shared start once, no block above the last that is read.

Where a plain Hugging Face module takes the site's value as its input, that module is watched; elsewhere the hook points
of TransformerLens are. `why_plain_at` tries on the model that nothing is lost so.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, device_of, dtype_of, n_layers, whole
from mechlens.models.engine.caches import with_cache
from mechlens.models.engine.edits import is_laid_out, reference_record
from mechlens.models.engine.forward import Kept, Row, Stop, prefix_cache, read_places, right_padded, why_plain
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, spread_tokens, tolerance
from mechlens.models.engine.products import quick_products
from mechlens.models.engine.shared_rows import SharedRows, fault
from mechlens.models.native import native, native_tap
from mechlens.models.sites import n_heads, site_hook


def taps_of(model: LanguageModel, site: str, layers: Iterable[int]) -> dict[int, nn.Module] | None:
    """The plain modules whose input is the site's value, by layer; None where a layer has none."""
    found = {layer: native_tap(model, site, layer) for layer in layers}
    there = {layer: tap for layer, tap in found.items() if tap is not None}
    return there if len(there) == len(found) else None


def by_head(model: LanguageModel, site: str, value: Tensor) -> Tensor:
    """A view of a tapped input with the heads apart, where the site has heads."""
    heads = n_heads(model, site)
    return value.view(*value.shape[:-1], heads, -1) if heads else value


@contextlib.contextmanager
def tapped(seeing: Mapping[nn.Module, Callable[[Tensor], object]]) -> Iterator[None]:
    """Each function sees the first input of its module, after all hooks that were there before."""

    def hook(see: Callable[[Tensor], object]) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return look

    with contextlib.ExitStack() as stack:
        for module, see in seeing.items():
            stack.callback(module.register_forward_pre_hook(hook(see), with_kwargs=True).remove)
        yield


@torch.inference_mode()
def site_batch(
    model: LanguageModel, rows: Sequence[Row], site: str, layers: Sequence[int], prefix: DynamicCache | None
) -> Float[Tensor, "row layer read *axes"]:
    """What one batch has at a site, at the read positions, on top of the shared start's keys and values."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    device = device_of(model)
    kept = Kept(read_places(rows) - skip)

    def keep(layer: int, value: Tensor) -> None:
        # Keys begin with the prompt's first token; queries, and all else, with the first that isn't shared.
        kept.put(layer, tokens_first(site, value))
        if len(kept.found) == len(set(layers)):
            raise Stop

    watched = taps_of(model, site, layers)
    with contextlib.ExitStack() as stack:
        if watched is not None:
            hf_model = stack.enter_context(native(model))
            see = {tap: _seeing(model, site, layer, keep) for layer, tap in watched.items()}
            stack.enter_context(tapped(see))
        else:
            hf_model = model.original_model
            stack.enter_context(quick_products(hf_model))
            hooks = [(site_hook(site, layer), _hooking(layer, keep)) for layer in layers]
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        stack.enter_context(contextlib.suppress(Stop))
        cache = SharedRows.apart(len(rows), n_layers(model)).cache(prefix)
        hf_model(right_padded(rows, skip).to(device), **with_cache(hf_model, cache))
    return _of_own_keys(kept.stacked(layers), site, rows)


@torch.inference_mode()
def reference_site_batch(
    model: LanguageModel, rows: Sequence[Row], site: str, layers: Sequence[int]
) -> Float[Tensor, "row layer read *axes"]:
    """The same of rows of one length through TransformerLens' own cache: the path that fits every model."""
    tokens = torch.tensor([row.ids for row in rows], device=device_of(model))
    names = [site_hook(site, layer) for layer in layers]
    how = whole(model) | {"stop_at_layer": max(layers) + 1}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names, prepend_bos=False, **how)
    kept = Kept(read_places(rows))
    for layer, name in zip(layers, names, strict=True):
        kept.put(layer, tokens_first(site, cache[name]))
    return _of_own_keys(kept.stacked(layers), site, rows)


def tokens_first(site: str, value: Tensor) -> Tensor:
    """A site's value with the axes (row, token, ...); a pattern has its heads before its tokens."""
    return value.movedim(1, 2) if site == "pattern" else value


def _seeing(
    model: LanguageModel, site: str, layer: int, keep: Callable[[int, Tensor], None]
) -> Callable[[Tensor], None]:
    return lambda value: keep(layer, by_head(model, site, value))


def _hooking(layer: int, keep: Callable[[int, Tensor], None]) -> Callable[..., None]:
    return lambda value, hook: keep(layer, value)


def _of_own_keys(values: Tensor, site: str, rows: Sequence[Row]) -> Tensor:
    """NaN where a pattern's row ends before the batch's longest: there is no such token to attend to."""
    if site == "pattern":
        for row, value in zip(rows, values, strict=True):
            value[..., len(row.ids) :] = torch.nan
    return values


_READABLE: "weakref.WeakKeyDictionary[nn.Module, set[tuple[str, tuple[int, ...]]]]" = weakref.WeakKeyDictionary()


def require_readable(model: LanguageModel, site: str, layers: tuple[int, ...]) -> None:
    """UserError where a block has no such site, one of another size than the rest, or one that is laid out otherwise
    than by token and head."""
    known = _READABLE.setdefault(model, set())
    if (site, layers) in known:
        return
    values = reference_record(model, range(1, 9), -1, site, layers).values
    alike = [layer for layer in layers if values[layer].shape == values[layers[0]].shape]
    if len(alike) < len(layers):  # Gemma 4's global attention has larger heads than its local one
        raise UserError(
            f"{site!r} has another size in some blocks of this model than in others; read blocks of one size together, "
            f"such as levels={alike}"
        )
    if not is_laid_out(model, site, layers[0]):
        raise UserError(
            f"{site!r} of this model is laid out in a way of its own, so tokens, heads and neurons can't be told "
            "apart there; choose another site, such as attn_out or mlp_out"
        )
    known.add((site, layers))


ALIKE = 0.8
"""Cosine beyond which values are those of one site: rounding left 0.95 and more, and other sites have about none."""


def same_site(found: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Values read at a site and TransformerLens' own, to be compared: in half precision whether they point one way.

    Two attention kernels round otherwise there, and block by block that adds up.
    """
    if right.dtype == torch.float32:
        return found, right
    cosine = torch.cosine_similarity(found.float().cpu().flatten(), right.float().cpu().flatten(), dim=0)
    return (cosine > ALIKE).float()[None], torch.ones(1)


def why_plain_at(model: LanguageModel, site: str) -> str:
    """Why a site is read on the plain path, tried once on a few tokens; empty where the fast one is exact."""
    return why_plain(model) or fault(model, f"reading {site}", lambda: _reading_fault(model, site))


def _reading_fault(model: LanguageModel, site: str) -> str:
    numbers = (range(1, 11), (1, 2, 3, 4, 3, 2, 1, 7))
    ids, other = (tuple(spread_tokens(model.original_model, own)) for own in numbers)
    layers = sorted({0, n_layers(model) // 2, n_layers(model) - 1})
    rows = [Row(ids, (6, 9)), Row(other, (5, 7))]

    try:
        fast = site_batch(model, rows, site, layers, prefix_cache(model, ids[:4]))
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return f"a pass with a shared start fails in it ({type(error).__name__})"
    plain = [reference_site_batch(model, [row], site, layers)[0] for row in rows]
    gaps = [apart(got[..., : want.shape[-1]], want) for got, want in zip(fast, plain, strict=True)]
    exact = max(gaps) <= tolerance(dtype_of(model))
    return "" if exact else f"a pass with a shared start shows other numbers at {site} than a whole one"
