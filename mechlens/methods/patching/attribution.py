"""The gradient of a metric at one site of every layer, by one backward pass: what attribution patching stands on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.patching.metrics import Metric
from mechlens.models.bridge import LanguageModel, device_of, whole
from mechlens.models.engine.edits import Edit, value_at
from mechlens.models.sites import site_hook


class Gradients(NamedTuple):
    """One run's values at a site and the metric's gradient there, by layer, and the metric itself."""

    values: dict[int, Tensor]
    gradients: dict[int, Tensor]
    metric: float


def gradients(
    model: LanguageModel,
    ids: Sequence[int],
    site: str,
    layers: Sequence[int],
    metric: Callable[[Tensor], Tensor],
    read: int,
) -> Gradients:
    """Values and metric gradients of one run at a site.

    A step of zero is added where an edit would be written, and the gradient is the step's. TransformerLens' own
    attribution patching reads it off the hook point, where `resid_mid` lacks the skip connection's share.
    """
    names = {site_hook(site, layer): layer for layer in layers}
    tokens = torch.tensor([list(ids)], device=device_of(model))
    values: dict[int, Tensor] = {}
    steps: dict[int, Tensor] = {}

    def rooted(value: Tensor, hook: Any) -> Tensor:
        # The weights are frozen, so the embedding is where the graph begins.
        return value.detach().requires_grad_(True)

    def step(layer: int) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            values[layer] = value.detach().clone()
            steps[layer] = torch.zeros_like(value, requires_grad=True)
            return value.add_(steps[layer]) if site == "resid_mid" else value + steps[layer]  # see put

        return hook

    stepping = [(name, step(layer)) for name, layer in names.items()]
    with torch.enable_grad(), model.hooks(fwd_hooks=[("hook_embed", rooted), *stepping]):
        # On the CPU, where the clean run's logits are that a metric may compare with.
        found = metric(model(tokens, **whole(model))[0, read].float().cpu()[None]).sum()
        if not found.requires_grad:
            raise UserError("this metric has no gradient, so it can't be attributed; choose another engine or metric")
        # Zeros where the metric doesn't depend on a step.
        slopes = torch.autograd.grad(found, list(steps.values()), allow_unused=True, materialize_grads=True)
    return Gradients(
        values={layer: value[0] for layer, value in values.items()},
        gradients={layer: slope[0] for layer, slope in zip(steps, slopes, strict=True)},
        metric=float(found.detach()),
    )


def attributed(
    model: LanguageModel,
    site: str,
    ids: Sequence[int],
    edits: Sequence[Edit],
    metric: Metric,
    clean: Float[Tensor, " vocab"],
    read: int,
) -> Float[Tensor, " edit"]:
    """metric + <value - own value, gradient of the metric there> for every edit of the run `ids`.

    Exact where the metric is linear in the site; wrong where a softmax saturates on the way (Nanda 2023).
    """
    layers = sorted({edit.layer for edit in edits})
    own, slopes, at_start = gradients(model, ids, site, layers, lambda row: metric(row, clean)[0], read)
    shifts = torch.empty(len(edits), dtype=torch.float64)
    for layer in layers:
        some = [i for i, edit in enumerate(edits) if edit.layer == layer]
        # One move to the CPU a layer: layers may lie on several devices, and some devices have no float64.
        mine, slope = (
            torch.stack([value_at(of[layer], site, edits[i].position, edits[i].head) for i in some]).cpu().double()
            for of in (own, slopes)
        )
        values = torch.stack([edits[i].value for i in some])[:, : mine.shape[-1]].cpu().double()
        shifts[torch.tensor(some)] = ((values - mine) * slope).sum(dim=-1)
    return at_start + shifts
