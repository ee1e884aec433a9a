"""Units of other models that no single unit of the first has: predicted from several, and in groups with them."""

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.methods.geometry.matching.clusters import unit_clusters
from mechlens.methods.geometry.matching.sparse import sparse_prediction
from mechlens.methods.geometry.permuted import beside_chance, permutations
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.geometry.between import unit_pairs
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading

PREDICTED = 32
"""Neurons of a layer that are predicted, those that vary most: each has an L1 path of its own."""
GROUPED = 128
"""Neurons of each model that are put into groups, those that vary most."""
A_GROUP = 4
"""Units of one model in a group, on the average."""
NEARLY = 0.9
"""Share of the best R² that counts as predicted."""


@one_thread()
def sparse_table(readings: Sequence[Reading], plan: GeometryPlan) -> pd.DataFrame:
    """A row a model and layer: how well its neurons are predicted from the first model's, and from how many."""
    rows, first = [], readings[0]
    for other in progress_bar(readings[1:], title="sparse prediction", unit="model"):
        for place, one, two in unit_pairs(first, other, "neurons"):
            targets = two[:, most_varied(two, PREDICTED)]

            def best(order: Tensor, one: Tensor = one, targets: Tensor = targets) -> float:
                found = sparse_prediction(one, targets[order], first.families, seed=plan.seed)
                return float(found.best.mean())

            found = sparse_prediction(one, targets, first.families, seed=plan.seed)
            orders = permutations(len(one), plan.shuffles, plan.seed, first.families)
            r2 = beside_chance(float(found.best.mean()), best, orders)
            needed = found.needed(NEARLY)
            rows.append(place | {
                "n_units": targets.shape[1], "r2": r2.value, "chance": r2.mean, "p": r2.p,
                "needed": float(needed.nanmedian()), "by_one": float((needed == 1).double().mean()),
            })  # fmt: skip
    return pd.DataFrame(rows)


@one_thread()
def group_table(readings: Sequence[Reading], plan: GeometryPlan) -> pd.DataFrame:
    """A row a model, layer and kind of unit: groups of units of both models, and the share of units in mixed ones."""
    rows, first = [], readings[0]
    for other in progress_bar(readings[1:], title="groups of units", unit="model"):
        for kind in first.units:
            for place, one, two in unit_pairs(first, other, kind):
                sides = [side[:, most_varied(side, GROUPED)] for side in (one, two)]
                k = max(2, min(side.shape[1] for side in sides) // A_GROUP)

                def shared(order: Tensor, sides: list[Tensor] = sides, k: int = k) -> float:
                    return unit_clusters(sides[0], sides[1][order], k=k).shared

                found = unit_clusters(*sides, k=k)
                orders = permutations(len(one), plan.shuffles, plan.seed, first.families)
                mixed = beside_chance(found.shared, shared, orders)
                pairs_of_one = sum(size == (1, 1) for size in found.sizes)
                rows.append(place | {
                    "n_units": sides[0].shape[1], "groups": k, "shared": mixed.value, "chance": mixed.mean,
                    "p": mixed.p, "one_to_one": pairs_of_one, "largest": max(map(sum, found.sizes)),
                })  # fmt: skip
    return pd.DataFrame(rows)


def most_varied(values: Float[Tensor, "prompt unit *size"], n: int) -> Int[Tensor, " kept"]:
    """The `n` units with the largest variance over prompts, in their own order."""
    exact = values.double()
    spread = (exact - exact.mean(dim=0)).square().reshape(*values.shape[:2], -1).sum(dim=(0, 2))
    kept: Tensor = spread.topk(min(n, len(spread))).indices.sort().values
    return kept
