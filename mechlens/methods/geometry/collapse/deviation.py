"""How far features are from a reference: exact collapse is never reached, and what is left of it says more.

The perturbation view of Tirer, Huang & Niles-Weed 2023: features are compared, prompt by prompt, with those of another
layer or checkpoint, or with their own collapsed version.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import class_means


@dataclass(frozen=True)
class FeatureDeviation:
    """What differs between two feature matrices, as shares of the reference's own size; see `feature_deviation`.

    >>> import torch
    >>> reference = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
    >>> collapsed = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    >>> found = ml.feature_deviation(collapsed, reference, ["a", "a", "b", "b"])
    >>> found.total, found.between, found.within, found.within_kept
    (0.2, 0.0, 0.2, 0.0)
    """

    total: float
    """|H - H₀|² / |H₀|², both about their means: `between` and `within` add up to it."""
    between: float
    """The part by which class means moved against each other."""
    within: float
    """The part by which prompts moved against their class means."""
    within_kept: float
    """The spread within classes, |H_W|² / |H₀_W|²: below 1 where classes collapse; NaN where the reference has none."""


def feature_deviation(
    values: Float[Tensor, "prompt d_model"], reference: Float[Tensor, "other other_d_model"], labels: Sequence[str]
) -> FeatureDeviation:
    """The deviation of features from those of a reference, prompt by prompt, split into between and within classes.

    Both must have one basis, as checkpoints of one model have. UserError where prompts or dimensions differ.

    >>> import torch
    >>> reference = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
    >>> collapsed = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    >>> found = ml.feature_deviation(collapsed, reference, ["a", "a", "b", "b"])
    >>> found.total, found.between, found.within, found.within_kept
    (0.2, 0.0, 0.2, 0.0)
    """
    if values.shape != reference.shape:
        raise UserError(
            f"the features are {tuple(values.shape)} and the reference {tuple(reference.shape)}; read the same prompts "
            "of models of one width"
        )
    now, then = class_means(values, labels), class_means(reference, labels)
    whole = reference.detach().cpu().double()
    size = float((whole - whole.mean(dim=0)).square().sum())
    if size == 0:
        raise UserError("the reference has the same vector for every prompt; take another level, position or site")
    moved = (now.means - then.means)[now.of]
    between = float((moved - moved.mean(dim=0)).square().sum()) / size
    within = float((now.residuals - then.residuals).square().sum()) / size
    left, had = (float(side.residuals.square().sum()) for side in (now, then))
    return FeatureDeviation(between + within, between, within, left / had if had > 0 else float("nan"))
