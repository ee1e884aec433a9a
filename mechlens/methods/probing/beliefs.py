"""Beliefs: on which side of two class centroids a prompt lies, by cosine, averaged over levels.

Zhao et al. 2025, "LLMs encode harmfulness and refusal separately", equations 2 and 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.direction import members, require_real
from mechlens.methods.shown import few, lines
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.same import Comparable


@dataclass(frozen=True, repr=False, eq=False)
class Centroids(Comparable):
    """Mean activations of two classes of prompts at one position, for every level.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> ml.centroids(acts, "harmful", "harmless", "inst").positive.shape == acts.at(0, "inst")[:4].shape
    True
    """

    positive: Float[Tensor, "level d_model"]
    negative: Float[Tensor, "level d_model"]
    levels: tuple[int, ...]
    position: str
    site: str
    contrast: tuple[str, str]
    """Labels of the positive and the negative class."""
    checkpoint: Checkpoint
    template: str
    """Fingerprint of the chat template that placed the position."""
    train_ids: tuple[str, ...]
    """Prompts the means were taken over; beliefs about these prompts are not held-out numbers."""

    def __post_init__(self) -> None:
        for label, values in zip(self.contrast, (self.positive, self.negative), strict=True):
            require_real(values, f"the centroid of {label!r}")

    @property
    def grand_mean(self) -> Float[Tensor, "level d_model"]:
        """Midpoint of the two centroids: unequal class sizes don't move it."""
        return (self.positive + self.negative) / 2

    def __repr__(self) -> str:
        made = f"{len(self.train_ids)} prompts"
        facts = {"levels": few(self.levels), "d_model": self.positive.shape[-1], "made of": made}
        title = f"Centroids of {' and '.join(self.contrast)} at {self.position}, {self.checkpoint.name} at {self.site}"
        return lines(title, facts)


def centroids(acts: Activations, positive: str, negative: str, position: str) -> Centroids:
    """Class means at one position, by any of its names, and every level; UserError where a class has no prompt.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> ml.centroids(acts, "harmful", "harmless", "inst").positive.shape == acts.at(0, "inst")[:4].shape
    True
    """
    column = column_of(position, acts.positions, acts.last)
    sides = members(acts, positive), members(acts, negative)
    levels = acts.values[:, :, column].unbind(dim=1)
    means = [[level[side].double().mean(dim=0) for side in sides] for level in levels]
    up, down = (torch.stack(found).to(acts.values.dtype) for found in zip(*means, strict=True))
    return Centroids(
        positive=up,
        negative=down,
        levels=acts.levels,
        position=acts.positions[column],
        site=acts.site,
        contrast=(positive, negative),
        checkpoint=acts.checkpoint,
        template=acts.template,
        train_ids=tuple(
            prompt for prompt, label in zip(acts.ids, acts.labels, strict=True) if label in (positive, negative)
        ),
    )


def layer_scores(
    values: Float[Tensor, "*batch level d_model"], reference: Centroids, *, centered: bool
) -> Float[Tensor, "*batch level"]:
    """s(h) = cos(h, positive centroid) - cos(h, negative centroid) at each level (float64); positive above 0.

    `centered=False` is the paper's score; there the mean that all prompts share dominates both cosines.
    `centered=True` subtracts the midpoint of the centroids from everything first. A zero vector counts
    as cosine 0, so a level at which all prompts are alike adds nothing.
    """
    up, down = reference.positive.double(), reference.negative.double()
    origin = reference.grand_mean.double() if centered else torch.zeros_like(up)
    scores = []
    for k in range(len(origin)):  # one level in memory
        shifted = values[..., k, :].double() - origin[k]
        scores.append(cosine_or_zero(shifted, up[k] - origin[k]) - cosine_or_zero(shifted, down[k] - origin[k]))
    return torch.stack(scores, dim=-1)


def belief(
    values: Float[Tensor, "*batch level d_model"],
    reference: Centroids,
    *,
    centered: bool,
    skip_embedding: bool,
) -> Float[Tensor, "*batch"]:
    """Mean of the layer scores over all levels; `skip_embedding` leaves out level 0.

    The paper keeps level 0, where the score knows only which token stands at the position.
    """
    kept = [i for i, level in enumerate(reference.levels) if not (skip_embedding and level == 0)]
    if not kept:
        raise UserError("no level is left after leaving out level 0; collect at least one level above it")
    return layer_scores(values, reference, centered=centered)[..., kept].mean(dim=-1)


def beliefs(
    acts: Activations, reference: Centroids, *, centered: bool, skip_embedding: bool
) -> Float[Tensor, " prompt"]:
    """The belief of every prompt; UserError where activations and centroids are not of one kind.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> reference = ml.centroids(acts, "harmful", "harmless", "inst")
    >>> belief = ml.beliefs(acts, reference, centered=True, skip_embedding=True)
    >>> bool(belief[:20].mean() > belief[20:].mean())
    True
    """
    acts.require_vectors()
    for name, one, other in (
        ("levels", acts.levels, reference.levels),
        ("site", acts.site, reference.site),
        ("weight regime", acts.checkpoint.regime, reference.checkpoint.regime),
    ):
        if one != other:
            raise UserError(
                f"the activations and the centroids differ in {name} ({one} and {other}); collect both alike"
            )
    values = acts.values[:, :, column_of(reference.position, acts.positions, acts.last)]
    return belief(values, reference, centered=centered, skip_embedding=skip_embedding)


def cosine_or_zero(
    values: Float[Tensor, "*batch d_model"], reference: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch"]:
    """Cosine of each vector with the reference, 0 where either is zero."""
    norms = values.norm(dim=-1) * reference.norm(dim=-1)
    dots = (values * reference).sum(dim=-1)
    return torch.where(norms > 0, dots / norms, 0.0)
