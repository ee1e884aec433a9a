"""A reported number with its interval: neither travels without the other."""

import math
from dataclasses import dataclass, field
from typing import Any

NO_INTERVAL = "too few prompts for an interval"


@dataclass(frozen=True, repr=False)
class Estimate:
    """One number, its 95% interval, and how many prompts it stands on.

    Printed as `0.93 [0.88, 0.97], n=96`, small numbers with a third decimal, or as `not measurable, n=3`.

    >>> print(ml.Estimate(0.934, 0.88, 0.97, 96))
    0.93 [0.88, 0.97], n=96
    >>> print(ml.Estimate.missing(3))
    not measurable, n=3
    """

    value: float
    low: float
    high: float
    n: int
    """Prompts (not families, not resamples) behind the value."""
    is_auroc: bool = field(default=False, compare=False)
    """An AUROC's interval of all from 0 to 1 says that it has none; a share's may be one. Of records of
    earlier versions the name tells."""

    @classmethod
    def missing(cls, n: int) -> "Estimate":
        """What stands where a number can't be measured: NaN with the count that was too small."""
        return cls(value=math.nan, low=math.nan, high=math.nan, n=n)

    @classmethod
    def exact(cls, value: int | float, n: int) -> "Estimate":
        """A number that chance has no part in, such as a count, or that has no interval of its own, such as a p."""
        return cls(value=float(value), low=float(value), high=float(value), n=n)

    @classmethod
    def of_row(cls, row: Any, name: str = "value", *, called: str = "") -> "Estimate":
        """What `row` made, from a row (a Series or a dict) of a table; `called` says what a plain `value` is of."""
        is_auroc = "auroc" in (called or name)
        return cls(float(row[name]), float(row["low"]), float(row["high"]), int(row["n"]), is_auroc)

    @classmethod
    def of_beside(cls, row: Any, name: str, n: int) -> "Estimate":
        """What `beside` made, from a row of a table that says how many prompts it stands on."""
        return cls(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), int(n))

    def row(self, name: str = "value") -> dict[str, float]:
        """Its columns in a table: the value under this name, low, high, n."""
        return {name: self.value, "low": self.low, "high": self.high, "n": self.n}

    def beside(self, name: str) -> dict[str, float]:
        """Its columns beside another's `row`: NAME, NAME_low, NAME_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def prompts_beyond(self, threshold: float) -> float:
        """Prompts with which this value's interval would just leave the threshold out: its width falls as 1/sqrt(n).

        Infinity where the value lies on the threshold, or isn't measurable: no number of prompts would do.
        """
        side = self.high if self.value < threshold else self.low
        gap = abs(self.value - threshold)
        return self.n * ((side - self.value) / gap) ** 2 if gap > 0 and self.measurable else math.inf

    def times_to_show(self, least: float) -> float:
        """Times as many prompts that would show such a difference from 0, or `least` if that is larger, in four of five
        samples: two-sided at 5%, normal, the standard error falling as 1/sqrt(n).
        """
        error = (self.high - self.low) / 2 / 1.96
        return ((1.96 + 0.84) * error / max(abs(self.value), least)) ** 2

    @property
    def measurable(self) -> bool:
        """False where the value is NaN; a verdict that needs it is then "not measurable"."""
        return not math.isnan(self.value)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False where there is none."""
        return self.low > 0 or self.high < 0

    @property
    def has_interval(self) -> bool:
        """False for an AUROC of too few prompts, whose interval is all that an AUROC can be."""
        return not (self.is_auroc and self.low <= 0 and self.high >= 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high, for frames and logs; NaN where there is none to show."""
        return (self.low, self.high) if self.has_interval else (math.nan, math.nan)

    @property
    def brief(self) -> str:
        """The number and its interval, `0.93 [0.88, 0.97]`, where how many prompts is said elsewhere."""
        if not self.measurable:
            return "not measurable"
        digits = 3 if max(abs(self.value), abs(self.low), abs(self.high)) < 0.2 else 2
        low, high = f"{self.low:z.{digits}f}", f"{self.high:z.{digits}f}"  # z: no "-0.00"
        value = f"{self.value:z.{digits}f}"
        return f"{value} [{low}, {high}]" if self.has_interval else f"{value}, {NO_INTERVAL}"

    def of(self, unit: str) -> str:
        """Printed with its unit behind the number, `2.34 nats [1.93, 2.68], n=14`."""
        value, bracket, rest = str(self).partition(" [")
        return f"{value} {unit}{bracket}{rest}" if self.measurable else str(self)

    def __str__(self) -> str:
        return f"{self.brief}, n={self.n}"

    def __repr__(self) -> str:
        return f"Estimate({self})"
