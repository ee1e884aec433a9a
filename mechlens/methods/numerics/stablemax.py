"""StableMax: a softmax whose sum can't swallow what is added to it (Prieto et al. 2025)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def stablemax_loss(
    logits: Float[Tensor, "position vocabulary"], targets: Int[Tensor, " position"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy with s(x) = x + 1 above 0 and 1 / (1 - x) below in place of the exponential, in float64.

    >>> import torch
    >>> round(float(ml.stablemax_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))), 4)  # 2 of 2 + 1
    0.4055
    """
    return stablemax_losses(logits, targets).mean()


def stablemax_losses(
    logits: Float[Tensor, "position vocabulary"], targets: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """The same, of every position."""
    exact = logits.double()
    # Each branch is kept away from the other's pole: a gradient of infinity times 0 would be NaN.
    sizes = torch.where(exact >= 0, exact.clamp(min=0) + 1, 1 / (1 - exact.clamp(max=0)))
    right = sizes.gather(1, targets[:, None])[:, 0]
    losses: Tensor = sizes.sum(dim=1).log() - right.log()
    return losses
