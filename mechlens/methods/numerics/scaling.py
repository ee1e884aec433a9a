"""The part of a gradient that only scales the weights, and gradients without it (Prieto et al. 2025)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

TINY = 1e-30
"""The authors': keeps a weight of 0 from dividing by 0."""


def gradient_alignment(weights: Iterable[Tensor], gradients: Iterable[Tensor]) -> float:
    """Cosine of the step down the gradient with the weights: 1 where all that training does is to scale them.

    >>> import torch
    >>> ml.gradient_alignment([torch.tensor([3.0, 4.0])], [torch.tensor([-3.0, -4.0])])
    1.0
    """
    one, other = (torch.cat([own.detach().double().flatten() for own in side]) for side in (weights, gradients))
    size = float(one.norm() * other.norm())
    return -float(one @ other) / size if size > 0 else 0.0


def without_scaling(weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The gradient without its part along the weight, as long as it was.

    >>> import torch
    >>> ml.without_scaling(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
    [0.0, 5.0]
    """
    own, given = weight.detach().flatten(), gradient.flatten()
    across = given - (own @ given) / (own @ own + TINY) * own
    scaled: Tensor = across * (given.norm() / (across.norm() + TINY))
    return scaled.view_as(gradient)
