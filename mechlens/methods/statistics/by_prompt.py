"""What a number was made of, prompt by prompt: two runs on the same prompts are then compared in pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes

COLUMNS = ("number", "id", "family", "value", "positive")


@dataclass(frozen=True, repr=False)
class ByPrompt:
    """Values whose mean is the number; or, where it says which prompts are positive, scores whose AUROC it is."""

    ids: Sequence[str]
    families: Sequence[str]
    values: Float[Tensor, " prompt"]
    positive: Bool[Tensor, " prompt"] | None = None

    def only(self, rows: Bool[Tensor, " prompt"]) -> "ByPrompt":
        """The same of some prompts."""
        kept = rows.nonzero().flatten().tolist()
        return ByPrompt(
            [self.ids[i] for i in kept], [self.families[i] for i in kept], self.values[rows],
            None if self.positive is None else self.positive[rows],
        )  # fmt: skip


def by_prompt_table(numbers: Mapping[str, ByPrompt]) -> pd.DataFrame:
    """A row a number and prompt; `positive` is 1 or 0 of scores, and missing of values that are averaged."""
    frames = [
        pd.DataFrame({
            "number": name, "id": list(one.ids), "family": list(one.families), "value": one.values.double().tolist(),
            "positive": math.nan if one.positive is None else one.positive.double().tolist(),
        })
        for name, one in numbers.items()
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))


def mean_difference(
    first: Float[Tensor, " prompt"], second: Float[Tensor, " prompt"], families: Sequence[str]
) -> Estimate:
    """Mean of the first minus mean of the second on the same prompts, with a paired 95% interval by families.

    Student's t of the families' sums; of flags (0 and 1) widened to hold Agresti & Min's (2005) for paired
    shares, which has a width where all prompts agree. Missing with fewer than two families.

    >>> import torch
    >>> from mechlens.methods.statistics.by_prompt import mean_difference
    >>> first, second = torch.ones(20), torch.tensor([1.0] * 15 + [0.0] * 5)
    >>> print(mean_difference(first, second, [str(i) for i in range(20)]))
    0.25 [0.02, 0.48], n=20
    """
    if len(first) != len(second):
        raise UserError(f"{len(first)} and {len(second)} values make no pairs; give those of the same prompts")
    n, gaps = len(first), (first - second).double()
    codes, n_families = family_codes(families)
    if n_families < 2 or not bool(torch.isfinite(gaps).all()):
        return Estimate.missing(n)
    value = float(gaps.mean())
    sums = torch.zeros(n_families, dtype=torch.float64).index_add_(0, codes, (gaps - gaps.mean()) / n)
    error = math.sqrt(float(sums.square().sum()) * n_families / (n_families - 1))
    reach = float(stats.t.ppf(0.975, n_families - 1)) * error
    low, high = value - reach, value + reach
    if bool(torch.isin(torch.cat([first, second]).double(), torch.tensor([0.0, 1.0], dtype=torch.float64)).all()):
        least, most = _paired_shares(gaps, n_families)
        low, high = min(low, least), max(high, most)
    return Estimate(value, low, high, n)


def _paired_shares(gaps: Float[Tensor, " prompt"], n_families: int) -> tuple[float, float]:
    """Agresti & Min's interval: half a pair more in each of the four cells, for as many pairs as there are families."""
    n = n_families + 2
    up, down = (n_families * float((gaps == sign).double().mean()) + 0.5 for sign in (1, -1))
    value, error = (up - down) / n, math.sqrt((up + down) - (up - down) ** 2 / n) / n
    return max(value - 1.96 * error, -1.0), min(value + 1.96 * error, 1.0)
