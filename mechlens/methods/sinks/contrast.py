"""Which heads attend to sinks on one kind of text, or in one model, and not on another, beside what is shuffled."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of, many, quoted
from mechlens.registry import whole_numbers

FLOOR = 0.02
"""Added to every standard error: a head whose mass hardly varies would stand out by nothing."""


@dataclass(frozen=True)
class DomainContrast:
    """The sink mass of every head by kind of text, and how surprising its largest difference is.

    >>> import torch
    >>> mass = torch.rand(20, 1, 2, generator=torch.Generator().manual_seed(0)) / 10
    >>> mass[:10, 0, 1] += 0.8
    >>> found = ml.domain_contrast(mass, ["code"] * 10 + ["prose"] * 10, shuffles=99, seed=0)
    >>> found.strongest(1), found.domains[int(found.dormant[0, 1])], bool(found.p[0, 0] > 0.05)
    (((0, 1),), 'code', True)
    """

    domains: tuple[str, ...]
    means: Float[Tensor, "domain layer head"] = field(repr=False)
    difference: Float[Tensor, "layer head"] = field(repr=False)
    """Between the kinds with most and with least sink mass."""
    dormant: Float[Tensor, "layer head"] = field(repr=False)
    """The number of the kind with most."""
    active: Float[Tensor, "layer head"] = field(repr=False)
    """The number of the kind with least."""
    p: Float[Tensor, "layer head"] = field(repr=False)
    """Share of shuffles in which any head differs as clearly between any two kinds."""

    def strongest(self, k: int) -> tuple[tuple[int, int], ...]:
        """The k heads that differ most."""
        if k < 1:
            raise UserError(f"the {k} heads that differ most were asked for; ask for 1 or more")
        there = int((~self.difference.isnan()).sum())
        ranked = self.difference.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
        order = ranked[: min(k, there)].tolist()
        return tuple((i // self.difference.shape[1], i % self.difference.shape[1]) for i in order)


def domain_contrast(
    mass: Float[Tensor, "text layer head"], kinds: Sequence[str], *, shuffles: int, seed: int
) -> DomainContrast:
    """The contrast of every head between the kinds of text; NaN for heads that there are not.

    The statistic is the largest difference of two kinds' means over its standard error. In each shuffle the kinds are
    dealt out anew, and the largest over all heads and pairs is kept (Westfall & Young 1993), so a p is familywise.

    >>> import torch
    >>> mass = torch.rand(20, 1, 2, generator=torch.Generator().manual_seed(0)) / 10
    >>> mass[:10, 0, 1] += 0.8
    >>> found = ml.domain_contrast(mass, ["code"] * 10 + ["prose"] * 10, shuffles=99, seed=0)
    >>> found.strongest(1), found.domains[int(found.dormant[0, 1])], bool(found.p[0, 0] > 0.05)
    (((0, 1),), 'code', True)
    """
    _require_masses(mass)
    _require_shuffles(shuffles)
    if len(kinds) != len(mass):
        raise UserError(f"{many(len(kinds), 'kind')} came for the sink mass of {many(len(mass), 'text')}; give one for "
                        "each text")  # fmt: skip
    domains = tuple(dict.fromkeys(kinds))
    if len(domains) < 2 or min(list(kinds).count(one) for one in domains) < 2:
        raise UserError("a contrast needs two kinds of text with two texts each; add some")
    flat = mass.double().flatten(1)
    numbers = torch.tensor([domains.index(one) for one in kinds])
    means, own = _clearest(flat, numbers, len(domains))
    generator = torch.Generator().manual_seed(seed)
    null = torch.stack([
        _clearest(flat, numbers[torch.randperm(len(numbers), generator=generator)], len(domains))[1].nan_to_num().max()
        for _ in range(shuffles)
    ])  # fmt: skip
    p = (1 + (null[:, None] >= own).sum(dim=0)) / (shuffles + 1)
    shape = mass.shape[1:]
    filled = means.nan_to_num()
    return DomainContrast(
        domains, means.view(-1, *shape).float(), (means.amax(dim=0) - means.amin(dim=0)).view(shape).float(),
        filled.argmax(dim=0).view(shape).float(), filled.argmin(dim=0).view(shape).float(),
        torch.where(own.isnan(), torch.nan, p).view(shape).float(),
    )  # fmt: skip


def paired_change(
    before: Float[Tensor, "text layer head"], after: Float[Tensor, "text layer head"], *, shuffles: int, seed: int
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """How much every head's sink mass on the same texts changes from one model to another, and its familywise p.

    The statistic is the mean change over its standard error; in each shuffle some texts' two models change places, and
    the largest over all heads is kept. NaN for heads that there are not.

    >>> import torch
    >>> before = torch.rand(20, 1, 2, generator=torch.Generator().manual_seed(0)) / 10
    >>> change, p = ml.paired_change(before, before + torch.tensor([0.0, 0.4]), shuffles=99, seed=0)
    >>> [round(float(one), 2) for one in (*change[0], *p[0])]
    [0.0, 0.4, 1.0, 0.01]
    """
    for one in (before, after):
        _require_masses(one)
    _require_shuffles(shuffles)
    if before.shape != after.shape or len(before) < 2:
        raise UserError("two models' sink mass on the same two texts or more is needed; they have "
                        f"{_shape(before)} and {_shape(after)}")  # fmt: skip
    change = (after - before).double().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (shuffles, len(change), 1), generator=generator) * 2 - 1
    null = torch.stack([_clear(change * one).nan_to_num().max() for one in signs])
    own = _clear(change)
    p = torch.where(own.isnan(), torch.nan, (1 + (null[:, None] >= own).sum(dim=0)) / (shuffles + 1))
    return change.mean(dim=0).view(before.shape[1:]).float(), p.view(before.shape[1:]).float()


def _require_masses(mass: object) -> None:
    if not isinstance(mass, Tensor):
        raise UserError(f"sink mass is {kind_of(mass)}; give a tensor by text, layer and head, such as a SinkMap's "
                        "of('mass')")  # fmt: skip
    if mass.ndim != 3:
        raise UserError(f"sink mass has the shape {_shape(mass)}; give it by text, layer and head")


def _require_shuffles(shuffles: object) -> None:
    if whole_numbers("shuffles", [shuffles], "count")[0] < 1:
        raise UserError(f"shuffles is {quoted(shuffles)}, and a p is of at least one")


def _shape(mass: Tensor) -> str:
    return " x ".join(map(str, mass.shape))


def _clear(change: Float[Tensor, "text cell"]) -> Float[Tensor, " cell"]:
    return change.mean(dim=0).abs() / ((change.var(dim=0) / len(change)).sqrt() + FLOOR)


def _clearest(
    flat: Float[Tensor, "text cell"], numbers: Tensor, n: int
) -> tuple[Float[Tensor, "domain cell"], Float[Tensor, " cell"]]:
    """Means by kind, and the largest difference of two in standard errors."""
    parts = [flat[numbers == k] for k in range(n)]
    means = torch.stack([part.mean(dim=0) for part in parts])
    squares = torch.stack([part.var(dim=0) / len(part) for part in parts])
    pairs = itertools.combinations(range(n), 2)
    clear = [(means[a] - means[b]).abs() / ((squares[a] + squares[b]).sqrt() + FLOOR) for a, b in pairs]
    return means, torch.stack(clear).amax(dim=0)
