"""What the steered model's first answer token says of a controller, with a gradient for it."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mechlens.methods.steering.controllers.controller import Controller, decided
from mechlens.models.bridge import LanguageModel, device_of
from mechlens.models.native import native, native_blocks


def steered_loss(
    model: LanguageModel,
    controller: Controller,
    said: Float[Tensor, "row output"],
    strength: float,
    ids: Sequence[Sequence[int]],
    harmful: Bool[Tensor, " row"],
    bare: Float[Tensor, "row vocab"],
    refusal_tokens: Sequence[int],
) -> Float[Tensor, ""]:
    """Mean over rows: -log P(a refusal begins) for harmful prompts, KL(unsteered || steered) for harmless ones.

    `said` is what the controller's network says of the rows; the gradient goes there, and not into the model.
    """
    logits = steered_logits(model, controller, said, strength, ids).cpu()
    told = logits.log_softmax(dim=-1)
    refuses = -told[:, list(refusal_tokens)].logsumexp(dim=-1)
    moved = functional.kl_div(told, bare.log_softmax(dim=-1), log_target=True, reduction="none").sum(dim=-1)
    return torch.where(harmful, refuses, moved).mean()


def steered_logits(
    model: LanguageModel,
    controller: Controller,
    said: Float[Tensor, "row output"],
    strength: float,
    ids: Sequence[Sequence[int]],
) -> Float[Tensor, "row vocab"]:
    """Logits of the first answer token, by a plain pass of the whole prompts that gradients go through (float32)."""
    gate, weights = decided(said, controller.gate, controller.weights, controller.fixed)
    amounts = strength * gate.unsqueeze(1) * weights * controller.lengths
    device, width = device_of(model), max(map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=device)
    last = torch.tensor([len(row) - 1 for row in ids], device=device)
    with contextlib.ExitStack() as stack:
        hf_model: Any = stack.enter_context(native(model))
        blocks = native_blocks(model)
        for i, layer in enumerate(controller.layers):
            hook = _adding(amounts[:, i], controller.directions[i])
            stack.callback(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        for parameter in hf_model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        head = hf_model.get_output_embeddings()
        rows = torch.arange(len(ids), device=device)
        shown = head.register_forward_pre_hook(lambda module, args: (args[0][rows, last].unsqueeze(1),))
        stack.callback(shown.remove)
        logits: Tensor = hf_model(tokens, use_cache=False).logits[:, 0].float()
    return logits


def _adding(amount: Float[Tensor, " row"], direction: Float[Tensor, " d_model"]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        added = amount.to(hidden)[:, None, None] * direction.to(hidden)
        if args:
            return (hidden + added, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden + added}

    return hook
