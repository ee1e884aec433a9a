"""How a guard scores one place of a prompt: by cosines with two centroids, along a line, or by lengths in two
subspaces; above 0 is positive.

The paper's rule (Zhao et al. 2025) compares cosines, in which the mean that all prompts share has the loudest say;
"centred" takes the midpoint of the centroids off first. The linear rules give log-odds for equally many prompts of
both classes, and so does the rule by subspaces (Wang et al. 2023), which needs no line between the classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.choices import RULES
from mechlens.errors import UserError, kind_of
from mechlens.methods.directions.methods import lda_line, logistic_line
from mechlens.methods.geometry.subspaces.grassmann import GAMMA, fit_grassmann, subspace_logits
from mechlens.methods.probing.beliefs import cosine_or_zero
from mechlens.registry import required

DIMENSIONS = 4
"""Of each class's subspace, or as many as the class has prompts."""
PENALTY = 0.1
"""C of the logistic rule: there are far more dimensions than prompts, so the penalty is a strong one."""
MIN_OF_A_KIND = 10
"""Prompts that a pool needs."""
LONGEST = 1e9
"""No residual stream has a larger norm: the largest known reach about a million."""


@dataclass(frozen=True)
class CosineScore:
    """cos(h - origin, positive - origin) - cos(h - origin, negative - origin); a zero vector has cosine 0."""

    positive: Float[Tensor, " d_model"]
    negative: Float[Tensor, " d_model"]
    origin: Float[Tensor, " d_model"]
    """Zero under the paper's rule, the midpoint of the centroids under the centred one."""

    def __post_init__(self) -> None:
        _require_finite("centroids", self.positive, self.negative, self.origin)
        sizes = sorted({len(vector) for vector in (self.positive, self.negative, self.origin)})
        if len(sizes) > 1:
            raise UserError(f"a guard's centroids have vectors of {sizes} entries; fit it anew")
        # Both may be one vector, as a template's token at level 0 is, but no mean of a class is nothing.
        nothing = [not bool(one.any()) or torch.equal(one, self.origin) for one in (self.positive, self.negative)]
        if any(nothing) and not self.is_blind:
            raise UserError("one of a guard's centroids is all zero, or its origin; fit it anew")

    @property
    def d_model(self) -> int:
        """Width of the residual stream that it reads."""
        return len(self.origin)

    @property
    def is_blind(self) -> bool:
        """True where every prompt scores the same."""
        return torch.equal(self.positive, self.negative)

    @property
    def reach(self) -> tuple[float, float]:
        """Bounds of every score: of a difference of two cosines."""
        return -2.0, 2.0

    @property
    def line(self) -> Float[Tensor, " d_model"]:
        """From one centroid to the other."""
        return self.positive - self.negative

    def __call__(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        shifted = values.double() - self.origin
        up, down = self.positive - self.origin, self.negative - self.origin
        return cosine_or_zero(shifted, up) - cosine_or_zero(shifted, down)


@dataclass(frozen=True)
class LinearScore:
    """weight . h + bias."""

    weight: Float[Tensor, " d_model"]
    bias: float

    def __post_init__(self) -> None:
        _require_finite("weights", self.weight, torch.tensor(self.bias))

    @property
    def d_model(self) -> int:
        """Width of the residual stream that it reads."""
        return len(self.weight)

    @property
    def is_blind(self) -> bool:
        """True where every prompt scores the same."""
        return not bool(self.weight.any())

    @property
    def reach(self) -> tuple[float, float]:
        """Bounds of the scores of every vector that is no longer than `LONGEST`."""
        far = LONGEST * float(self.weight.norm())
        return self.bias - far, self.bias + far

    @property
    def line(self) -> Float[Tensor, " d_model"]:
        """The weight."""
        return self.weight

    def __call__(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        return values.double() @ self.weight + self.bias


@dataclass(frozen=True)
class SubspaceScore:
    """Log-odds of the positive class's subspace over the negative one's (see `fit_grassmann`)."""

    bases: Float[Tensor, "two axis k"]
    """Orthonormal, the positive class first; the last axis is the one on which all vectors are 1."""
    centre: Float[Tensor, " d_model"]
    scale: float

    def __post_init__(self) -> None:
        _require_finite("subspaces", self.bases, self.centre, torch.tensor(self.scale))
        if self.bases.ndim != 3 or self.bases.shape[:2] != (2, len(self.centre) + 1) or not self.scale > 0:
            raise UserError(
                f"a guard's subspaces are {tuple(self.bases.shape)} beside a centre of {len(self.centre)} entries and "
                f"a scale of {self.scale:g}; fit it anew"
            )
        inner, one = self.bases.mT @ self.bases, torch.eye(self.bases.shape[2], dtype=torch.float64)
        if not torch.allclose(inner, one.expand_as(inner), atol=1e-6):
            raise UserError("a guard's subspaces have bases that aren't orthonormal; fit it anew")

    @property
    def d_model(self) -> int:
        """Width of the residual stream that it reads."""
        return len(self.centre)

    @property
    def is_blind(self) -> bool:
        """True where every prompt scores the same."""
        return torch.equal(self.bases[0], self.bases[1])

    @property
    def reach(self) -> tuple[float, float]:
        """Bounds of every score: of a difference of two logits."""
        return -GAMMA, GAMMA

    @property
    def line(self) -> Float[Tensor, " d_model"]:
        """Where the score rises fastest at the centre: its gradient there, in units of gamma / scale."""
        along = self.bases[:, -1]  # the centre is the vector of zeros with a 1 behind them
        up, down = (self.bases @ along[:, :, None])[:, :-1, 0] / along.norm(dim=1, keepdim=True).clamp_min(1e-12)
        line: Tensor = up - down
        return line

    def __call__(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        logits = subspace_logits(self.bases, values, self.centre, self.scale)
        return logits[:, 0] - logits[:, 1]


def _require_finite(what: str, *values: Tensor) -> None:
    """UserError for what could only score NaN, which is above no threshold: such a guard would let everything pass."""
    if not all(bool(torch.isfinite(value.float()).all()) for value in values):
        raise UserError(f"a guard's {what} are not finite, or larger than a float32 can be; fit it anew")
    if any(value.ndim and value.dtype != torch.float64 for value in values):
        raise UserError(f"a guard's {what} are {values[0].dtype}, and it computes in float64; fit it anew")


PlaceScore = CosineScore | LinearScore | SubspaceScore


Refused = Bool[Tensor, " prompt"]


@dataclass(frozen=True)
class ByRefusal:
    """A rule that is also told which of the prompts that it is fitted to the model refuses."""

    fit: Callable[[Float[Tensor, "prompt d_model"], Bool[Tensor, " prompt"], Refused], PlaceScore]


def needs_refusals(rule: str) -> bool:
    """Whether the rule of that name has to know what the model refuses."""
    return isinstance(RULES[rule], ByRefusal)


def require_pools(rule: str, positive: Bool[Tensor, " prompt"], refused: Refused) -> None:
    """UserError unless a rule by refusal has `MIN_OF_A_KIND` prompts of each kind that pools are made of."""
    kinds = {
        "refused positive": int((positive & refused).sum()),
        "accepted positive": int((positive & ~refused).sum()),
        "accepted negative": int((~positive & ~refused).sum()),
    }
    if min(kinds.values()) < MIN_OF_A_KIND:
        told = ", ".join(f"{n} {name}" for name, n in kinds.items())
        raise UserError(
            f"the guard rule {rule!r} needs {MIN_OF_A_KIND} prompts of each kind and there are {told}; add prompts, or "
            "take another rule"
        )


def score_by(
    rule: str,
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " prompt"],
    refused: Refused | None = None,
) -> PlaceScore:
    """How a rule of that name (`mechlens.choices.RULES`), fitted to these vectors, scores their place."""
    if isinstance(found := RULES[rule], ByRefusal):
        if refused is None:
            raise UserError(f"the guard rule {rule!r} needs to know which prompts the model refuses; give `refused`")
        score = found.fit(values.double(), positive, refused)
    else:
        score = required(RULES, rule)(values.double(), positive)
    if not isinstance(score, PlaceScore):
        raise UserError(
            f"the guard rule {rule!r} gave {kind_of(score)}, not a CosineScore, a LinearScore or a SubspaceScore"
        )
    return score


def faithful(values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]) -> PlaceScore:
    """The paper's: cosines with the two centroids, here of all harmful and of all harmless prompts."""
    up, down = values[positive].mean(dim=0), values[~positive].mean(dim=0)
    return CosineScore(up, down, torch.zeros_like(up))


def centred(values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]) -> PlaceScore:
    """The same about the midpoint of the centroids."""
    up, down = values[positive].mean(dim=0), values[~positive].mean(dim=0)
    return CosineScore(up, down, (up + down) / 2)


def lda(values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]) -> PlaceScore:
    """Log-odds of two Gaussian classes of one covariance, pooled within classes and shrunk (Ledoit & Wolf 2004)."""
    up, down = values[positive].mean(dim=0), values[~positive].mean(dim=0)
    weight = lda_line(values, positive, up - down)
    return LinearScore(weight, float(-weight @ (up + down) / 2))


def logistic(values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]) -> PlaceScore:
    """Log-odds of a logistic regression on standardised values, both classes weighing alike."""
    return LinearScore(*logistic_line(values, positive, penalty=PENALTY, balanced=True))


def subspaces(values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]) -> PlaceScore:
    """Log-odds by a subspace for each class, both classes weighing alike."""
    few = min(int(positive.sum()), int((~positive).sum()))
    labels = ["positive" if own else "negative" for own in positive.tolist()]
    found = fit_grassmann(values, labels, k=min(DIMENSIONS, few))
    order = [found.classes.index("positive"), found.classes.index("negative")]
    return SubspaceScore(found.bases[order], found.centre, found.scale)


@ByRefusal
def augmented(
    values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"], refused: Refused
) -> PlaceScore:
    """The paper's cosines with the pools of its Latent Guard (appendix B): refused and accepted harmful prompts, and
    accepted harmless ones.

    Both kinds of harmful prompts weigh alike here, whatever share the model refuses, so that their centroid presumes
    neither answer; what isn't refused counts as accepted.
    """
    kinds = [values[positive & refused], values[positive & ~refused]]
    up = torch.stack([kind.mean(dim=0) for kind in kinds if len(kind)]).mean(dim=0)
    accepted = ~positive & ~refused
    down = values[accepted if bool(accepted.any()) else ~positive].mean(dim=0)
    return CosineScore(up, down, torch.zeros_like(up))
