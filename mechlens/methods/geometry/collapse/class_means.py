"""Class means and what is left around them, from which every measure of neural collapse is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """The means of classes, about the mean of them, and every vector's distance from its own (float64).

    >>> import torch
    >>> means = ml.class_means(torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0], [6.0, 0.0]]), ["a", "a", "b", "b"])
    >>> means.means.tolist(), means.centre.tolist(), means.variances.tolist()
    ([[0.0, 2.0], [5.0, 0.0]], [2.5, 1.0], [1.0, 1.0])
    """

    classes: tuple[str, ...]
    """In order of first sight."""
    means: Float[Tensor, "class d_model"] = field(repr=False)
    residuals: Float[Tensor, "prompt d_model"] = field(repr=False)
    """Every vector minus the mean of its class."""
    of: Int[Tensor, " prompt"] = field(repr=False)
    """The number of every vector's class."""

    @property
    def centre(self) -> Float[Tensor, " d_model"]:
        """The mean of the class means, in which every class weighs the same."""
        return self.means.mean(dim=0)

    @property
    def centred(self) -> Float[Tensor, "class d_model"]:
        """Class means about their own mean."""
        return self.means - self.centre

    @property
    def counts(self) -> Int[Tensor, " class"]:
        """Vectors of each class."""
        return torch.bincount(self.of, minlength=len(self.classes))

    @property
    def variances(self) -> Float[Tensor, " class"]:
        """Mean squared distance of a class's vectors from their mean."""
        sums = torch.zeros(len(self.classes), dtype=torch.float64)
        return sums.index_add_(0, self.of, self.residuals.square().sum(dim=1)) / self.counts


def class_means(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> ClassMeans:
    """The means of the classes that `labels` name, one label a vector; UserError for fewer than two classes.

    >>> import torch
    >>> means = ml.class_means(torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0], [6.0, 0.0]]), ["a", "a", "b", "b"])
    >>> means.means.tolist(), means.centre.tolist(), means.variances.tolist()
    ([[0.0, 2.0], [5.0, 0.0]], [2.5, 1.0], [1.0, 1.0])
    """
    numbers = class_numbers(values, labels)
    classes = tuple(dict.fromkeys(labels))
    exact = values.detach().cpu().double()
    sums = torch.zeros(len(classes), exact.shape[1], dtype=torch.float64).index_add_(0, numbers, exact)
    means = sums / torch.bincount(numbers)[:, None]
    return ClassMeans(classes, means, exact - means[numbers], numbers)


def class_numbers(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> Int[Tensor, " prompt"]:
    """Every label as a number in order of first sight; UserError for what no classes can be made of."""
    if len(values) != len(labels):
        raise UserError(f"there are {len(values)} vectors and {len(labels)} labels; give one label for each vector")
    classes = tuple(dict.fromkeys(labels))
    if len(classes) < 2:
        raise UserError(f"the vectors are all of {len(classes)} class; give labels of at least two")
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            "some of the vectors are not finite; leave prompts without the position out, or read in float32"
        )
    return torch.tensor([classes.index(label) for label in labels])
