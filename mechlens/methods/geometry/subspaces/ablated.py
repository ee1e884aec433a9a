"""What a model does without a concept's subspace: refusal and damage against the number of dimensions taken out.

That k dimensions read a concept says nothing of what the model does with them. Here they are projected out of the
residual stream wherever it is written or read (Arditi et al. 2024 do so with one direction), beside random subspaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.geometry.subspaces.by_rank import concept_subspace
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.methods.steering.candidates import RefusalAndKl, ablation
from mechlens.methods.steering.interventions import Ablate
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch

Basis = Float[Tensor, "d_model k"]


@dataclass(frozen=True)
class WithoutSubspace:
    """What taking `k` dimensions out does to the first token of answers; see `without_subspaces`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> batch = ml.tokenize(prompts, ml.template_of(model))
    >>> direction = ml.mean_difference(ml.collect(model, batch), "harmful", "harmless", level=2, position="last")
    >>> alone = ml.Subspaces(direction.unit[:, None], (), ())
    >>> found = ml.without_subspaces(model, batch, [0, 1], [20, 21], [alone], direction, [5], seed=0)
    >>> found[0].k, found[0].gain.value  # more than one direction does: nothing, here
    (1, 0.0)
    """

    k: int
    shift: Estimate
    """Change of the mean log-odds of a refusal of harmful prompts, in nats: below 0 where they are refused less."""
    gain: Estimate
    """The same minus that of the fewest dimensions, over the same prompts."""
    beyond: Estimate
    """The same minus the mean of subspaces that lie where prompts without the concept differ; missing without any."""
    kl: Estimate
    """KL divergence of the first answer token of harmless prompts from the model as it is, in nats."""
    random: tuple[float, ...]
    """The shift of each random subspace."""
    within: tuple[float, ...]
    """The shift of each that lies where prompts without the concept differ."""
    random_kl: float
    within_kl: float
    """Mean KL of these."""


@dataclass(frozen=True, repr=False)
class Subspaces:
    """A concept's subspace, by orthonormal columns, and others of as many dimensions; see `concept_subspaces`.

    >>> import torch
    >>> ml.Subspaces(torch.eye(6)[:, :2], (), ())
    Subspaces of 2 dimensions, beside 0 random ones and 0 within a class
    """

    own: Basis
    random: tuple[Basis, ...]
    """Drawn alike in all directions: of these few are any that the model uses."""
    within: tuple[Basis, ...]
    """Random mixtures of how prompts without the concept differ from each other: where activations vary, and the
    concept doesn't. None where these have fewer dimensions."""

    def __repr__(self) -> str:
        beside = f"{len(self.random)} random ones and {len(self.within)} within a class"
        return f"Subspaces of {self.own.shape[1]} dimensions, beside {beside}"


def concept_subspaces(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " label"],
    families: Sequence[str],
    ranks: Sequence[int],
    *,
    draws: int,
    seed: int,
) -> list[Subspaces]:
    """Of each number of dimensions: the mean difference and what it varies along, as `auroc_by_rank` reads them.

    Beside each, `draws` subspaces of either kind.

    >>> import torch
    >>> values = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    >>> found = ml.concept_subspaces(values, torch.arange(30) < 15, list(map(str, range(30))), (1, 2), draws=3, seed=0)
    >>> [one.own.shape[1] for one in found]
    [1, 2]
    """
    exact = values.detach().cpu().double()
    without = exact[~positive] - exact[~positive].mean(dim=0)
    varied = int(torch.linalg.matrix_rank(without))
    draw = torch.Generator().manual_seed(seed)
    found = []
    for k in ranks:
        random = [torch.randn(exact.shape[1], k, generator=draw, dtype=torch.float64) for _ in range(draws)]
        mixed = [without.T @ torch.randn(len(without), k, generator=draw, dtype=torch.float64) for _ in range(draws)]
        mixed = mixed if k <= varied else []
        kinds = [tuple(torch.linalg.qr(one).Q for one in several) for several in (random, mixed)]
        found.append(Subspaces(concept_subspace(exact, positive, families, k, seed), *kinds))
    return found


def subspace_ablation(basis: Basis, like: Direction) -> tuple[Ablate, ...]:
    """The subspace of orthonormal columns taken out of the residual stream, everywhere and at every token.

    One after the other they are a projection, since each leaves what lies along the others. `like` says of what model
    and template they are. UserError for columns that aren't orthonormal.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> direction = ml.mean_difference(ml.collect(model, prompts), "harmful", "harmless", level=2, position="last")
    >>> len(ml.subspace_ablation(direction.unit[:, None], direction))
    1
    """
    exact = basis.double()
    error = float((exact.T @ exact - torch.eye(exact.shape[1], dtype=torch.float64)).abs().max())
    if not error < 1e-5:
        raise UserError(
            f"the basis's columns are off from orthonormal by {error:.2g}; give torch.linalg.qr(basis).Q, of columns "
            "that are independent"
        )
    made = f"one of {exact.shape[1]} dimensions"
    return tuple(ablation(replace(like, vector=one.float(), method=made, parts=())) for one in exact.T)


def without_subspaces(
    model: LanguageModel,
    batch: TokenBatch,
    harmful: Sequence[int],
    harmless: Sequence[int],
    subspaces: Sequence[Subspaces],
    like: Direction,
    tokens: Sequence[int],
    *,
    seed: int,
    cache: Cache | None = None,
) -> list[WithoutSubspace]:
    """Refusal log-odds of the batch's harmful rows, and KL of its harmless ones, without each of the subspaces.

    `tokens` are those that refusals begin with. Prompts only, no answer is generated. The subspaces are held fixed:
    intervals are over families of the prompts here, which should be none that the subspaces were made from.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> batch = ml.tokenize(prompts, ml.template_of(model))
    >>> direction = ml.mean_difference(ml.collect(model, batch), "harmful", "harmless", level=2, position="last")
    >>> alone = ml.Subspaces(direction.unit[:, None], (), ())
    >>> found = ml.without_subspaces(model, batch, [0, 1], [20, 21], [alone], direction, [5], seed=0)
    >>> found[0].k, found[0].gain.value  # more than one direction does: nothing, here
    (1, 0.0)
    """
    both, n = batch.select([*harmful, *harmless]), len(harmful)
    families = [one.group for one in both.prompts]
    bases = [basis for one in subspaces for basis in (one.own, *one.random, *one.within)]
    moved = iter(_moved(model, both, [subspace_ablation(one, like) for one in bases], tokens, cache))

    def mean(values: Tensor, rows: slice) -> Estimate:
        return mean_estimate(values, families[rows], seed)

    found: list[WithoutSubspace] = []
    fewest: Tensor | None = None
    for one in subspaces:
        own = next(moved)
        random, within = ([next(moved) for _ in several] for several in (one.random, one.within))
        shift = own[:n, 0]
        fewest = shift if fewest is None else fewest
        beside = torch.stack([drawn[:n, 0] for drawn in within]).mean(dim=0) if within else shift * torch.nan
        found.append(WithoutSubspace(
            one.own.shape[1], mean(shift, slice(n)), mean(shift - fewest, slice(n)),
            mean(shift - beside, slice(n)), mean(own[n:, 1], slice(n, None)),
            _shifts(random, n), _shifts(within, n), _kl(random, n), _kl(within, n),
        ))  # fmt: skip
    return found


def _shifts(drawn: Sequence[Tensor], n: int) -> tuple[float, ...]:
    return tuple(float(one[:n, 0].mean()) for one in drawn)


def _kl(drawn: Sequence[Tensor], n: int) -> float:
    return float(torch.stack([one[n:, 1] for one in drawn]).mean()) if drawn else float("nan")


def _moved(
    model: LanguageModel, batch: TokenBatch, done: Sequence[Sequence[Ablate]], tokens: Sequence[int],
    cache: Cache | None,
) -> Float64[Tensor, "condition prompt 2"]:  # fmt: skip
    """Change of the refusal log-odds, and KL, under each condition."""
    n = len(batch.prompts)
    bare = logits_under(model, batch, [], cache=cache)
    rows = batch.select(list(range(n)) * len(done))
    each = [list(condition) for condition in done for _ in range(n)]
    scores = logits_under(model, rows, each, reduce=RefusalAndKl(tuple(tokens), bare), cache=cache)
    found = scores.reshape(len(done), n, 2)
    found[:, :, 0] -= refusal_log_odds(bare, tokens)
    return found
