"""Drops of harmful and harmless traces whose truth is planted, for the verdict of `mechlens cliff`."""

from dataclasses import dataclass

import torch

from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.cliff.verdict import FALLS, NONE, TEMPLATE, CliffVerdict, cliff_verdict


@dataclass(frozen=True)
class World:
    """How far the traces of a class fall, of 0 to 1."""

    harmful: float
    harmless: float
    share: float = 1.0
    """Of the harmful ones, that fall."""
    spread: float = 0.3


WORLDS: dict[str, tuple[World, str]] = {
    "nothing falls": (World(0.0, 0.0), NONE),
    "all fall alike: the template's tokens": (World(0.8, 0.8), TEMPLATE),
    "harmful ones fall": (World(0.8, 0.0), FALLS),
    "half of the harmful ones fall": (World(0.8, 0.0, share=0.5), FALLS),
    "harmful ones fall farther than the template": (World(0.9, 0.4), FALLS),
    "harmful ones fall a little": (World(0.1, 0.0), NONE),
    "only harmless ones fall": (World(0.0, 0.8), NONE),
    "nothing falls, traces differ much": (World(0.0, 0.0, spread=0.8), NONE),
    "all fall alike, traces differ much": (World(0.8, 0.8, spread=0.8), TEMPLATE),
}
"""With the word that is right."""
READ = Estimate(0.9, 0.8, 0.96, 60, is_auroc=True)


def planted(world: World, seed: int, n: int) -> CliffVerdict:
    """The verdict on `n` test traces of each class, with 20 random directions of which each drops by chance."""
    generator = torch.Generator().manual_seed(seed)
    drops = world.spread * torch.randn(21, 2 * n, generator=generator, dtype=torch.float64)
    harmful = torch.arange(2 * n) < n
    falling = torch.rand(2 * n, generator=generator) < world.share
    drops[0] += torch.where(harmful, world.harmful * falling, torch.tensor(world.harmless))
    return cliff_verdict(drops, harmful, [str(i) for i in range(2 * n)], READ, resamples=500, seed=seed)
