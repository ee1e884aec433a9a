"""Exact partial forward passes: many edits of one run at once, computing only what an edit can change.

An edit at layer l and position p leaves everything below layer l and, by causality, everything before p as it
was. So the tokens before the first edited one are taken from the run's keys and values, and the batch starts as
one row, the run itself, and grows on its way up: at block l the rows that are edited there join it as copies of
that row. One pass serves every layer. The first row is never edited, so its logits are the run's own: a check
that comes with every pass. No architecture is known by name: Hugging Face's own loop calls the blocks, and a
model whose loop can't bear a growing batch is found out by `can_grow` and takes the plain path.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.models.bridge import (
    LanguageModel,
    device_of,
    dtype_of,
    n_heads,
    n_layers,
    native,
    native_blocks,
    native_tap,
    site_hook,
)
from mechlens.models.engine.edits import Edit, Recording, is_laid_out, plain_edited_logits, put, site_values, value_at
from mechlens.models.engine.forward import warn_plain, why_plain
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, tolerance
from mechlens.models.soundness import require_finite_logits
from mechlens.models.transformers_versions import with_cache

_PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
_NOT_GROWING: "weakref.WeakKeyDictionary[nn.Module, dict[str, str]]" = weakref.WeakKeyDictionary()
"""Why a model bears no growing batch at a site, empty where it does; finding out costs a few short passes."""


@torch.inference_mode()
def record(model: LanguageModel, ids: Sequence[int], read: int, site: str, layers: Sequence[int]) -> Recording:
    """Runs the tokens once: keys and values, logits at token `read`, and what the layers have at the site."""
    taps = _taps(model, site, layers)
    values = {} if taps is not None else site_values(model, ids, site, layers)
    cache = DynamicCache()
    tokens = torch.tensor([list(ids)], device=device_of(model))

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda value: values.__setitem__(layer, _by_head(model, site, value)[0].clone())

    with native(model) as hf_model, _tapped({tap: keep(layer) for layer, tap in (taps or {}).items()}):
        last = torch.tensor([read])  # on the CPU: it may index the last block's output, wherever that lies
        out = hf_model(tokens, **with_cache(hf_model, cache), logits_to_keep=last)
    require_finite_logits(out.logits[0, -1])
    return Recording(tuple(ids), out.logits[0, -1].float().cpu(), values, cache)


def _taps(model: LanguageModel, site: str, layers: Iterable[int]) -> dict[int, nn.Module] | None:
    found = {layer: native_tap(model, site, layer) for layer in layers}
    taps = {layer: tap for layer, tap in found.items() if tap is not None}
    return taps if len(taps) == len(found) else None


def _by_head(model: LanguageModel, site: str, value: Tensor) -> Tensor:
    """A view of a tapped input with the heads apart, where the site has heads."""
    heads = n_heads(model, site)
    return value.view(*value.shape[:-1], heads, -1) if heads else value


@contextlib.contextmanager
def _tapped(taps: Mapping[nn.Module, Callable[[Tensor], object]]) -> Iterator[None]:
    """Each function sees the first input of its module, after all hooks that were there before."""

    def hook(see: Callable[[Tensor], object]) -> _PreHook:
        def seeing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return seeing

    with _pre_hooks({module: hook(see) for module, see in taps.items()}):
        yield


@contextlib.contextmanager
def _pre_hooks(hooks: Mapping[nn.Module, _PreHook]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReadOnly(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """The first tokens' keys and values for a batch of any size; new ones are attended to and forgotten."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.layers:  # a start of no tokens
            return key_states, value_states
        layer, rows = self.layers[layer_idx], key_states.shape[0]
        kept = (layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))
        return torch.cat([kept[0], key_states], dim=-2), torch.cat([kept[1], value_states], dim=-2)


def _start(recording: Recording, first: int) -> _ReadOnly:
    if first == 0 or recording.cache is None:
        return _ReadOnly()
    return _ReadOnly([(x.keys[:, :, :first], x.values[:, :, :first]) for x in recording.cache.layers])


@torch.inference_mode()
def edited_logits(
    model: LanguageModel, recording: Recording, site: str, edits: Sequence[Edit], read: int
) -> Float[Tensor, "row vocab"]:
    """Logits at token `read` after each edit; row 0 is the run itself, row i + 1 has edit i (float32, CPU)."""
    first = min(min(edit.position for edit in edits), read)
    order = sorted(range(len(edits)), key=lambda i: edits[i].layer)
    by_layer: dict[int, list[Edit]] = {}
    for i in order:
        by_layer.setdefault(edits[i].layer, []).append(edits[i])
    tokens = torch.tensor([recording.ids[first:]], device=device_of(model))
    with _growing(model, site, by_layer, first) as hf_model:
        keep = torch.tensor([read - first])  # on the CPU, as in `record`
        out = hf_model(tokens, **with_cache(hf_model, _start(recording, first)), logits_to_keep=keep)
    require_finite_logits(out.logits[:, -1])
    logits = out.logits[:, -1].float().cpu()
    placed = torch.empty_like(logits)
    placed[torch.tensor([0, *(i + 1 for i in order)])] = logits
    return placed


@contextlib.contextmanager
def _growing(model: LanguageModel, site: str, by_layer: dict[int, list[Edit]], first: int) -> Iterator[nn.Module]:
    """The Hugging Face model as its batch grows: the rows of each layer join before its block and are edited in it."""
    taps = _taps(model, site, by_layer)
    with contextlib.ExitStack() as stack:
        if taps is not None:  # the plain modules are faster, and the site lies between two of them
            hf_model, blocks = stack.enter_context(native(model)), native_blocks(model)
        else:
            hf_model, blocks = model.original_model, list(model.blocks)
        stack.enter_context(_pre_hooks({blocks[layer]: _joining(len(edits)) for layer, edits in by_layer.items()}))
        if taps is not None:
            writing = {tap: _writing(model, site, by_layer[layer], first) for layer, tap in taps.items()}
            stack.enter_context(_tapped(writing))
        else:
            hooks = [(site_hook(site, layer), _hooking(site, edits, first)) for layer, edits in by_layer.items()]
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield hf_model


def _joining(n: int) -> _PreHook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([hidden, hidden[:1].expand(n, -1, -1)])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _writing(model: LanguageModel, site: str, edits: list[Edit], first: int) -> Callable[[Tensor], object]:
    return lambda value: put(_by_head(model, site, value[-len(edits) :]), edits, site, first)


def _hooking(site: str, edits: list[Edit], first: int) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        put(value[-len(edits) :], edits, site, first)
        return value

    return hook


def can_grow(model: LanguageModel, site: str) -> bool:
    """True where a growing batch gives what a plain forward with a hook gives; where not, one warning says why."""
    reason = why_not_growing(model, site)
    warn_plain(model, reason)
    return not reason


@torch.inference_mode()
def why_not_growing(model: LanguageModel, site: str) -> str:
    """Why a model takes the plain path at a site, tried once on a few tokens; empty where a growing batch is exact.

    Some architectures build their masks for a fixed batch (ALiBi), keep no keys and values, or route tokens by batch.
    """
    reason = why_plain(model)
    if reason:
        return reason
    known = _NOT_GROWING.setdefault(model, {})
    if site not in known:
        known[site] = _growing_fault(model, site)
    return known[site]


def _growing_fault(model: LanguageModel, site: str) -> str:
    ids, last, top = list(range(1, 9)), 7, n_layers(model) - 1
    layers = sorted({0, top // 2, top})
    if not is_laid_out(model, site, 0):
        return f"its heads at {site} are laid out otherwise than by head and dimension"
    source = site_values(model, ids[::-1], site, layers)
    head = 0 if n_heads(model, site) else None
    places = ((layers[0], 3), (layers[-1], 5), (layers[len(layers) // 2], 7))
    edits = [Edit(layer, place, value_at(source[layer], site, place, head), head) for layer, place in places]
    try:
        read = record(model, ids[::-1], last, site, layers).values
        recording = record(model, ids, last, site, ())
        fast = edited_logits(model, recording, site, edits, last)
        whole = edited_logits(model, recording, site, [replace(edits[0], position=0)], last)
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return f"a batch that grows at {site} fails in it ({type(error).__name__})"
    plain = torch.stack([plain_edited_logits(model, ids, site, edit, last) for edit in edits])
    compared = [(read[layer], source[layer]) for layer in layers]
    both = [(fast[1:], plain), (fast[0], whole[0]), *compared]
    exact = all(apart(found, right) <= tolerance(dtype_of(model)) for found, right in both)
    return "" if exact else f"a batch that grows at {site} gives other numbers in it than one pass for each edit"
