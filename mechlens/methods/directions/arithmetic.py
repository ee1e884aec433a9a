"""Sums of directions: all that vector arithmetic makes of them is one weighted sum, whose parts are kept with it.

Whatever was done, `parts` are weights of directions that weren't sums themselves: (a + b) - b has one part of weight 1
and so is a. Nothing is rounded on the way: a vector is always summed from the parts, in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError, kind_of, many
from mechlens.methods.directions.direction import Direction, require_is_direction
from mechlens.models.checkpoint import VERSION

Terms = Sequence[tuple[float, Direction]]


def combined(terms: Sequence[tuple[object, Any]]) -> Direction:
    """The weighted sum; position, residual norm and contrast are the first one's (turned round by a weight below 0).

    UserError for directions of different models, templates, sites, levels, widths or types.
    """
    weights = _numbers([weight for weight, _ in terms])
    directions: list[Direction] = [one for _, one in terms]
    require_summable(directions)
    parts = _flat(list(zip(weights, directions, strict=True)))
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    weight, first = weights[0], directions[0]
    return replace(
        first,
        vector=_summed(parts).to(first.vector),
        contrast=first.contrast if weight >= 0 else first.contrast[::-1],
        method=COMBINATION,
        train_ids=tuple(dict.fromkeys(prompt for _, one in parts for prompt in one.train_ids)),
        parts=parts,
    )


COMBINATION = "combination"
"""The method of a direction that was made of others."""


def _flat(terms: Terms) -> tuple[tuple[float, Direction], ...]:
    """Weights of directions that are no sums themselves, each once; those of weight 0 are left out, if any is left."""
    found: list[tuple[float, Direction]] = []
    for weight, one in _opened(terms):
        same = next((i for i, (_, known) in enumerate(found) if known == one), None)
        if same is None:
            found.append((weight, one))
        else:
            found[same] = found[same][0] + weight, one
    return tuple(part for part in found if part[0]) or (found[0],)


def _opened(terms: Terms) -> Iterator[tuple[float, Direction]]:
    for weight, one in terms:
        yield from [(weight * own, part) for own, part in one.parts] or [(weight, one)]


def _summed(parts: Terms) -> Float64[Tensor, " d_model"]:
    return torch.stack([weight * one.vector.double() for weight, one in parts]).sum(dim=0)


def merge_directions(directions: Sequence[Direction], weights: Sequence[float | int] | None = None) -> Direction:
    """The mean of several directions of one level, or with weights their weighted mean.

    Longer ones count for more; `a / a.norm` has length 1. The merge of equal ones is the first.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> inst, last = (ml.mean_difference(acts, "harmful", "harmless", 2, position) for position in ("inst", "last"))
    >>> merged = ml.merge_directions([inst, last])
    >>> [weight for weight, _ in merged.parts]
    [0.5, 0.5]
    >>> ml.merge_directions([last, last]) == last
    True
    """
    if isinstance(directions, Direction) or not directions:
        given = "one direction" if isinstance(directions, Direction) else "no direction"
        raise UserError(f"{given} was given to merge; give a list of two or more")
    given_weights = _numbers([1] * len(directions) if weights is None else list(weights))
    if len(given_weights) != len(directions):
        raise UserError(
            f"{many(len(given_weights), 'weight')} came for {many(len(directions), 'direction')}; give one each"
        )
    total = sum(given_weights)
    if not math.isfinite(total) or total == 0:
        raise UserError(f"the weights add up to {total}, so there is no mean; give others, or add: a + 0.5 * b")
    if all(one == directions[0] for one in directions):
        return directions[0]  # thirds needn't add up to 1 exactly
    return combined([(weight / total, one) for weight, one in zip(given_weights, directions, strict=True)])


def project_out(direction: Direction, *others: Direction) -> Direction:
    """What is left of a direction at a right angle to all the others: its part along them is taken away.

    UserError where nothing is left but rounding.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> inst, last = (ml.mean_difference(acts, "harmful", "harmless", 2, position) for position in ("inst", "last"))
    >>> rest = ml.project_out(inst, last)
    >>> abs(ml.direction_cosine(rest, last)) < 1e-5
    True
    >>> [part.position == own.position for (_, part), own in zip(rest.parts, (inst, last))]
    [True, True]
    """
    if not others:
        raise UserError("nothing was named to be projected out; give one or more directions after the first")
    require_summable([direction, *others])
    if any(one.norm == 0 for one in others):
        raise UserError("a direction to be projected out has length 0, so it points nowhere; leave it out")
    along = torch.stack([one.vector.double() / one.norm for one in others], dim=1)
    found = torch.linalg.lstsq(along, direction.vector.double()[:, None], driver="gelsd").solution[:, 0]
    weights = [-float(amount) / one.norm for amount, one in zip(found, others, strict=True)]
    rest = combined([(1.0, direction), *zip(weights, others, strict=True)])
    if rest.norm <= 10 * torch.finfo(direction.vector.dtype).eps * direction.norm:
        raise UserError("nothing is left of the direction: it lies along those that were projected out; leave some out")
    return rest


def _numbers(weights: Sequence[object]) -> list[float]:
    """As floats; UserError for what is none, or not finite."""
    found = []
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise UserError(
                f"a direction is multiplied by a number, and this is {kind_of(weight)}; give one, such as 0.5"
            )
        if not math.isfinite(weight):
            raise UserError(f"a direction can't be multiplied by {weight}; give a finite number")
        found.append(float(weight))
    return found


def require_summable(directions: Sequence[Direction]) -> None:
    """UserError for directions whose sum means nothing, or that aren't directions."""
    for one in directions:
        require_is_direction(one)
    first = directions[0]
    for other in directions[1:]:
        if not first.checkpoint.has_weights_of(other.checkpoint) or first.checkpoint.regime != other.checkpoint.regime:
            raise UserError(
                f"the directions are of different models ({_model(first)}; {_model(other)}), so their sum means "
                "nothing; make both in one (where another tool's is of this one, dataclasses.replace(it, "
                "checkpoint=..., template=...) says so)"
            )
        here, there = _place(first), _place(other)
        if name := next((name for name in here if here[name] != there[name]), None):
            raise UserError(
                f"the directions differ in {name} ({here[name]} and {there[name]}), so their sum means nothing; "
                "make both of one kind"
            )


def _place(one: Direction) -> dict[str, str]:
    """What must be the same of all that are added; the position needn't."""
    return {
        "chat template": one.template[:12] or "not known",
        "site": one.site,
        "level": str(one.level),
        "size": str(len(one.vector)),
        "type": str(one.vector.dtype).removeprefix("torch."),
    }


def _model(one: Direction) -> str:
    made = one.checkpoint
    return f"{made.name}, {made.regime}, {made.fingerprint.removeprefix(VERSION)[:12] or 'weights not known'}"
