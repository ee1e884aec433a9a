"""Curves and paths over checkpoints whose truth is planted: jumps, turns, and what is neither."""

from collections.abc import Callable

import torch
from torch import Tensor

D_MODEL = 200
CURVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing happens": lambda at, noise: noise,
    "a slow drift": lambda at, noise: 3 * at + noise,
    "a steady drift": lambda at, noise: 10 * at + noise,
    "a climb that slows down": lambda at, noise: 10 * (1 - (-4 * at).exp()) + noise,
    "a drift, read at steps 1, 2, 4, 8, ...": lambda at, noise: 10 * 2 ** ((len(at) - 1) * (at - 1)) + noise,
    "a random walk": lambda at, noise: noise.cumsum(dim=0),
    "a jump of 3 halfway": lambda at, noise: 3.0 * (at > 0.5) + noise,
    "a jump of 6 halfway": lambda at, noise: 6.0 * (at > 0.5) + noise,
    "a jump of 6 after two thirds": lambda at, noise: 6.0 * (at > 2 / 3) + noise,
    "a climb within a tenth of the way": lambda at, noise: 10 / (1 + (-60 * (at - 0.5)).exp()) + noise,
}
"""By name: values at times from 0 to 1, with errors of standard deviation 1."""
BENDS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "a constant drift": lambda n, noise: _bent(torch.arange(n), None) + 0.3 * noise,
    "a constant drift, noise as long as a step": lambda n, noise: _bent(torch.arange(n), None) + noise,
    "a drift whose steps shrink to nothing": lambda n, noise: (
        _bent(n * (1 - (1 - torch.arange(n) / (n - 1)) ** 2), None) + 0.1 * noise
    ),
    "a random walk": lambda n, noise: noise.cumsum(dim=0),
    "a right angle halfway": lambda n, noise: _bent(torch.arange(n), n // 2) + 0.3 * noise,
    "half a right angle halfway": lambda n, noise: _bent(torch.arange(n), n // 2, 0.5) + 0.3 * noise,
    "a right angle, noise as long as a step": lambda n, noise: _bent(torch.arange(n), n // 2) + noise,
}
"""By name: paths of one unit a checkpoint, with errors of length 1 times what is said."""


def _bent(at: Tensor, corner: int | None, share: float = 1.0) -> Tensor:
    """Along one axis, and after the corner along one that lies `share` of a right angle off it."""
    path = torch.zeros(len(at), D_MODEL, dtype=torch.float64)
    before, after = (at, 0 * at) if corner is None else (at.clamp(max=corner), (at - corner).clamp(min=0))
    angle = torch.tensor(share * torch.pi / 2)
    path[:, 0], path[:, 1] = before + angle.cos() * after, angle.sin() * after
    return path
