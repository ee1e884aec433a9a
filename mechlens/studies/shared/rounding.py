"""Whether the rounding of a number type is small against what a study found, and the sentence that says where it isn't.

How far rounding moves a number is seen where two right ways of computing it are apart: plain Hugging Face and the
bridged model, in the same type and on the same weights (`Parity`). A logit moves by as much as any logit did there. A
residual vector moves by a share of its length, and rounding errors point in no particular direction: of `d_model`
coordinates, a score along one direction takes length / sqrt(d_model), and seldom three times that. Nothing moves by
less than half a unit in the last place.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.precision import Parity

SMALL = 0.1
"""Rounding is small against an effect where it is at most this share of it."""
SELDOM = 3.0
"""Standard deviations that a score is seldom off by."""


@dataclass(frozen=True)
class Effect:
    """Something that a study found, and how far rounding moves what it was worked out from (in the same unit)."""

    name: str
    """In words, with its article."""
    size: float
    """As large as it may be; NaN where it wasn't measured."""
    moved: float
    what: str
    """What rounding moves, in words."""


def logit_effect(parity: Parity, name: str, effect: Estimate) -> Effect:
    """A difference or log-odds of logits, as large as its interval lets it be."""
    size = max(abs(effect.low), abs(effect.high)) if effect.measurable else math.nan
    return Effect(name, size, max(parity.logits, _unit(parity) * parity.largest_logit), "a logit")


def class_effect(
    parity: Parity, name: str, values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"]
) -> Effect:
    """The distance between the means of two classes of residual vectors, which whatever tells them apart reads."""
    exact = values.double()
    distance = float((exact[positive].mean(dim=0) - exact[~positive].mean(dim=0)).norm())
    share = max(parity.residual or 0.0, _unit(parity))
    moved = SELDOM * share * float(exact.norm(dim=-1).median()) / math.sqrt(values.shape[-1])
    return Effect(name, distance, moved, "a score along a direction")


def rounding_note(parity: Parity, effects: Iterable[Effect]) -> str:
    """A sentence, with a space before it, on the effect against which rounding is largest; "" where it is small."""
    known = [effect for effect in effects if effect.size == effect.size]
    if not known:
        return ""
    worst = max(known, key=lambda effect: effect.moved / max(effect.size, 1e-30))
    if worst.moved <= SMALL * worst.size:
        return ""
    return (
        f" The rounding of {parity.dtype} moves {worst.what} by up to {worst.moved:.2g}, which is not small against "
        f"{worst.name} ({worst.size:.2g}); --dtype float32 rounds less."
    )


def class_rounding(
    parity: Parity | None,
    classes: Mapping[str, tuple[Float[Tensor, "prompt d_model"], Bool[Tensor, " prompt"]]],
) -> str:
    """`rounding_note` on distances between classes, each by its name: the vectors, and which are of the first class."""
    if parity is None:
        return ""
    both = {name: pair for name, pair in classes.items() if 0 < int(pair[1].sum()) < len(pair[1])}
    return rounding_note(parity, [class_effect(parity, name, *pair) for name, pair in both.items()])


def logit_rounding(parity: Parity | None, effects: Mapping[str, Estimate]) -> str:
    """`rounding_note` on differences or log-odds of logits, each by its name."""
    if parity is None:
        return ""
    return rounding_note(parity, [logit_effect(parity, name, effect) for name, effect in effects.items()])


def _unit(parity: Parity) -> float:
    """Half a unit in the last place, as a share of the number."""
    return torch.finfo(getattr(torch, parity.dtype)).eps / 2
