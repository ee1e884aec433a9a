"""Refusals under steering whose truth is known: what deciding per prompt adds, and whether layers weigh alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mechlens.studies.controllers.verdict import SteeringVerdict, steering_verdict

ORDERS = 20


@dataclass(frozen=True)
class World:
    """Chances of refusal: harmful and harmless prompts under the controller, under a constant, and unsteered."""

    controller: tuple[float, float]
    constant: tuple[float, float]
    none: tuple[float, float] = (0.4, 0.05)
    alike: float = 0.7
    """Share of prompts on which both come from one draw: easy ones are easy for both."""
    family: int = 1
    """Prompts of one family, which share all draws."""


@dataclass(frozen=True)
class Weights:
    """By how much the own weights beat orders of them, whose gaps spread."""

    own: float
    spread: float
    drawn: bool = False
    """Whether the own weights are one more of the orders."""


WORLDS = {
    "deciding helps": World((0.9, 0.1), (0.9, 0.5)),
    "deciding helps a little": World((0.85, 0.15), (0.8, 0.2)),
    "both alike": World((0.8, 0.2), (0.8, 0.2)),
    "both alike, prompt by prompt apart": World((0.8, 0.2), (0.8, 0.2), alike=0.0),
    "neither refuses anything": World((0.02, 0.02), (0.02, 0.02), (0.02, 0.02)),
    "both refuse everything": World((0.98, 0.98), (0.98, 0.98)),
    "refusal by chance": World((0.5, 0.5), (0.5, 0.5), (0.5, 0.5), alike=0.0),
    "a constant breaks what was there": World((0.8, 0.3), (0.98, 0.98), (0.75, 0.25)),
    "a constant does better": World((0.6, 0.2), (0.9, 0.2)),
    "the controller is the constant": World((0.8, 0.2), (0.8, 0.2), alike=1.0),
    "all three are one": World((0.7, 0.2), (0.7, 0.2), (0.7, 0.2), alike=1.0),
    "nearly all is right": World((0.97, 0.03), (0.97, 0.03), (0.97, 0.03), alike=0.0),
    "both alike, families of two": World((0.8, 0.2), (0.8, 0.2), alike=0.0, family=2),
}
LAYERS = {
    "a few layers carry it": Weights(0.3, 0.08),
    "weights help a little": Weights(0.08, 0.05),
    "own weights are one more order": Weights(0.0, 0.1, drawn=True),
    "all orders alike": Weights(0.0, 0.005),
}


def planted(world: World, weights: Weights, seed: int, n: int) -> SteeringVerdict:
    """The study's verdict on one draw of n prompts of each class."""
    drawn = torch.Generator().manual_seed(seed)
    harmful = torch.arange(2 * n) < n
    family = torch.arange(2 * n) // world.family

    def draw() -> Tensor:
        return torch.rand(2 * n, generator=drawn)[family]

    common, one, other, shared = draw(), draw(), draw(), draw() < world.alike

    def flags(chances: tuple[float, float], own: Tensor) -> Tensor:
        return torch.where(shared, common, own) < torch.where(harmful, chances[0], chances[1])

    third = common if world.alike == 1 else draw()
    refused = {
        "controller": flags(world.controller, one), "constant": flags(world.constant, other),
        "no steering": flags(world.none, third),
    }  # fmt: skip
    shifts = weights.spread * torch.randn(1 + ORDERS, generator=drawn)
    shifts[0] = shifts[0] if weights.drawn else weights.own
    base = torch.where(harmful, 0.7, 0.3) + 0.15 * torch.randn(2 * n, generator=drawn)
    sign = torch.where(harmful, 0.5, -0.5)
    first = base + shifts[:, None] * sign + 0.05 * torch.randn(1 + ORDERS, 2 * n, generator=drawn)
    families = [str(i) for i in family.tolist()]
    return steering_verdict(refused, first.clamp(0, 1), harmful, families, resamples=200, seed=0)
