"""The places inside a block that can be looked at and changed, with TransformerLens' names for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from mechlens.models.bridge import LanguageModel, n_layers
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


SITES = {
    "resid_pre": Site("hook_resid_pre", writable=True),
    "resid_mid": Site("hook_resid_mid"),
    "resid_post": Site("hook_resid_post", writable=True),
    "attn_out": Site("hook_attn_out", writable=True),
    "mlp_out": Site("hook_mlp_out", writable=True),
    "q": Site("attn.hook_q", "query"),
    "k": Site("attn.hook_k", "key"),
    "v": Site("attn.hook_v", "key"),
    "z": Site("attn.hook_z", "query"),
    "pattern": Site("attn.hook_pattern", "query"),
}
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
    last = n_layers(model) - 1
    return site_hook("resid_pre", level) if level <= last else site_hook("resid_post", last)


def n_heads(model: LanguageModel, site: str) -> int:
    """Heads at a site: key and value heads are fewer under grouped-query attention; 0 where there are none."""
    heads = SITES[site].heads
    fewer = getattr(model.cfg, "n_key_value_heads", None) if heads == "key" else None
    return int(fewer or model.cfg.n_heads) if heads else 0
