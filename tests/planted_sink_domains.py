"""Sink masses and what heads are worth, drawn for two kinds of text: worlds that the verdict has to tell apart."""

import torch

from mechlens.methods.sinks.contrast import domain_contrast
from mechlens.studies.sinks.verdict import ALIKE, IDLE, INCONCLUSIVE, NONE, SWITCH, SinkVerdict, sinks_verdict

KINDS = ("prose", "code")
LAYERS, HEADS, CHOSEN, RANDOM = 6, 8, 4, 8


def _masses(n: int, seed: int, apart: float, differ: int) -> torch.Tensor:
    """Of 2n texts: heads have masses of their own, and the first `differ` have more of it on code."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.rand(LAYERS * HEADS, generator=draw) * 0.6 + 0.1
    mass = own + 0.08 * torch.randn(2 * n, LAYERS * HEADS, generator=draw)
    mass[n:, :differ] += apart
    return mass.view(2 * n, LAYERS, HEADS)


def _worth(n: int, seed: int, gap: float, all_gap: float, noise: float) -> torch.Tensor:
    """How much the loss rises with each head off; the chosen ones are worth more on prose, where they are active, and
    `all_gap` is what every head is worth more there."""
    draw = torch.Generator().manual_seed(seed + 1_000_000)
    rise = 0.01 + 0.01 * noise * torch.randn(CHOSEN + RANDOM, 2 * n, generator=draw)
    rise[:CHOSEN, :n] += gap
    rise[:, :n] += all_gap
    return rise


World = dict[str, float]
_PLAIN: World = {"sure": 1.0, "apart": 0.0, "gap": 0.0, "all_gap": 0.0, "noise": 1.0}
WORLDS: dict[str, tuple[World, str]] = {
    "no sinks": (_PLAIN | {"sure": 0.0}, NONE),
    "sinks alike, heads worth the same": (_PLAIN, ALIKE),
    "attention differs by 0.2, heads worth the same": (_PLAIN | {"apart": 0.2}, IDLE),
    "the same, every head worth 0.03 more on one kind": (_PLAIN | {"apart": 0.2, "all_gap": 0.03}, IDLE),
    "the same, such heads worth 0.03 more where dormant": (_PLAIN | {"apart": 0.2, "gap": -0.03}, IDLE),
    "attention differs by 0.2, heads worth 0.02 more": (_PLAIN | {"apart": 0.2, "gap": 0.02}, SWITCH),
    "attention differs by 0.2, heads worth 0.05 more": (_PLAIN | {"apart": 0.2, "gap": 0.05}, SWITCH),
    "the same, losses 20 times as noisy": (_PLAIN | {"apart": 0.2, "gap": 0.05, "noise": 20.0}, INCONCLUSIVE),
}
"""A world's numbers, and the word that is right for it."""


def planted(world: World, seed: int, n: int, shuffles: int = 99) -> SinkVerdict:
    """The study's verdict on n texts of each kind."""
    mass, worth = (
        _masses(n, seed, world["apart"], CHOSEN),
        _worth(n, seed, world["gap"], world["all_gap"], world["noise"]),
    )
    kinds = [kind for kind in KINDS for _ in range(n)]
    contrast = domain_contrast(mass, kinds, shuffles=shuffles, seed=seed)
    chosen = contrast.strongest(CHOSEN)
    others = [(layer, head) for layer in range(LAYERS) for head in range(HEADS) if (layer, head) not in chosen]
    # Which of two kinds a head that doesn't differ is active on is chance; the planted ones are active on prose.
    sure = [world["sure"] > 0] * (2 * n)
    return sinks_verdict(
        sure, mass, contrast, (*chosen, *others[:RANDOM]), worth, CHOSEN, kinds, resamples=200, seed=seed
    )
