"""Conditional steering: an intervention that acts only on prompts where a condition holds.

The condition is read from the prompt's own pass at an early level, each row of a batch for itself, and what acts does
so at blocks above. Lee et al. 2025 (CAST) steer where a direction's projection says so; a Latent Guard says it too.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError, kind_of
from mechlens.methods.directions.direction import Direction, require_is_direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.steering.interventions import Act, require_number
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.same import digest


@dataclass(frozen=True)
class Projection:
    """Holds where a prompt's projection onto a direction is above a threshold, in the residual stream's units.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=1, position="last")
    >>> along = ml.project(acts.at(1, "last"), direction)
    >>> condition = ml.Projection(direction, threshold=float(along.median()))
    >>> bool(condition(acts.at(1, "last").unsqueeze(1)).float().mean() == 0.5)
    True
    """

    direction: Direction
    _: KW_ONLY
    threshold: float

    def __post_init__(self) -> None:
        require_is_direction(self.direction)
        require_number(self.threshold, "condition's threshold")
        if self.direction.site != "resid":
            raise UserError(
                f"the condition's direction was read at {self.direction.site}, and a condition reads the residual "
                "stream; take one read there"
            )
        if not self.direction.norm > 0:
            raise UserError("the condition's direction has length 0, so every prompt lies alike; make it anew")

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """Level and named position that are read: the direction's own."""
        return ((self.direction.level, self.direction.position),)

    @property
    def made(self) -> tuple[str, int, Checkpoint, str]:
        """What it is in words, the width it reads, the model it was made with, and its template."""
        own = self.direction
        return "condition's direction", len(own.vector), own.checkpoint, own.template

    def __call__(self, values: Float[Tensor, "prompt read d_model"]) -> Bool[Tensor, " prompt"]:
        """Whether it holds for each prompt, from the residuals at `places`."""
        along: Tensor = values[:, 0].double() @ self.direction.unit.to(values.device).double()
        return along > self.threshold


@dataclass(frozen=True)
class Flagged:
    """Holds where a Latent Guard flags a prompt; `When` makes it of the guard that it is given.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> flagged = ml.Flagged(ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1)).guard)
    >>> [position for _, position in flagged.places] == list(flagged.guard.positions)
    True
    """

    guard: FittedGuard

    def __post_init__(self) -> None:
        if not isinstance(self.guard, FittedGuard):
            raise UserError(f"{kind_of(self.guard)} is no fitted guard; give what ml.fit_guard or ml.open gave")
        if self.guard.site != "resid":
            raise UserError(f"the guard reads {self.guard.site}, and a condition the residual stream; fit it there")

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """Levels and named positions that the guard reads."""
        return tuple((place.level, place.position) for place in self.guard.places)

    @property
    def made(self) -> tuple[str, int, Checkpoint, str]:
        """As of `Projection`."""
        return "guard", self.guard.d_model, self.guard.checkpoint, self.guard.template

    def __call__(self, values: Float[Tensor, "prompt read d_model"]) -> Bool[Tensor, " prompt"]:
        """Whether it flags each prompt, from the residuals at `places`."""
        at = values.cpu().unbind(dim=1)
        scores = torch.stack([place.score(own) for place, own in zip(self.guard.places, at, strict=True)]).mean(dim=0)
        return (scores > self.guard.calibration.threshold).to(values.device)


@dataclass(frozen=True)
class When:
    """Does something to a prompt's row only where a condition holds for it; other rows stay as they are, to the bit.

    The condition is a `Projection` or a guard, at levels no higher than the first layer that is changed. It reads what
    stands there after the changes of the layers below, and decides once, for the prompt and its answer.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> acts = ml.collect(model, prompts)
    >>> harm = ml.mean_difference(acts, "harmful", "harmless", level=1, position="inst")
    >>> along = ml.project(acts.at(1, "inst"), harm)
    >>> push = ml.Add(harm, strength=1.0, unit="raw", layers=(1,))
    >>> never = ml.When(ml.Projection(harm, threshold=float(along.max())), push)
    >>> said = ml.answer_under(model, prompts[:2], [never], max_new_tokens=4)
    >>> said.texts == ml.answer(model, prompts[:2], max_new_tokens=4).texts
    True
    """

    condition: Projection | Flagged | FittedGuard | GuardEstimator
    act: Act | tuple[Act, ...]
    """What happens; several, one after the other, are decided on once."""
    _: KW_ONLY
    holds: bool = True
    """False: act where the condition doesn't hold."""

    def __post_init__(self) -> None:
        given = self.condition
        if isinstance(given, GuardEstimator):
            given = given.fitted
        if isinstance(given, FittedGuard):
            given = Flagged(given)
        if not isinstance(given, Projection | Flagged):
            raise UserError(
                f"the condition is {kind_of(given)}; give ml.Projection(direction, threshold=0.5) or a guard"
            )
        given_acts = self.act if isinstance(self.act, Sequence) else (self.act,)
        wrong = [one for one in given_acts if not isinstance(one, Act)]
        if wrong or not given_acts:
            said = kind_of(wrong[0]) if wrong else "nothing"
            raise UserError(f"what happens then is {said}; give ml.Add, ml.Ablate or ml.Replace")
        object.__setattr__(self, "condition", given)

    @property
    def decider(self) -> "IfHolds":
        """Lets all of it happen, or nothing."""
        assert isinstance(self.condition, Projection | Flagged)
        return IfHolds(self.condition, self.holds)

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """Levels and named positions that are read."""
        return self.decider.condition.places

    @property
    def acts(self) -> tuple[tuple[Act, int], ...]:
        """By the one share there is."""
        return tuple((one, 0) for one in self._listed)

    @property
    def _listed(self) -> tuple[Act, ...]:
        return (self.act,) if isinstance(self.act, Act) else tuple(self.act)

    @property
    def made(self) -> tuple[tuple[str, int, Checkpoint, str], ...]:
        """What decides, as of `Projection`."""
        return (self.decider.condition.made,)


@dataclass(frozen=True)
class IfHolds:
    """A condition as shares: 1 or 0."""

    condition: Projection | Flagged
    holds: bool

    @property
    def key(self) -> str:
        """Of all its numbers."""
        return f"holds {self.holds} {digest(self.condition)}"

    def __call__(self, values: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row output"]:
        return (self.condition(values) == self.holds).float().unsqueeze(1)
