"""One edit of a run: a value put at one site. The reference, a whole forward pass for every edit, fits every model."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, d_model, device_of, is_bridge, n_layers, whole
from mechlens.models.engine.probes import finite_on_cpu
from mechlens.models.sites import SITES, n_heads, site_hook


@dataclass(frozen=True)
class Edit:
    """One site of one run with the value to be put there."""

    layer: int
    position: int
    """Index in the run's tokens."""
    value: Tensor
    """d_model long for residual sites, d_head for a head's, one row of attention for `pattern`."""
    head: int | None = None


def value_at(values: Tensor, site: str, position: int, head: int | None) -> Tensor:
    """The value of one position (and head) in what `site_values` gives for a layer."""
    if head is None:
        return values[position]
    return values[head, position] if site == "pattern" else values[position, head]


@dataclass(frozen=True)
class Recording:
    """A run that edits start from or take their values from."""

    ids: tuple[int, ...]
    logits: Float[Tensor, " vocab"]
    """At the token that was asked for (float32, CPU)."""
    values: dict[int, Tensor]
    """What the run has at a site, by layer: (seq, d_model), (seq, head, d_head), or (head, seq, key)."""
    cache: DynamicCache | None = None
    """Keys and values of every layer; none from the reference, which starts every pass at the first token."""


@torch.inference_mode()
def reference_record(
    model: LanguageModel, ids: Sequence[int], read: int, site: str, layers: Sequence[int]
) -> Recording:
    """One run with TransformerLens' own cache; UserError for a site that a block doesn't have."""
    names = {layer: site_hook(site, layer) for layer in layers}
    tokens = torch.tensor([list(ids)], device=device_of(model))
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names.values(), **whole(model))
    missing = [layer for layer, name in names.items() if name not in cache]
    if missing:
        # Parallel blocks have no place between attention and MLP; some models have no attention in some blocks.
        raise UserError(f"this model has no site {site!r} in block {missing[0]}; {_what_there_is(model, site)}")
    values = {layer: cache[name][0].clone() for layer, name in names.items()}
    return Recording(tuple(ids), finite_on_cpu(logits[0, read]), values)


def _what_there_is(model: LanguageModel, site: str) -> str:
    """The blocks that have a site, and the sites that can be patched in every block: what to choose instead."""
    blocks = range(n_layers(model))
    wanted = {site_hook(one, block) for one in SITES for block in blocks}
    tokens = torch.arange(1, 9, device=device_of(model)).unsqueeze(0)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in wanted, **whole(model))
    here = [str(block) for block in blocks if site_hook(site, block) in cache]
    everywhere = [
        one
        for one in SITES
        if all(site_hook(one, block) in cache for block in blocks)
        and is_laid_out(model, one, 0)
        and bears_edits(model, one, 0)
    ]
    found = f"choose block {' or '.join(here)}, or" if here else "choose"
    return f"{found} a site that every block has ({', '.join(everywhere)})"


def site_values(model: LanguageModel, ids: Sequence[int], site: str, layers: Sequence[int]) -> dict[int, Tensor]:
    """What a run has at one site in each layer, by the reference."""
    return reference_record(model, ids, -1, site, layers).values


def put(rows: Tensor, edits: Sequence[Edit], site: str, first: int = 0) -> Tensor:
    """Writes each edit's value into its own row: (row, seq, d) or (row, seq, head, d); pattern (row, head, seq, key).

    `first` is the run's token that the rows begin with. In place: on a bridge `hook_resid_mid` is the MLP norm's
    input, and a new tensor would leave the skip connection, which holds the same one, as it was.
    """
    index = torch.arange(len(edits), device=rows.device)
    # Sent to the device in one.
    where, heads = torch.tensor(
        [[edit.position - first for edit in edits], [edit.head or 0 for edit in edits]], device=rows.device
    )
    values = torch.stack([edit.value for edit in edits]).to(rows.device, rows.dtype)
    if edits[0].head is None:
        rows[index, where] = values
        return rows
    if site == "pattern":
        rows[index, heads, where] = values[:, : rows.shape[-1]]
    else:
        rows[index, where, heads] = values
    return rows


@torch.inference_mode()
def reference_edited_logits(
    model: LanguageModel, ids: Sequence[int], site: str, edit: Edit, read: int
) -> Float[Tensor, " vocab"]:
    """Logits at token `read` after one edit, by a whole forward pass with a hook (float32, CPU)."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        return put(value, [edit], site)

    tokens = torch.tensor([list(ids)], device=device_of(model))
    # A HookedTransformer would put a BOS in front of tokens only when given text; ids stay as they are.
    logits = model.run_with_hooks(tokens, fwd_hooks=[(site_hook(site, edit.layer), hook)], **whole(model))
    return finite_on_cpu(logits[0, read])


_LAID_OUT: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int], bool]]" = weakref.WeakKeyDictionary()


def is_laid_out(model: LanguageModel, site: str, layer: int) -> bool:
    """Whether a site has tokens and heads where edits are put; that of multi-head latent attention has them elsewhere.

    Tried once, with more tokens than heads, so that one can't be taken for the other.
    """
    known = _LAID_OUT.setdefault(model, {})
    if (site, layer) not in known:
        known[site, layer] = _tried_layout(model, site, layer)
    return known[site, layer]


def _tried_layout(model: LanguageModel, site: str, layer: int) -> bool:
    heads = n_heads(model, site)
    n = max(8, heads + 1)
    tokens = [1 + i % 8 for i in range(n)]
    shape = tuple(reference_record(model, tokens, -1, site, [layer]).values[layer].shape)
    if site == "pattern":
        return shape == (heads, n, n)
    if site == "mlp_post":  # a mixture of experts shows something else by this name
        return shape[:-1] == (n,) and (not is_bridge(model) or f"blocks.{layer}.mlp.out.hook_in" in model.hook_dict)
    return shape[:-1] == (n, heads) if heads else shape == (n, d_model(model))


@torch.inference_mode()
def bears_edits(model: LanguageModel, site: str, layer: int) -> bool:
    """False where a hook point only shows its value: in some architectures an edited `pattern` is never used."""
    if site != "pattern":
        return True
    found: list[Tensor] = []

    def first_token_only(value: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(value).index_fill_(-1, torch.tensor([0], device=value.device), 1.0)

    def keep(value: Tensor, hook: Any) -> None:
        found.append(value.clone())

    tokens = torch.arange(1, 9, device=device_of(model)).unsqueeze(0)
    after = "z" if site_hook("z", layer) in model.hook_dict else "attn_out"
    reading = (site_hook(after, layer), keep)
    model.run_with_hooks(tokens, fwd_hooks=[reading], **whole(model))
    model.run_with_hooks(tokens, fwd_hooks=[(site_hook(site, layer), first_token_only), reading], **whole(model))
    return len(found) == 2 and not torch.equal(*found)
