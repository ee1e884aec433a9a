"""Weights that can't write along a direction, for the length of a `with` block (Arditi et al. 2024)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, d_model, dtype_of, is_bridge, n_layers, regime
from mechlens.models.device_map import require_in_memory
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.native import plain_module

TOKENS = tuple(range(1, 17))
"""What the edited model is tried on."""


@contextlib.contextmanager
def orthogonalised(model: LanguageModel, vector: Float[Tensor, " d_model"]) -> Iterator[LanguageModel]:
    """The model with every weight and bias that writes to the residual stream made orthogonal to the vector.

    Token and position embeddings, attention and MLP outputs; a tied unembedding stays as it was. The original
    tensors are put back on the way out, also after an exception; the edited ones are for running only.

    Raises UserError for architectures that can't be edited so: norms after attention, MLP or embedding bring
    the direction back. Whether any of the direction is left is measured before the block begins.
    """
    _require_pre_norm(model)
    length = float(vector.double().norm())
    if len(vector) != d_model(model) or not 0 < length < float("inf"):
        raise UserError(f"a vector of {len(vector)} entries and length {length} can't be taken out of the weights")
    unit = vector.detach().double() / length
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, module in _writers(model):
            for parameter, axis in _written(model, name, module):
                assert module is not None
                original = module._parameters[parameter]
                assert original is not None
                kept.append((module, parameter, original))
                # A new parameter, never an edit in place: what is tied to the old one keeps it.
                module._parameters[parameter] = nn.Parameter(_without(original, unit, axis), requires_grad=False)
        _require_gone(model, unit)
        yield model
    finally:
        for module, parameter, original in reversed(kept):
            module._parameters[parameter] = original


@torch.no_grad()
def _without(weight: Tensor, unit: Tensor, axis: int) -> Tensor:
    """The weight without its component along `unit` on the residual stream's axis."""
    exact = weight.cpu() if weight.device.type == "mps" else weight  # which knows no float64
    wide = exact.double().movedim(axis, -1)
    away = wide - (wide @ unit.to(wide)).unsqueeze(-1) * unit.to(wide)
    return away.movedim(-1, axis).to(weight).contiguous()


def _require_pre_norm(model: LanguageModel) -> None:
    if not is_bridge(model) or (found := regime(model)) == "processed":
        raise UserError("weights can be made orthogonal on a TransformerBridge with raw weights; load the model so")
    require_in_memory(model.original_model, "it can't be made orthogonal to a direction (use Ablate)")
    if found != "raw":
        raise UserError(f"these weights are {found}, and quantised ones can't be edited; use Ablate, which needs none")
    name = type(model.original_model).__name__
    after = [norm for norm in ("ln1_post", "ln2_post") if any(_part(block, norm) is not None for block in model.blocks)]
    if after:
        raise UserError(
            f"{name} normalises after attention or MLP, and the gain of that norm brings the direction back; "
            "use Ablate, which needs no weights"
        )
    if _part(model, "embed_ln") is not None:
        raise UserError(
            f"{name} normalises its embedding, and that norm brings the direction back; use Ablate, which needs "
            "no weights"
        )


def _part(component: Any, *path: str) -> Any:
    """A component by TransformerLens' names; None where there is none."""
    for name in path:
        component = component._modules.get(name) if isinstance(component, nn.Module) else None
    return component


def _writers(model: LanguageModel) -> list[tuple[str, nn.Module | None]]:
    """The plain modules that should write to the residual stream, by TransformerLens' names; None where missing."""
    found = [("embed", _part(model, "embed")), ("pos_embed", _part(model, "pos_embed"))]
    found = [(name, part) for name, part in found if part is not None]
    for i, block in enumerate(model.blocks):
        found += [(f"blocks.{i}.{'.'.join(path)}", _part(block, *path)) for path in (("attn", "o"), ("mlp", "out"))]
    return [(name, plain_module(part)) for name, part in found]


def _written(model: LanguageModel, name: str, module: Any) -> list[tuple[str, int]]:
    """Names of a module's parameters with the axis of each that is the residual stream's."""
    axis = 1 if isinstance(module, nn.Embedding | Conv1D) else 0 if isinstance(module, nn.Linear) else None
    weight = getattr(module, "weight", None)
    if axis is None or weight is None or not weight.is_floating_point() or weight.shape[axis] != d_model(model):
        raise UserError(
            f"{type(model.original_model).__name__} has at {name} no plain matrix that writes to the residual stream "
            f"(found {type(module).__name__}); use Ablate, which needs no weights"
        )
    has_bias = getattr(module, "bias", None) is not None
    return [("weight", axis), *([("bias", 0)] if has_bias else [])]


def _require_gone(model: LanguageModel, unit: Tensor) -> None:
    """UserError if some of the direction is still written, by a module or a norm that we don't know of."""
    row = Row(TOKENS, tuple(range(len(TOKENS))))
    levels = list(range(n_layers(model) + 1))
    run = forward.fast_batch if forward.fits_fast_path(model) else None
    values = run(model, [row], levels, None) if run else forward.reference_batch(model, [row], levels)
    share = (values.double() @ unit.cpu()).abs() / values.double().norm(dim=-1).clamp(min=1e-30)
    # In half precision each addition to the stream rounds some of the direction back in.
    tolerance = 1e-4 if dtype_of(model) == torch.float32 else 5e-3
    if not bool((share <= tolerance).all()):
        raise UserError(
            f"{type(model.original_model).__name__} still writes along the direction ({float(share.max()):.1e} of the "
            "residual norm) with these weights orthogonal to it; use Ablate, which needs no weights"
        )
