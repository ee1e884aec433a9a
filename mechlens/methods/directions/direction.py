"""Directions of a concept: differences between the mean activations of two classes of prompts."""

import os
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError, an, kind_of, quoted
from mechlens.methods.activations.activations import Activations, column_of, one_cell, stored_name
from mechlens.methods.shown import few, lines
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.same import Comparable


@dataclass(frozen=True, repr=False, eq=False)
class Direction(Comparable):
    """A residual-stream vector at one level and position, in the model's own units (never normalised).

    `ml.steer(model, direction, "Hello")` shows what it does to answers; `ml.save(direction, "mine.safetensors")` keeps
    it and `ml.open("mine.safetensors")` is the same again. Directions of one place can be added,
    subtracted and scaled (`a + 0.5 * b`); `parts` says what a sum was made of.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> direction.level, direction.contrast, len(direction.train_ids)
    (2, ('harmful', 'harmless'), 40)
    >>> abs(float(direction.unit.norm()) - 1) < 1e-6
    True
    """

    vector: Float[Tensor, " d_model"]
    level: int
    position: str
    site: str
    method: str
    """How it was made, such as "mean difference" or "random"."""
    contrast: tuple[str, str]
    """Labels it points towards and away from."""
    checkpoint: Checkpoint
    template: str
    """Fingerprint of the chat template that placed the positions."""
    train_ids: tuple[str, ...]
    """Prompts it was fitted on; no number reported with it may come from these."""
    residual_norm: float | None = None
    """Median length of those prompts' vectors, there: what a strength in shares is a share of. None isn't known."""
    parts: tuple[tuple[float, "Direction"], ...] = ()
    """Of a sum, the directions that it was made of and how much of each; see `combined`."""

    __array_ufunc__ = None
    """So that a number of numpy's leaves the product to us."""

    def __post_init__(self) -> None:
        require_contrast(self.contrast)
        require_real(self.vector, f"level {self.level}, position {self.position!r}")
        if self.vector.ndim != 1:
            raise UserError(f"the direction's vector has the shape {list(self.vector.shape)}; give d_model numbers")

    @property
    def norm(self) -> float:
        """Euclidean length, in the residual stream's units."""
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The same direction with length 1; a zero direction stays zero."""
        return self.vector / self.norm if self.norm > 0 else self.vector

    def __add__(self, other: object) -> "Direction":
        return _combined((1, self), (1, other))

    def __sub__(self, other: object) -> "Direction":
        return _combined((1, self), (-1, other))

    def __mul__(self, factor: object) -> "Direction":
        return _combined((factor, self))

    __rmul__ = __mul__

    def __radd__(self, other: object) -> "Direction":
        return self if other == 0 else _combined((1, other), (1, self))  # Python's sum begins with 0

    def __truediv__(self, divisor: Any) -> "Direction":
        if isinstance(divisor, Real) and divisor == 0:
            raise UserError("a direction can't be divided by 0; give another number")
        return _combined((1 / divisor if isinstance(divisor, Real) else divisor, self))

    def __neg__(self) -> "Direction":
        return _combined((-1, self))

    def __repr__(self) -> str:
        made = f"{self.method} of {len(self.train_ids)} prompts" if self.train_ids else self.method
        if self.parts:
            made = " + ".join(
                f"{weight:.4g} ({' - '.join(one.contrast)}, {one.position})" for weight, one in self.parts
            )
        return (
            f"Direction({' - '.join(self.contrast)} at level {self.level}, {self.position}; norm {self.norm:.4g}, "
            f"d_model {len(self.vector)}; {made}; {self.checkpoint.name}, {self.site})"
        )


def _combined(*terms: tuple[object, object]) -> Direction:
    from mechlens.methods.directions.arithmetic import combined  # which is about directions and imports them

    return combined(terms)


@dataclass(frozen=True, repr=False, eq=False)
class DirectionGrid(Comparable):
    """One direction for every level and position of a set of activations; fields as in `Direction`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> grid = ml.direction_grid(acts, "harmful", "harmless")
    >>> grid.at(2, "last").position == grid.positions[-1]
    True
    """

    vectors: Float[Tensor, "level position d_model"]
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    site: str
    method: str
    contrast: tuple[str, str]
    checkpoint: Checkpoint
    template: str
    train_ids: tuple[str, ...]
    last: str = ""
    """Name under which the last token of the prompt is stored."""
    residual_norms: Float[Tensor, "level position"] | None = None

    def __post_init__(self) -> None:
        require_contrast(self.contrast)
        for level, row in zip(self.levels, self.vectors, strict=True):
            for position, vector in zip(self.positions, row, strict=True):
                require_real(vector, f"level {level}, position {position!r}")

    def at(self, level: int, position: str) -> Direction:
        """The direction of one level and one named position."""
        if level not in self.levels:
            raise UserError(f"there is no direction at level {level}; there are levels {list(self.levels)}")
        if stored_name(position, self.last, self.positions) not in self.positions:
            raise UserError(f"there is no direction at position {position!r}; there are {list(self.positions)}")
        row, column = self.levels.index(level), column_of(position, self.positions, self.last)
        return Direction(
            vector=self.vectors[row, column],
            level=level,
            position=self.positions[column],
            site=self.site,
            method=self.method,
            contrast=self.contrast,
            checkpoint=self.checkpoint,
            template=self.template,
            train_ids=self.train_ids,
            residual_norm=None if self.residual_norms is None else float(self.residual_norms[row, column]),
        )

    def __repr__(self) -> str:
        facts = {
            "levels": few(self.levels),
            "positions": few(self.positions),
            "d_model": self.vectors.shape[-1],
            "made by": f"{self.method} of {len(self.train_ids)} prompts",
        }
        return lines(f"DirectionGrid {' - '.join(self.contrast)} of {self.checkpoint.name} at {self.site}", facts)


def require_is_direction(given: object) -> None:
    """UserError for what is given in the place of a direction, such as its vector, or what holds it."""
    if isinstance(given, Direction):
        return
    holds = isinstance(getattr(given, "direction", None), Direction)
    there = "its .direction" if holds else "the Direction, not its vector"
    if isinstance(given, str | os.PathLike):
        there = f"what it holds: direction = ml.open({os.fspath(given)!r})"
        if os.path.isdir(given):  # a run's folder
            there = f"one of those that it holds: ml.open({os.fspath(given)!r}).directions, by name"
    if hasattr(given, "directions"):
        there = "one of its .directions, by name"
    if hasattr(given, "detection"):  # a concept has several
        there = "one of its: .best.direction, or .detection.strongest.direction where best is None"
    if given is None:
        there = "one; where a concept's best is None, its detection.strongest.direction is there all the same"
    raise UserError(f"{kind_of(given)} was given as the direction; give {there}")


def require_contrast(given: object) -> None:
    """UserError for anything else than the names of two sides: a direction's file couldn't be read again."""
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(side, str) for side in given)):
        raise UserError(
            f"a direction's contrast is {quoted(given, 80)}; give a tuple of the names of the two sides, such as "
            "('harmful', 'harmless')"
        )


def require_real(values: Tensor, what: str) -> None:
    """UserError for numbers that point nowhere: truth values, integers, complex numbers, NaN and infinity."""
    if not values.is_floating_point():
        kind = str(values.dtype).removeprefix("torch.")
        raise UserError(f"there are numbers of type {kind} at {what}; give real ones, such as vector.float()")
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"the numbers are not finite at {what}, so it points nowhere; make it from other prompts")


def mean_difference(acts: Activations, positive: str, negative: str, level: int, position: str) -> Direction:
    """Mean of the prompts labelled `positive` minus mean of those labelled `negative`, at one place.

    Other labels are left out. UserError where a label has no prompt. Zhao et al. 2025, Arditi et al. 2024.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> rows = acts.at(2, "last")  # 20 harmful, then 20 harmless prompts
    >>> bool((direction.vector - (rows[:20].mean(0) - rows[20:].mean(0))).abs().max() < 1e-5)
    True
    """
    if not isinstance(acts, Activations):
        raise UserError(f"a direction is found in what `collect` gives, and this is {an(type(acts).__name__)}")
    if other := next((kind_of(label) for label in (positive, negative) if not isinstance(label, str)), None):
        raise UserError(
            f"{other} was given as a label; give the labels of both sides, such as 'harmful' and 'harmless', which "
            "ml.as_prompts(texts, label=...) puts on prompts before they are collected; ml.find_concept takes lists"
        )
    if positive == negative:
        raise UserError(f"{positive!r} was given as both labels; a direction needs two")
    return direction_grid(one_cell(acts, level, position), positive, negative).at(level, position)


def direction_grid(acts: Activations, positive: str, negative: str) -> DirectionGrid:
    """The mean difference at every level and position; see `mean_difference`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> grid = ml.direction_grid(acts, "harmful", "harmless")
    >>> grid.at(2, "last").position == grid.positions[-1]
    True
    """
    return DirectionGrid(
        vectors=mean_differences(acts, positive, negative),
        levels=acts.levels,
        positions=acts.positions,
        site=acts.site,
        method="mean difference",
        contrast=(positive, negative),
        checkpoint=acts.checkpoint,
        template=acts.template,
        last=acts.last,
        train_ids=tuple(
            prompt for prompt, label in zip(acts.ids, acts.labels, strict=True) if label in (positive, negative)
        ),
        residual_norms=_median_norms(acts, members(acts, positive) | members(acts, negative)),
    )


def _median_norms(acts: Activations, kept: Bool[Tensor, " prompt"]) -> Float[Tensor, "level position"]:
    norms = torch.empty(acts.values.shape[1:3])
    for row, column, values in acts.cells():
        norms[row, column] = values[kept].double().norm(dim=-1).quantile(0.5)
    return norms


def mean_differences(acts: Activations, positive: str, negative: str) -> Float[Tensor, "level position d_model"]:
    """Mean of `positive` minus mean of `negative` prompts in every cell, in the activations' own dtype.

    Sums run in float64: residual streams have a few huge dimensions, and prompts that share one vector
    must give exactly zero.
    """
    inside = members(acts, positive).double()[None], members(acts, negative).double()[None]
    return weighted_differences(acts, *inside)[0].to(acts.values.dtype)


def weighted_differences(
    acts: Activations,
    for_positive: Float[Tensor, "draw prompt"],
    for_negative: Float[Tensor, "draw prompt"],
) -> Float[Tensor, "draw level position d_model"]:
    """Difference of two weighted means for each draw of weights (float64); NaN where weights sum to 0."""
    found = torch.empty(len(for_positive), *acts.values.shape[1:], dtype=torch.float64)
    for row, column, values in acts.cells():
        found[:, row, column] = weighted_difference(values, for_positive, for_negative)
    return found


def weighted_difference(
    values: Float[Tensor, "prompt d_model"],
    for_positive: Float[Tensor, "draw prompt"],
    for_negative: Float[Tensor, "draw prompt"],
) -> Float[Tensor, "draw d_model"]:
    """The same of one cell."""
    # Whole-number weights are summed first and divided last: that keeps sums of float32 values exact.
    exact = values.double()
    up = for_positive @ exact / for_positive.sum(dim=1, keepdim=True)
    down = for_negative @ exact / for_negative.sum(dim=1, keepdim=True)
    return up - down


def members(acts: Activations, label: str) -> Bool[Tensor, " prompt"]:
    """True for the prompts that carry the label; UserError where none does, or where not all have one vector."""
    acts.require_vectors()
    if label not in acts.labels:
        found = {known: acts.labels.count(known) for known in sorted(set(acts.labels))}
        if set(found) == {""}:
            raise UserError(
                f"no prompt is labelled {label!r}, nor any other way; collect labelled ones, such as "
                f"ml.as_prompts(texts, label={label!r}) for either side"
            )
        raise UserError(f"no prompt is labelled {label!r}; the labels and their counts are {found}")
    return torch.tensor([own == label for own in acts.labels])


def random_like(direction: Direction, n: int, seed: int) -> tuple[Direction, ...]:
    """`n` directions drawn evenly from the sphere with the same norm: the null for anything done with it.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> null = ml.random_like(direction, 20, seed=0)
    >>> len(null), abs(null[0].norm - direction.norm) < 1e-4
    (20, True)
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, len(direction.vector), generator=generator, dtype=torch.float64)
    scaled = draws / draws.norm(dim=1, keepdim=True) * direction.norm
    return tuple(replace(direction, vector=v.to(direction.vector.dtype), method="random", parts=()) for v in scaled)


def project(values: Float[Tensor, "*batch d_model"], direction: Direction) -> Float[Tensor, "*batch"]:
    """Length of each vector along the direction (onto its unit vector), in the residual stream's units.

    Zero for a zero direction.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> along = ml.project(acts.at(2, "last"), direction)
    >>> bool(along[:20].mean() > along[20:].mean())  # the harmful ones lie further along it
    True
    """
    if not isinstance(values, Tensor):
        raise UserError(
            f"project takes vectors, and this is {an(type(values).__name__)}; take acts.at(level, position)"
        )
    return values @ direction.unit.to(values)


def cosine(first: Float[Tensor, "*batch d_model"], second: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Cosine of the angle between vectors (float64); NaN where one is zero and so has no direction."""
    dots = (first.double() * second.double()).sum(dim=-1)
    lengths: Tensor = first.double().norm(dim=-1) * second.double().norm(dim=-1)
    return dots / lengths


def direction_cosine(first: Direction, second: Direction) -> float:
    """Cosine between two directions; UserError where weight regime, site or size differ.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> low, high = (ml.mean_difference(acts, "harmful", "harmless", level=at, position="last") for at in (1, 2))
    >>> -1 <= ml.direction_cosine(low, high) <= 1
    True
    """
    for name, one, other in (
        ("weight regime", first.checkpoint.regime, second.checkpoint.regime),
        ("site", first.site, second.site),
        ("size", str(len(first.vector)), str(len(second.vector))),
    ):
        if one != other:
            raise UserError(
                f"the directions differ in {name} ({one} and {other}), so their cosine means nothing; "
                "make both from activations of one kind"
            )
    return float(cosine(first.vector, second.vector))
