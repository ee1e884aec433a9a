"""How many dimensions a task has: the smallest random subspace of all parameters in which it can be learned.

θ = θ₀ + P z with P random and fixed, so that only z is trained (Li et al. 2018; Aghajanyan et al. 2020 for language
models). P is a dense Gaussian matrix, or Fastfood (Le et al. 2013), which is never written out. With `blocks` (SAID,
the latter's) each layer's part of P z is multiplied by a number that is trained too and counts as a dimension.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.registry import unknown_name

Loss = Callable[[Float[Tensor, " parameter"]], Float[Tensor, ""]]
Projection = Callable[[Float[Tensor, " d"]], Float[Tensor, " parameter"]]


def dense_projection(n: int, d: int, seed: int) -> Projection:
    """Gaussian columns of length 1."""
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = drawn / drawn.norm(dim=0)
    return lambda z: columns @ z


def fastfood_projection(n: int, d: int, seed: int) -> Projection:
    """H G Π H B in O(n log n), H a Hadamard matrix and the others diagonal or an order; columns of about length 1."""
    size = 2 ** math.ceil(math.log2(max(n, d)))
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=draw).double() * 2 - 1
    order = torch.randperm(size, generator=draw)
    weights = torch.randn(size, generator=draw, dtype=torch.float64)
    scale = 1 / (float(weights.norm()) * math.sqrt(n))

    def project(z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, size - d)) * signs
        return hadamard(hadamard(padded)[order] * weights)[:n] * scale

    return project


def hadamard(values: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """The Walsh-Hadamard transform of a vector of 2ᵏ numbers, not normalised."""
    found, width = values, 1
    while width < len(values):
        pairs = found.view(-1, 2, width)
        found = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).reshape(-1)
        width *= 2
    return found


PROJECTIONS: dict[str, Callable[[int, int, int], Projection]] = {
    "dense": dense_projection,
    "fastfood": fastfood_projection,
}


def _scaled(project: Projection, blocks: Sequence[int]) -> Projection:
    """The projection of the first dimensions, each block multiplied by one of the last."""
    if not blocks:
        return project
    sizes = torch.tensor(list(blocks))

    def scaled(z: Tensor) -> Tensor:
        inner, scales = z[: -len(blocks)], z[-len(blocks) :]
        found: Tensor = project(inner) * scales.repeat_interleave(sizes)
        return found

    return scaled


@dataclass(frozen=True, eq=False)
class SubspaceTraining:
    """What training in `d` random dimensions came to; see `train_in_subspace`.

    >>> import torch
    >>> wanted = torch.tensor([1.0, -2.0, 0.5])
    >>> found = ml.train_in_subspace(lambda one: (one[:3] - wanted).square().sum(), torch.zeros(20), d=4, seed=0)
    >>> found.loss < 1e-6
    True
    """

    d: int
    loss: float
    parameters: Float[Tensor, " parameter"] = field(repr=False)


def train_in_subspace(
    loss: Loss,
    start: Float[Tensor, " parameter"],
    *,
    d: int,
    seed: int,
    projection: str = "dense",
    steps: int = 50,
    blocks: Sequence[int] = (),
) -> SubspaceTraining:
    """Lowers a loss of all parameters (flat) by L-BFGS in `d` random dimensions about where they start (float64).

    `projection` is "dense" or "fastfood". `blocks`, the numbers of parameters of one layer after the other, gives each
    its own scale, which is one of the `d`. UserError for more dimensions than parameters, or blocks that don't add up.

    >>> import torch
    >>> wanted = torch.tensor([1.0, -2.0, 0.5])
    >>> found = ml.train_in_subspace(lambda one: (one[:3] - wanted).square().sum(), torch.zeros(20), d=4, seed=0)
    >>> found.loss < 1e-6
    True
    """
    if projection not in PROJECTIONS:
        raise unknown_name("projection", projection, tuple(PROJECTIONS))
    if not 1 <= d <= len(start):
        raise UserError(f"{d} dimensions of {len(start)} parameters were asked for; ask for 1 to {len(start)}")
    if blocks and (sum(blocks) != len(start) or min(blocks) < 1 or len(blocks) >= d):
        raise UserError(
            f"{len(blocks)} blocks of {sum(blocks)} parameters in all were given, for {len(start)} parameters and {d} "
            "dimensions, of which each block takes one; give sizes that add up, and more dimensions than blocks"
        )
    origin = start.detach().double()
    project = _scaled(PROJECTIONS[projection](len(origin), d - len(blocks), seed), blocks)
    z = torch.zeros(d, dtype=torch.float64)
    z[d - len(blocks) :] = 1
    z.requires_grad_()
    optimiser = torch.optim.LBFGS([z], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
                                  tolerance_change=1e-15)  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(origin + project(z))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = origin + project(z.detach())
    return SubspaceTraining(d, float(loss(found)), found)


def task_dimension(
    score: Callable[[int], float], dimensions: Sequence[int], *, full: float, share: float = 0.9
) -> int | None:
    """The smallest of `dimensions` whose score is at least `share` of the full training's; None where none is.

    d90 of Li et al. 2018. Scores are asked for from the smallest on, and no further than needed.

    >>> ml.task_dimension(lambda d: min(1.0, d / 8), (1, 2, 4, 8, 16), full=1.0)
    8
    """
    return next((d for d in sorted(dimensions) if score(d) >= share * full), None)
