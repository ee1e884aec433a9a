"""Erasing a concept from activations with the least change: LEACE (Belrose et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.directions.methods import shrunk_covariance

# A canonical correlation this small is float32's rounding; the sampling error of a million prompts is 100 times larger.
_NO_CORRELATION = 1e-5


@dataclass(frozen=True)
class Eraser:
    """Removes from vectors whatever tells the classes apart linearly: x -> x - write (read (x - mean)).

    On the vectors it was fitted on, the class means are equal afterwards, so that no linear probe of any convex
    loss does better than a constant. Elsewhere that holds as far as the fit generalises: check it on held-out
    prompts. A matrix of rank classes - 1 is taken away, kept as its two thin factors (float64).
    """

    mean: Float[Tensor, " d_model"]
    """Mean of the vectors it was fitted on, which stays where it is."""
    read: Float[Tensor, "rank d_model"]
    """What is measured of a vector: the whitened class differences."""
    write: Float[Tensor, "d_model rank"]
    """What is taken off for it. `read @ write` is the identity: erasing twice is erasing once."""
    classes: tuple[str, ...]
    """Labels that can't be told apart any more."""

    @property
    def rank(self) -> int:
        """Number of dimensions taken away: classes - 1, or fewer where their means lie in fewer dimensions."""
        return len(self.read)

    def __call__(self, values: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The vectors without the concept, in their own dtype; those that were given stay as they are."""
        mean, read, write = (part.to(values.device) for part in (self.mean, self.read, self.write))
        exact = values.double()
        return (exact - ((exact - mean) @ read.T) @ write.T).to(values.dtype)


def fit_eraser(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> Eraser:
    """The eraser of the concept that `labels` name, one a vector: two classes or more.

    For a confound (final punctuation, corpus) fit it on the confound's labels before fitting a direction, best on
    prompts where confound and concept are independent. Where they go together, what they share goes too, and within
    a class the concept's scores then lean against the confound. The covariance of all vectors is shrunk after Ledoit &
    Wolf 2004: that moves the change a little off the smallest one and leaves erasure exact. UserError for fewer than
    two classes, a number of labels other than that of vectors, or values that aren't finite.
    """
    classes = tuple(sorted(set(labels)))
    _require_sound(values, labels, classes)
    exact = values.detach().cpu().double()
    mean = exact.mean(dim=0)
    covariance = shrunk_covariance(exact - mean)
    spread = covariance.variances.sqrt()
    # All happens in the span of the data: class differences lie in it, and whitening maps it to itself.
    differences = torch.stack([_weighted_difference(exact, mean, _of(labels, name)) for name in classes], dim=1)
    whitened = (covariance.axes @ differences) / spread[:, None]
    basis, correlations, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = basis[:, correlations > _NO_CORRELATION]
    return Eraser(
        mean=mean,
        read=(basis / spread[:, None]).T @ covariance.axes,
        write=covariance.axes.T @ (basis * spread[:, None]),
        classes=classes,
    )


def _weighted_difference(
    values: Float[Tensor, "prompt d_model"], mean: Float[Tensor, " d_model"], inside: Bool[Tensor, " prompt"]
) -> Float[Tensor, " d_model"]:
    """Mean of one class minus that of all, weighted so that whitening turns it into canonical correlations."""
    return (values[inside].mean(dim=0) - mean) * inside.double().mean().sqrt()


def _of(labels: Sequence[str], name: str) -> Bool[Tensor, " prompt"]:
    return torch.tensor([label == name for label in labels])


def _require_sound(values: Tensor, labels: Sequence[str], classes: tuple[str, ...]) -> None:
    if len(labels) != len(values):
        raise UserError(f"there are {len(values)} vectors and {len(labels)} labels; give one label for each vector")
    if len(classes) < 2:
        raise UserError(f"the labels hold {list(classes)}; erasing a concept needs at least two classes")
    if not bool(torch.isfinite(values).all()):
        raise UserError("the vectors are not finite; collect them again in float32 or bfloat16")
