"""What a controller is compared with: ways of steering towards refusal that get the same prompts to choose by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import mean_difference, project
from mechlens.methods.steering.conditions import Projection, When
from mechlens.methods.steering.controllers.controller import Controlled, Controller
from mechlens.methods.steering.controllers.fit import fit_controller, read_values
from mechlens.methods.steering.controllers.plan import PUBLISHED
from mechlens.methods.steering.interventions import Add, Intervention
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.controllers.config import RivalsPlan
from mechlens.studies.controllers.head_shifts import head_shifts

NONE, CONTROLLER, CONSTANT, CONDITIONAL, HEADS = "no steering", "controller", "constant", "conditional", "heads"
UNIFORM, SHUFFLED, RANDOM = "uniform weights", "shuffled weights", "random direction"
AS_PUBLISHED = "as published"
ABOUT = {
    NONE: "the model as it is",
    CONTROLLER: "gate and layer weights for each prompt, taught by what the steered model says",
    CONSTANT: "the same for every prompt, all layers alike",
    CONDITIONAL: "the same, where the prompt's projection on harmful minus harmless is above a threshold (CAST)",
    HEADS: "the heads that tell the classes apart are shifted, for every prompt (ITI)",
    UNIFORM: "the controller's gate, all layers alike",
    SHUFFLED: "the controller's gate, its mean layer weights handed out to other layers",
    RANDOM: "the controller along random directions",
    AS_PUBLISHED: "a controller as Hegazy et al. 2025 fit and use it",
}
"""Every rival in words."""


@dataclass(frozen=True)
class Rivals:
    """Everything that was fitted, and what each rival does at a strength."""

    controller: Controller
    published: Controller
    condition: Projection
    mean_weights: Float[Tensor, " layer"]
    """Of the controller, over training prompts."""
    at: Mapping[str, Callable[[float], list[Intervention]]]
    """By name, in the order of `ABOUT`."""
    left_out: str = ""
    """Why a rival isn't there."""


def rivals_of(
    model: LanguageModel,
    batch: TokenBatch,
    train: Sequence[int],
    choose: Sequence[int],
    plan: RivalsPlan,
    template: ChatTemplate,
    refusal_tokens: Sequence[int],
    *,
    cache: Cache | None = None,
) -> Rivals:
    """Rivals fitted to training prompts; heads are chosen, and the threshold set, with validation prompts."""
    prompts = [batch.prompts[i] for i in train]
    harmful = torch.tensor([prompt.label == "harmful" for prompt in batch.prompts])
    own = fit_controller(model, prompts, plan, template=template, refusal_tokens=refusal_tokens, cache=cache)
    theirs = replace(PUBLISHED, seed=plan.seed)
    published = fit_controller(model, prompts, theirs, template=template, cache=cache)
    condition = condition_of(model, batch, train, choose, own.reads[-1], cache=cache)
    _, weights = own.decide(read_values(model, batch.select(train), own, cache=cache))
    mean = weights.mean(dim=0)
    shifts, left_out = _shifts(model, batch, train, choose, harmful, plan, cache)

    def constant(strength: float) -> list[Add]:
        return additions(own, 0.5 * strength)

    at: dict[str, Callable[[float], list[Intervention]]] = {
        NONE: lambda strength: [],
        CONTROLLER: lambda strength: [Controlled(own, strength=strength)],
        CONSTANT: lambda strength: [*constant(strength)],
        CONDITIONAL: lambda strength: [When(condition, tuple(constant(strength)))],
        UNIFORM: lambda strength: [Controlled(uniform(own), strength=strength)],
        SHUFFLED: lambda strength: [Controlled(shuffled(own, mean, plan.seed), strength=strength)],
        RANDOM: lambda strength: [Controlled(randomly(own, plan.seed), strength=strength)],
        AS_PUBLISHED: lambda strength: [Controlled(published, strength=strength)],
    }
    if shifts:
        at[HEADS] = lambda strength: [replace(one, strength=strength) for one in shifts]
    return Rivals(own, published, condition, mean, {name: at[name] for name in ABOUT if name in at}, left_out)


def _shifts(
    model: LanguageModel,
    batch: TokenBatch,
    train: Sequence[int],
    choose: Sequence[int],
    harmful: Bool[Tensor, " prompt"],
    plan: RivalsPlan,
    cache: Cache | None,
) -> tuple[tuple[Add, ...], str]:
    """The shifts of heads, or none and why."""
    if not plan.heads:
        return (), "Heads weren't asked for (--heads 0)."
    try:
        return head_shifts(model, batch, train, choose, harmful, plan.heads, cache=cache), ""
    except UserError as error:
        return (), f"No heads are shifted: {error}."


def condition_of(
    model: LanguageModel,
    batch: TokenBatch,
    train: Sequence[int],
    choose: Sequence[int],
    place: tuple[int, str],
    *,
    cache: Cache | None = None,
) -> Projection:
    """Harmful minus harmless of training prompts, with the threshold that tells validation prompts apart best."""
    level, position = place
    acts = collect(model, batch, levels=[level], positions=[position], cache=cache)
    harm = mean_difference(acts.select(train), "harmful", "harmless", level=level, position=position)
    along = project(acts.select(choose).at(level, position), harm)
    harmful = torch.tensor([batch.prompts[i].label == "harmful" for i in choose])
    ordered = along.sort().values
    cuts = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2])
    above = along.unsqueeze(0) > cuts.unsqueeze(1)
    right = above[:, harmful].double().mean(dim=1) - above[:, ~harmful].double().mean(dim=1)
    return Projection(harm, threshold=float(cuts[right == right.max()].median()))


def additions(controller: Controller, share: float) -> list[Add]:
    """What a controller would add at a gate of 1 and weights of one size, to every prompt."""
    return [
        replace(act, strength=share * float(length))
        for (act, _), length in zip(Controlled(controller, strength=1.0).acts, controller.lengths, strict=True)
        if isinstance(act, Add)
    ]


def uniform(controller: Controller) -> Controller:
    """The same with every layer weight one half, their mean."""
    return controller.with_weights(torch.full((len(controller.layers),), 0.5), "uniform weights")


def shuffled(controller: Controller, mean: Float[Tensor, " layer"], seed: int) -> Controller:
    """The same with its mean layer weights in another order."""
    order = torch.randperm(len(mean), generator=torch.Generator().manual_seed(seed))
    return controller.with_weights(mean[order].contiguous(), "shuffled weights")


def randomly(controller: Controller, seed: int) -> Controller:
    """The same along a random direction at each layer."""
    drawn = torch.randn(controller.directions.shape, generator=torch.Generator().manual_seed(seed))
    return replace(
        controller, directions=drawn / drawn.norm(dim=1, keepdim=True), method=f"{controller.method}, random direction"
    )
