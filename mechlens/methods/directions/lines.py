"""Lines that tell two classes apart, for directions and guards alike: linear discriminant and logistic regression."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def lda_line(
    values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"], difference: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """The difference of the class means through the inverse of the shrunk covariance within the classes."""
    within = torch.cat([side - side.mean(dim=0) for side in (values[positive], values[~positive])])
    return shrunk_covariance(within).solve(difference)


def logistic_line(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " prompt"],
    *,
    penalty: float,
    balanced: bool = False,
    steps: int = 1000,
) -> tuple[Float[Tensor, " d_model"], float]:
    """Weight and intercept, in the raw space, of an L2 logistic regression on standardised values (float64).

    `penalty` is scikit-learn's C: the smaller, the stronger. `balanced` lets both classes weigh alike.
    """
    exact = values.double().numpy()
    scaler = StandardScaler().fit(exact)
    model = LogisticRegression(C=penalty, max_iter=steps, class_weight="balanced" if balanced else None)
    model.fit(scaler.transform(exact), positive.numpy())
    weight = torch.from_numpy(model.coef_[0] / scaler.scale_).double()
    return weight, float(model.intercept_[0] - weight @ torch.from_numpy(scaler.mean_))


@dataclass(frozen=True)
class ShrunkCovariance:
    """A covariance matrix shrunk towards a multiple of the identity, kept without ever being formed.

    Orthonormal axes span the data; every direction outside their span has the same variance.
    """

    axes: Float[Tensor, "axis d_model"]
    variances: Float[Tensor, " axis"]
    elsewhere: float

    def solve(self, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """The inverse of the matrix times the vector."""
        inside = self.axes @ vector
        return (inside / self.variances) @ self.axes + (vector - inside @ self.axes) / self.elsewhere


def shrunk_covariance(centred: Float[Tensor, "prompt d_model"]) -> ShrunkCovariance:
    """Covariance of centred vectors, shrunk by Ledoit & Wolf's share; the identity where nothing varies."""
    n, d_model = centred.shape
    _, lengths, axes = torch.linalg.svd(centred.double(), full_matrices=False)
    real = lengths > lengths.max() * max(n, d_model) * torch.finfo(lengths.dtype).eps
    lengths, axes = lengths[real], axes[real]
    if not len(lengths):
        return ShrunkCovariance(axes, lengths, elsewhere=1.0)
    variances = lengths.square() / n
    average = float(variances.sum()) / d_model
    # Never exactly 0, so that the matrix can be inverted.
    share = max(float(ledoit_wolf_shrinkage(centred.double().numpy(), assume_centered=True)), 1e-9)
    return ShrunkCovariance(axes, (1 - share) * variances + share * average, elsewhere=share * average)
