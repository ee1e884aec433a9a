"""A controller before it is taught: what it reads, where it steers, and along what."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError, kind_of, quoted
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.methods.cache import Cache
from mechlens.methods.steering.controllers.controller import Controller, Network
from mechlens.methods.steering.controllers.plan import ControllerPlan
from mechlens.models.bridge import LanguageModel, checkpoint_now, d_model, is_bridge, loaded, n_layers
from mechlens.prompts.batch import TokenBatch

ACCEPTING = ("Sure", "Of course", "Certainly", "Here is", "Here are", "Yes", "To do this", "You can", "Let's", "First")
"""How answers begin that refuse nothing; Hegazy et al. 2025 have thirteen such phrases of their own, and eleven
refusals."""
POSITION = "last"


def start_of(
    model: LanguageModel,
    batch: TokenBatch,
    harmful: Bool[Tensor, " prompt"],
    plan: ControllerPlan,
    directions: Float[Tensor, "layer d_model"] | None = None,
    *,
    cache: Cache | None = None,
) -> Controller:
    """The controller of a plan, untaught; UserError for levels and layers that the model lacks or that can't be."""
    reads, layers = places_of(plan, n_layers(model))
    steered = [layer + int(plan.published) for layer in layers]
    acts = collect(model, batch, positions=[POSITION], levels=sorted({*reads, *steered}), cache=cache)
    at = [acts.at(level, POSITION).double() for level in steered]
    if directions is not None:
        if directions.shape != (len(layers), d_model(model)):
            raise UserError(f"directions have the shape {list(directions.shape)}, and there are {len(layers)} layers")
    elif plan.published:
        directions = phrase_direction(model).expand(len(layers), -1).clone()
    else:
        directions = torch.stack([own[harmful].mean(dim=0) - own[~harmful].mean(dim=0) for own in at]).float()
        alike = [level for level, one in zip(steered, directions, strict=True) if not bool(one.any())]
        if alike:
            raise UserError(
                f"both classes lie alike at level {alike[0]}, last; steer at higher layers than {layers[0]}"
            )
    return Controller(
        network=_network(acts, reads, len(layers), plan),
        reads=tuple((level, POSITION) for level in reads),
        layers=layers,
        directions=(directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)).float(),
        lengths=torch.tensor([float(own.norm(dim=1).median()) for own in at]),
        gate="raw" if plan.published else "sigmoid",
        weights="free" if plan.published else "budget",
        site="resid_post" if plan.published else "resid_pre",
        phase="generation" if plan.published else "both",
        method="as published" if plan.published else "taught by what it does",
        checkpoint=checkpoint_now(model),
        template=batch.template,
        train_ids=tuple(prompt.id for prompt in batch.prompts),
    )


def places_of(plan: ControllerPlan, blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Levels that are read and layers that are steered; UserError for those that can't be, in a model of so many."""
    if not isinstance(plan, ControllerPlan):
        raise UserError(f"the plan is {kind_of(plan)}; give an ml.ControllerPlan, or ml.PUBLISHED")
    third = max(1, blocks // 3)
    usual = range(blocks - third + 1, blocks + 1) if plan.published else {math.ceil(third * k / 3) for k in (1, 2, 3)}
    reads = plan.reads or tuple(sorted(usual))
    wrong = [level for level in reads if level not in range(blocks + 1)]
    wrong += [layer for layer in plan.layers if layer not in range(blocks)]
    if wrong:
        raise UserError(
            f"the model has levels 0 to {blocks} and layers 0 to {blocks - 1}, and {quoted(wrong[0])} was asked for"
        )
    for name, given in (("level", plan.reads), ("layer", plan.layers)):
        if twice := [one for one in given if given.count(one) > 1]:
            raise UserError(f"{name} {twice[0]} is named twice; name each {name} once")
    layers = plan.layers or tuple(range(0 if plan.published else max(reads), blocks))
    if not layers:
        raise UserError(
            f"level {max(reads)} is to be read and none of the layers 0 to {blocks - 1} is above; read lower levels"
        )
    if not plan.published and max(reads) > min(layers):
        raise UserError(
            f"level {max(reads)} is to be read and layer {min(layers)} steered; the prompt is steered as well, so read "
            f"at levels up to {min(layers)}"
        )
    return reads, layers


def phrase_direction(model: LanguageModel) -> Float[Tensor, " d_model"]:
    """Mean row of the output embedding over tokens of refusals minus that over accepting phrases (published)."""
    tokenizer = loaded(model).tokenizer
    whole = model.original_model.get_output_embeddings().weight if is_bridge(model) else model.W_U.T
    means = []
    for phrases in (PHRASES.phrases, ACCEPTING):
        ids = [token for phrase in phrases for token in tokenizer(phrase, add_special_tokens=False)["input_ids"]]
        means.append(whole[torch.tensor(ids, device=whole.device)].detach().float().cpu().mean(dim=0))
    difference: Tensor = means[0] - means[1]
    return difference


def _network(acts: Activations, reads: tuple[int, ...], n_layers: int, plan: ControllerPlan) -> Network:
    """First weights as PyTorch's linear layers have them; inputs are standardised unless as published."""
    inputs = torch.cat([acts.at(level, POSITION).float() for level in reads], dim=1)
    n, drawn = inputs.shape[1], torch.Generator().manual_seed(plan.seed)

    def uniform(*shape: int, ins: int) -> Tensor:
        return (torch.rand(*shape, generator=drawn) * 2 - 1) / math.sqrt(ins)

    plain = plan.published
    spread, rounding = inputs.std(dim=0), 1e-6 * inputs.abs().amax(dim=0).clamp_min(1.0)
    return Network(
        centre=torch.zeros(n) if plain else inputs.mean(dim=0),
        # What is the same in all training prompts is left as long as it is: divided by nearly 0, another prompt's
        # would drown the rest.
        spread=torch.ones(n) if plain else torch.where(spread > rounding, spread, 1.0),
        inner=uniform(plan.hidden, n, ins=n),
        inner_bias=uniform(plan.hidden, ins=n),
        outer=uniform(n_layers + 1, plan.hidden, ins=plan.hidden),
        outer_bias=uniform(n_layers + 1, ins=plan.hidden),
    )
