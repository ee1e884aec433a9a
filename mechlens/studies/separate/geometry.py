"""The angle between harmfulness and refusal at every level, and how much of each direction is signal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.statistics.effects import HARM, INTERACTION, REFUSAL, CosineCurve, Effect, cosine_curve
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS


@dataclass(frozen=True)
class Geometry:
    """Cosines by level, each measured and corrected; None where a quadrant has too few prompts."""

    directions: CosineCurve
    """Harmful minus harmless at `inst` against refused minus accepted at the last position."""
    balanced: CosineCurve | None
    """Main effect of harm at `inst` against main effect of refusal at the last position."""
    balanced_inst: CosineCurve | None
    """Both main effects at `inst`."""
    balanced_last: CosineCurve | None
    """Both main effects at the last position."""
    interaction: pd.DataFrame
    """Norms of both main effects and of their interaction: columns level, position, effect, norm."""
    level: int
    """Level of the headline cosine."""
    counts: dict[str, int]

    def metrics(self) -> dict[str, Estimate]:
        """The headline cosine as measured and corrected, also between the balanced effects."""
        row = self.directions.levels.index(self.level)
        missing = Estimate.missing(min(self.counts.values()))
        numbers = {
            "cos_harm_refusal": self.directions.corrected[row],
            "cos_harm_refusal.measured": self.directions.measured[row],
        }
        balanced = self.balanced.corrected[row] if self.balanced else missing
        return numbers | {"cos_harm_refusal.balanced": balanced}

    def table(self) -> pd.DataFrame:
        """One row per curve and level."""
        curves = {
            "harmful-harmless at inst, refused-accepted at last": self.directions,
            "main effects: harm at inst, refusal at last": self.balanced,
            "main effects, both at inst": self.balanced_inst,
            "main effects, both at last": self.balanced_last,
        }
        rows = [
            {
                "curve": name,
                "level": level,
                "cosine": curve.measured[k].value,
                "low": curve.measured[k].low,
                "high": curve.measured[k].high,
                **curve.corrected[k].beside("corrected"),
                "reliability_first": curve.reliability_first[k],
                "reliability_second": curve.reliability_second[k],
            }
            for name, curve in curves.items()
            if curve is not None
            for k, level in enumerate(curve.levels)
        ]
        return pd.DataFrame(rows)


def measure_geometry(
    acts: Activations, quadrants: Sequence[str], paired: set[str], *, level: int, seed: int
) -> Geometry:
    """Cosines between harm and refusal over all prompts; nothing is fitted to be scored, so none is held out.

    `paired` names the prompts of the harm contrast; refusal is contrasted over every prompt.
    """
    last = acts.positions[-1]
    everyone = tuple(quadrants)
    pairs = tuple(q if identity in paired else "" for q, identity in zip(quadrants, acts.ids, strict=True))

    def curve(first: Effect, second: Effect) -> CosineCurve:
        return cosine_curve(first, second, acts.families, acts.levels, seed=seed)

    counts = {name: everyone.count(name) for name in HARM}
    full = min(counts.values()) >= MIN_IN_A_CLASS
    harm = _effect(acts, "inst", tuple(q.rpartition("_")[2] for q in pairs), {"harmful": 1.0, "harmless": -1.0})
    refusal = _effect(acts, last, tuple(q.partition("_")[0] for q in everyone), {"refused": 1.0, "accepted": -1.0})
    return Geometry(
        directions=curve(harm, refusal),
        balanced=curve(_effect(acts, "inst", everyone, HARM), _effect(acts, last, everyone, REFUSAL)) if full else None,
        balanced_inst=_at_one(acts, "inst", everyone, curve) if full else None,
        balanced_last=_at_one(acts, last, everyone, curve) if full else None,
        interaction=_norms(acts, everyone) if full else pd.DataFrame(),
        level=level,
        counts=counts,
    )


def _effect(acts: Activations, position: str, labels: tuple[str, ...], coefficients: dict[str, float]) -> Effect:
    return Effect(acts.values[:, :, column_of(position, acts.positions, acts.last)], labels, coefficients)


def _at_one(
    acts: Activations, position: str, labels: tuple[str, ...], curve: Callable[[Effect, Effect], CosineCurve]
) -> CosineCurve:
    return curve(_effect(acts, position, labels, HARM), _effect(acts, position, labels, REFUSAL))


def _norms(acts: Activations, labels: tuple[str, ...]) -> pd.DataFrame:
    effects = {"harm": HARM, "refusal": REFUSAL, "interaction": INTERACTION}
    frames = [
        pd.DataFrame(
            {
                "position": position,
                "effect": name,
                "level": acts.levels,
                "norm": _effect(acts, position, labels, coefficients).norms().tolist(),
            }
        )
        for position in ("inst", acts.positions[-1])
        for name, coefficients in effects.items()
    ]
    return pd.concat(frames, ignore_index=True)
