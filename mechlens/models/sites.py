"""What each block adds to the residual stream, and where that can be changed.

A block of a hybrid model may have a convolution, a state space or linear attention where others have attention, and
one of a state-space model nothing besides. Whether all is known that a block adds is measured.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, dtype_of, is_bridge, loaded, n_layers, whole
from mechlens.models.engine.probes import apart, probe_tokens, tolerance
from mechlens.registry import unknown_name


@dataclass(frozen=True)
class Site:
    """One place; every one can be read and patched."""

    hook: str
    """TransformerLens' name inside a block."""
    heads: str = ""
    """Whose heads it has: "query", "key" (fewer under grouped-query attention), or none."""
    writable: bool = False
    """Whether interventions act on it: a block's ends, and what attention and MLP add to the residual stream."""
    axes: tuple[str, ...] = ("d_model",)
    """What a token's value there is made of."""


SITES = {
    "resid_pre": Site("hook_resid_pre", writable=True),
    "resid_mid": Site("hook_resid_mid"),
    "resid_post": Site("hook_resid_post", writable=True),
    "attn_out": Site("hook_attn_out", writable=True),
    "mlp_out": Site("hook_mlp_out", writable=True),
    "mlp_post": Site("mlp.hook_post", axes=("neuron",)),
    "q": Site("attn.hook_q", "query", axes=("head", "d_head")),
    "k": Site("attn.hook_k", "key", axes=("head", "d_head")),
    "v": Site("attn.hook_v", "key", axes=("head", "d_head")),
    "z": Site("attn.hook_z", "query", axes=("head", "d_head")),
    "pattern": Site("attn.hook_pattern", "query", axes=("head", "key")),
}
RESIDUAL = "resid"
"""The residual stream by levels: every block's `resid_pre`, and the last one's `resid_post`."""
CHANGEABLE = tuple(name for name, site in SITES.items() if site.writable)


def require_site(name: str, known: Iterable[str] = SITES) -> None:
    """UserError, with the nearest name, for a site that is not one of these."""
    if name not in known:
        raise unknown_name("site", name, tuple(known))


def site_hook(site: str, layer: int) -> str:
    """Hook name of a site in a block."""
    return f"blocks.{layer}.{SITES[site].hook}"


def level_hook(model: LanguageModel, level: int) -> str:
    """Hook name of a residual level: `resid_pre` of block `level`, or the last block's `resid_post`."""
    return site_hook(*level_place(n_layers(model), level))


def level_place(n_layers: int, level: int) -> "Place":
    """Where a residual level lies: the input of the block of its number, or the last block's output."""
    return ("resid_pre", level) if level < n_layers else ("resid_post", n_layers - 1)


def n_heads(model: LanguageModel, site: str) -> int:
    """Heads at a site: key and value heads are fewer under grouped-query attention; 0 where there are none."""
    heads = SITES[site].heads
    fewer = getattr(model.cfg, "n_key_value_heads", None) if heads == "key" else None
    return int(fewer or model.cfg.n_heads) if heads else 0


MIXERS = ("linear_attn", "mixer", "conv", "mamba")
"""TransformerLens' names for what stands in attention's place in a block without it."""
Place = tuple[str, int]
"""Site and layer."""
_UNSEEN: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()


def place_hooks(model: LanguageModel, places: Iterable[Place]) -> dict[Place, str]:
    """Hook names of places to change; `attn_out` is whatever mixes tokens in a block without attention.

    A block that is nothing but such a mixer adds nothing at `mlp_out`, so this place is left out beside `attn_out`.
    UserError for any other place that a block doesn't have.
    """
    points, wanted = model.hook_dict, sorted(places)
    found = {place: name for place in wanted if (name := _hook(points, *place)) is not None}
    for site, layer in wanted:
        only_mixer = site == "mlp_out" and ("attn_out", layer) in found and f"blocks.{layer}.hook_mixer_out" in points
        if (site, layer) not in found and not only_mixer:
            raise UserError(f"this model has no site {site} in block {layer}; intervene at resid_pre instead")
    return found


def require_everywhere(model: LanguageModel) -> None:
    """UserError where interventions can't reach everything that a model's blocks add; said before anything slow."""
    place_hooks(model, [(site, layer) for site in CHANGEABLE for layer in range(n_layers(model))])
    require_seen(model)


def _hook(points: dict[str, Any], site: str, layer: int) -> str | None:
    name = site_hook(site, layer)
    if name in points or site != "attn_out":
        return name if name in points else None
    mixers = [hook for part in MIXERS if (hook := f"blocks.{layer}.{part}.hook_out") in points]
    return mixers[0] if len(mixers) == 1 else None


def require_seen(model: LanguageModel) -> None:
    """UserError where blocks add something besides what `attn_out` and `mlp_out` show, which both would miss."""
    if not is_bridge(model):  # a HookedTransformer's blocks are its own, and add nothing else
        return
    if model not in _UNSEEN:
        _UNSEEN[model] = _unseen(model)
    if _UNSEEN[model] > tolerance(dtype_of(model)):
        raise UserError(
            f"{loaded(model).checkpoint.name} adds something to its residual stream besides attention and MLP "
            f"(up to {_UNSEEN[model]:.2g} of it), which interventions at all sites would miss; intervene at resid_pre"
        )


@torch.inference_mode()
def _unseen(model: LanguageModel) -> float:
    """How far the blocks' outputs are `apart` from their inputs and all that their sites add."""
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda value, hook: values.__setitem__(name, value.clone())

    points, gaps = model.hook_dict, []
    ends = {layer: [site_hook(site, layer) for site in ("resid_pre", "resid_post")] for layer in range(n_layers(model))}
    parts = {
        layer: [name for site in ("attn_out", "mlp_out") if (name := _hook(points, site, layer)) is not None]
        for layer in ends
    }
    names = [name for layer in ends for name in (*ends[layer], *parts[layer])]
    tokens = probe_tokens(model.original_model, 8)
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep(name)) for name in names], **whole(model))
    for layer, (before, after) in ends.items():
        if before not in values or after not in values:  # a hook point that is there and shows nothing
            return float("inf")
        total = values[before].float()
        for name in parts[layer]:
            total = total + values[name].reshape(total.shape).to(total)
        gaps.append(apart(total, values[after]))
    return max(gaps)
