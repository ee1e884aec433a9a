"""Fitting a steering controller: its gate alone, as published, or by what the steered model does.

As published (Hegazy et al. 2025, version 3) only the gate is taught: 1 for harmful prompts and 0 for harmless ones; the
layers' weights are told nothing. Here they are taught by the steered model's first answer token: how surely it refuses
a harmful prompt, and how far (KL) it moves on a harmless one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.judges import fallback_refusal_tokens
from mechlens.methods.cache import Cache
from mechlens.methods.progress import progress_bar
from mechlens.methods.steering.controllers.controller import Controller, Network
from mechlens.methods.steering.controllers.plan import ControllerPlan
from mechlens.methods.steering.controllers.start import start_of
from mechlens.methods.steering.controllers.steered_loss import steered_loss
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.same import digest
from mechlens.prompts.templates.template import TemplateChoice

HARMFUL = "harmful"
CLIP = 1.0
"""Longest gradient, as published."""


@dataclass(frozen=True)
class Taught:
    """Everything that training reads, by prompt."""

    values: Float[Tensor, "prompt read d_model"]
    harmful: Bool[Tensor, " prompt"]
    ids: tuple[tuple[int, ...], ...]
    bare: Float[Tensor, "prompt vocab"] | None
    """Logits of the first answer token, unsteered; None where only the gate is taught."""
    refusal_tokens: tuple[int, ...]


@torch.inference_mode(False)  # and with gradients, also where a notebook has turned them off
def fit_controller(
    model: LanguageModel,
    prompts: Prompts,
    plan: ControllerPlan,
    *,
    template: TemplateChoice = "tokenizer",
    refusal_tokens: Sequence[int] = (),
    directions: Float[Tensor, "layer d_model"] | None = None,
    cache: Cache | None = None,
) -> Controller:
    """A controller fitted to prompts labelled harmful or harmless; a killed fit goes on after its last epoch.

    `refusal_tokens`: first tokens of refusals, by which the steered model is taught; those of usual words by default.
    `directions`: what is added at each layer, in place of the plan's own, brought to length 1.
    UserError where a class is empty, or layers and levels don't fit the model.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:12], *ml.builtin_prompts("harmless")[:12]]
    >>> plan = ml.ControllerPlan(reads=(1,), layers=(1, 2), epochs=1, hidden=8)
    >>> ml.fit_controller(model, prompts, plan) == ml.fit_controller(model, prompts, plan)
    True
    """
    asked = as_prompts(prompts)
    harmful = torch.tensor([prompt.label == HARMFUL for prompt in asked])
    if bool(harmful.all()) or not bool(harmful.any()):
        raise UserError(f"{int(harmful.sum())} of {len(asked)} prompts are harmful; a controller needs both classes")
    batch = tokenize(asked, template_of(model, template))
    start = start_of(model, batch, harmful, plan, directions, cache=cache)
    bare = None if plan.published else logits_under(model, batch, [], cache=cache)
    first = tuple(refusal_tokens) or fallback_refusal_tokens(loaded(model).tokenizer).ids
    if bare is not None and (wrong := [token for token in first if not 0 <= token < bare.shape[1]]):
        raise UserError(f"there is no token {wrong[0]}, only 0 to {bare.shape[1] - 1}; give first tokens of refusals")
    taught = Taught(
        values=read_values(model, batch, start, cache=cache),
        harmful=harmful,
        ids=tuple(tuple(batch.row(i)) for i in range(len(asked))),
        bare=bare,
        refusal_tokens=first,
    )
    return replace(start, network=_trained(model, start, taught, plan, cache))


def read_values(
    model: LanguageModel, batch: TokenBatch, controller: Controller, *, cache: Cache | None = None
) -> Float[Tensor, "prompt read d_model"]:
    """What a controller reads of prompts, unsteered."""
    return values_at(model, batch, controller.reads, cache=cache)


def values_at(
    model: LanguageModel, batch: TokenBatch, places: Sequence[tuple[int, str]], *, cache: Cache | None = None
) -> Float[Tensor, "prompt read d_model"]:
    """Residuals at levels and named positions (float32), as conditions and controllers read them."""
    levels, names = {level for level, _ in places}, {name for _, name in places}
    acts = collect(model, batch, levels=sorted(levels), positions=sorted(names), cache=cache)
    return torch.stack([acts.at(level, name) for level, name in places], dim=1).float()


def _trained(
    model: LanguageModel, start: Controller, taught: Taught, plan: ControllerPlan, cache: Cache | None
) -> Network:
    """The network after its epochs; each finished one is kept."""
    parts = ("inner", "inner_bias", "outer", "outer_bias")
    own = [nn.Parameter(getattr(start.network, name).clone()) for name in parts]
    optimizer = torch.optim.AdamW(own, lr=plan.learning_rate)
    # What an epoch comes to: not how many there will be, nor what else a study's plan holds.
    known = digest(["controller", start, taught, plan.learning_rate, plan.batch_size, plan.trained_strength, plan.seed])
    for epoch in progress_bar(range(plan.epochs), title="fitting the controller", unit="epoch"):
        key = digest([known, epoch])
        kept = None if cache is None else cache.get(key)
        if kept is not None:
            _restore(kept, own, optimizer)
            continue
        for rows in _batches(taught.harmful, plan, epoch):
            now = replace(start, network=replace(start.network, **dict(zip(parts, own, strict=True))))
            optimizer.zero_grad()
            torch.autograd.backward(_loss(model, now, taught, rows, plan))
            nn.utils.clip_grad_norm_(own, CLIP)
            optimizer.step()
        if cache is not None:
            cache.put(key, _state(own, optimizer))
    return replace(start.network, **{name: one.detach() for name, one in zip(parts, own, strict=True)})


def _loss(model: LanguageModel, now: Controller, taught: Taught, rows: list[int], plan: ControllerPlan) -> Tensor:
    """Of the gate; unless it is fitted as published, of what the steered model says first, too."""
    said, wanted = now.network(taught.values[rows]), taught.harmful[rows].float()
    if taught.bare is None:
        return functional.mse_loss(said[:, 0], wanted)
    gate = functional.binary_cross_entropy_with_logits(said[:, 0], wanted)
    ids = [taught.ids[i] for i in rows]
    return gate + steered_loss(
        model, now, said, plan.trained_strength, ids, taught.harmful[rows], taught.bare[rows], taught.refusal_tokens
    )


def _batches(harmful: Bool[Tensor, " prompt"], plan: ControllerPlan, epoch: int) -> list[list[int]]:
    """Every prompt once in an order of its own each epoch, both classes spread evenly over it."""
    drawn = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    place = torch.empty(len(harmful))
    for own in (harmful.nonzero().flatten(), (~harmful).nonzero().flatten()):
        place[own[torch.randperm(len(own), generator=drawn)]] = (torch.arange(len(own)) + 0.5) / len(own)
    order = place.argsort(stable=True).tolist()
    return [order[low : low + plan.batch_size] for low in range(0, len(order), plan.batch_size)]


def _state(own: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    kept = {}
    for i, parameter in enumerate(own):
        kept[f"{i}"] = parameter.detach().clone()
        for name, value in optimizer.state[parameter].items():
            kept[f"{i} {name}"] = value.clone()
    return kept


def _restore(kept: dict[str, Tensor], own: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for i, parameter in enumerate(own):
        parameter.data.copy_(kept[f"{i}"])
        named = {name.partition(" ")[2]: value for name, value in kept.items() if name.startswith(f"{i} ")}
        optimizer.state[parameter] = named
