"""The Hugging Face modules under a bridge, which are faster than TransformerLens' own and need no hook points."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mechlens.errors import UserError
from mechlens.models.engine.products import quick_products


@contextlib.contextmanager
def native(model: Any) -> Iterator[nn.Module]:
    """The plain Hugging Face model under a bridge, with its own attention kernel and the faster matrix products; the
    bridge returns on exit."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    swaps: list[tuple[nn.Module, str, nn.Module]] = []

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            original = child
            while isinstance(original, GeneralizedComponent) and original.original_component is not None:
                original = original.original_component
            if original is None:
                continue
            if original is not child and child is not None:
                swaps.append((module, name, child))
                module._modules[name] = original
            visit(original)

    hf_model = model.original_model
    bridged_attention = hf_model.config._attn_implementation
    try:
        visit(hf_model)
        hf_model.config._attn_implementation = getattr(getattr(model, "mechlens", None), "attention", "eager")
        with quick_products(hf_model):
            yield hf_model
    finally:
        hf_model.config._attn_implementation = bridged_attention
        for module, name, child in swaps:
            module._modules[name] = child


def blocks_of(module: Any) -> nn.ModuleList:
    """The transformer blocks of a plain or wrapped Hugging Face model, in order."""
    wanted = module.config.get_text_config(decoder=True).num_hidden_layers
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) == wanted:
            return part
    raise UserError(f"{type(module).__name__} has no list of its {wanted} blocks, so its residual stream can't be read")


def native_blocks(model: Any) -> list[nn.Module]:
    """The Hugging Face decoder layers, for hooks inside a `native` block."""
    # `model.blocks` is Hugging Face's own list, so `native` has put the plain layers back into it.
    return list(model.blocks)


def native_tap(model: Any, site: str, layer: int) -> nn.Module | None:
    """The plain Hugging Face module whose input is the site's value: the block, or for `z` the output projection.

    None where no module takes it as it is. A guess that has to be checked on the model; ask outside `native`.
    """
    found = model.blocks[layer] if site == "resid_pre" else None
    if site == "z":
        found = getattr(getattr(model.blocks[layer], "attn", None), "o", None)
    plain: nn.Module | None = plain_module(found)
    return plain


@torch.no_grad()
def refresh_splits(model: Any) -> None:
    """Takes TransformerLens' copies of joint matrices (query-key-value, gate-up) again, after these were changed."""
    splits = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    joint = [(part, name) for part in model.modules() for name in splits if callable(getattr(part, name, None))]
    with native(model):
        for part, name in joint:
            fresh = getattr(part, name)(part.original_component)
            for own, linear in zip(splits[name], fresh, strict=True):
                _overwrite(getattr(part, own).original_component, linear)


def _overwrite(old: nn.Module, new: nn.Module) -> None:
    for name, value in new.named_parameters():
        old.get_parameter(name).copy_(value)


def writing_modules(model: Any) -> list[nn.Module]:
    """The plain modules whose output is added to the residual stream: of each block the attention's and the MLP's."""
    outputs = (("attn", "o"), ("mlp", "out"))
    parts = [getattr(getattr(block, part, None), out, None) for block in model.blocks for part, out in outputs]
    return [plain_module(part) for part in parts if part is not None]


def plain_module(component: Any) -> Any:
    """The Hugging Face module that TransformerLens' component wraps; itself where it is none."""
    while getattr(component, "original_component", None) is not None:
        component = component.original_component
    return component
