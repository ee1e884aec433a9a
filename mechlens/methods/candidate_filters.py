"""Which candidate directions are let through, and which of them is taken: the rule of Arditi et al. (2024)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.directions import Direction


@dataclass(frozen=True)
class SelectionRule:
    """Candidates are dropped by these rules in this order; of the rest the lowest bypass score is taken."""

    last_layers: float = 0.2
    """Share of the layers, from the top, whose candidates are dropped."""
    highest_kl: float = 0.1
    """Candidates whose ablation changes harmless prompts by more (mean KL in nats) are dropped."""
    least_induce: float = 0.0
    """Candidates whose addition leaves the mean refusal score of harmless prompts below this are dropped."""

    @property
    def words(self) -> str:
        """The rule as a report says it."""
        return (
            f"Dropped, in this order: candidates that are no direction (length 0, or a score that is no number); the "
            f"last {self.last_layers:.0%} of the layers; KL above {self.highest_kl:g}; induce score below "
            f"{self.least_induce:g}. Of the rest, the one with the lowest bypass score is taken."
        )


@dataclass(frozen=True)
class Filtered:
    """What became of every candidate."""

    fate: tuple[str, ...]
    """By candidate: "kept", or the filter that dropped it."""
    chosen: int | None
    """Number of the candidate taken, None where none was kept."""

    def counts(self) -> dict[str, int]:
        """Candidates dropped by each filter, in order, and kept."""
        return {name: self.fate.count(name) for name in FATES}


NO_DIRECTION, LAST_LAYERS, HIGH_KL, LOW_INDUCE, KEPT = "no direction", "last layers", "KL", "induce", "kept"
FATES = (NO_DIRECTION, LAST_LAYERS, HIGH_KL, LOW_INDUCE, KEPT)


def filter_candidates(
    candidates: Sequence[Direction],
    means: Float64[Tensor, "candidate score"],
    n_layers: int,
    rule: SelectionRule,
) -> Filtered:
    """Filters and chooses by the mean scores (bypass, induce, KL); of equals the first candidate is taken."""
    # As published, the number of layers that stay is rounded down; the small constant is for the share's rounding.
    first_dropped = int((1 - rule.last_layers) * n_layers + 1e-9)

    def fate(one: Direction, bypass: float, induce: float, kl: float) -> str:
        if one.norm == 0 or not all(math.isfinite(score) for score in (bypass, induce, kl)):
            return NO_DIRECTION
        if one.level >= first_dropped:
            return LAST_LAYERS
        if kl > rule.highest_kl:
            return HIGH_KL
        return LOW_INDUCE if induce < rule.least_induce else KEPT

    fates = tuple(fate(one, *scores) for one, scores in zip(candidates, means.tolist(), strict=True))
    kept = [i for i, name in enumerate(fates) if name == KEPT]
    return Filtered(fates, min(kept, key=lambda i: float(means[i, 0])) if kept else None)
