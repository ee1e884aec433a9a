"""What patching found: a value for every pair and site, with labelled axes and honest statistics."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.shown import MOST, few, html_with, lines
from mechlens.methods.statistics.resample import Interval, family_weights, interval
from mechlens.prompts.same import Comparable
from mechlens.settings import RESAMPLES

if TYPE_CHECKING:
    import pandas

MIN_GAP = 1e-3
"""Changes of the metric below this are rounding."""
MIN_SHARE = 0.1
"""A pair has nothing to recover where its clean and corrupt runs differ by less than this share of the median pair."""


@dataclass(frozen=True, repr=False, eq=False)
class PatchResult(Comparable):
    """The metric after patching each site of each pair, beside the two unpatched runs.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> result = ml.patch_sweep(model, pairs, ml.LogProbability(model.to_single_token("a")), plan)
    >>> result.recovery().shape == result.values.shape
    True
    """

    values: Float[Tensor, "pair layer position head"]
    """The head axis has length 1 where the site has no heads."""
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    pairs: tuple[str, ...]
    families: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    heads: tuple[int, ...]
    """Empty where the site has no heads."""
    tokens: tuple[str, ...]
    """The first pair's token at each position, for axis labels."""
    site: str
    metric: str
    mode: str
    """"denoising": the clean value into the corrupt run; "noising": the other way round."""
    engine: str
    """"growing batch", or "plain" with one forward pass per site."""
    source: str = "other prompt"
    """Where the values came from: "other prompt", another checkpoint's name, or "random"."""
    why_plain: str = ""
    """Why the plain path was taken where nobody asked for it; empty otherwise."""

    @property
    def start(self) -> Float[Tensor, " pair"]:
        """The metric of the run that is patched."""
        return self.corrupt if self.mode == "denoising" else self.clean

    @property
    def target(self) -> Float[Tensor, " pair"]:
        """The metric of the run that the values come from."""
        return self.clean if self.mode == "denoising" else self.corrupt

    def recovery(self) -> Float[Tensor, "pair layer position head"]:
        """(patched - start) / (target - start): 0 changes nothing, 1 gives the other run; NaN without a gap.

        Of single pairs. Their mean is no recovery: a pair with a small gap outweighs all others. See `table`.
        """
        gap = (self.target - self.start)[:, None, None, None]
        return torch.where(self.has_gap[:, None, None, None], self.effect() / gap, torch.nan)

    @property
    def has_gap(self) -> Bool[Tensor, " pair"]:
        """True for the pairs whose two runs are far enough apart for a recovery; never where a run gave NaN."""
        gap = (self.target - self.start).abs()
        return gap >= max(MIN_GAP, MIN_SHARE * float(gap[~gap.isnan()].median())) if len(gap) else gap > 0

    def effect(self) -> Float[Tensor, "pair layer position head"]:
        """patched - start, in the metric's units."""
        return self.values - self.start[:, None, None, None]

    def table(self, *, seed: int, resamples: int = RESAMPLES, n_flips: int = 1000) -> "pandas.DataFrame":
        """One row per site: recovery and mean effect over pairs, bootstrap interval by family, corrected p.

        Recovery is the mean change towards the other run over the mean gap of the pairs that have one, and its
        interval that ratio's over resampled families. `n` counts those pairs.

        The p-value flips the signs of whole families' effects and compares the largest mean over the grid, so
        it holds for all sites together (Westfall & Young). With few pairs it can't be small: n pairs allow 2^(1-n).
        Means are in units of the site's root mean square, which no flip changes; a standard deviation would shrink
        where the observed signs agree. A site that moves the metric by less than MIN_GAP is rounding: its p is 1.
        """
        import pandas as pd

        effect = self.effect().flatten(1).T
        recovered, bounds = self._recovered(effect, seed, resamples)
        axes = [self.layers, self.positions, self.heads or (-1,)]
        frame = pd.MultiIndex.from_product(axes, names=["layer", "position", "head"]).to_frame(index=False)
        labels = dict(zip(self.positions, self.tokens, strict=True))
        frame["token"] = [labels[position] for position in frame["position"]]
        frame["recovery"] = recovered.numpy()
        frame["low"], frame["high"] = bounds.low.numpy(), bounds.high.numpy()
        frame["effect"] = effect.mean(dim=1).numpy()
        frame["p_corrected"] = self._sign_flips(effect, seed, n_flips).numpy()
        frame["n"] = int(self.has_gap.sum())
        return frame if self.heads else frame.drop(columns="head")

    def _recovered(
        self, effect: Float[Tensor, "cell pair"], seed: int, resamples: int
    ) -> tuple[Float[Tensor, " cell"], Interval]:
        """Ratio of means. Every gap counts upwards, so that pairs of opposite gaps don't cancel in the mean gap."""
        gap = torch.where(self.has_gap, self.target - self.start, 0.0).double()
        towards, size = torch.where(gap != 0, effect.double() * gap.sign(), 0.0), gap.abs()
        weights = family_weights(self.families, resamples, seed)
        return towards.sum(dim=1) / size.sum(), interval((towards @ weights.T) / (weights @ size))

    def _sign_flips(self, effect: Float[Tensor, "cell pair"], seed: int, n_flips: int) -> Float[Tensor, " cell"]:
        names = list(dict.fromkeys(self.families))
        codes = torch.tensor([names.index(family) for family in self.families])
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (n_flips, len(names)), generator=generator).double() * 2 - 1
        size = effect.double().square().mean(dim=1, keepdim=True).sqrt()
        standard = torch.where(size >= MIN_GAP, effect.double() / size, 0.0)
        observed = standard.mean(dim=1).abs()
        null = (signs[:, codes] @ standard.T / standard.shape[1]).abs().max(dim=1).values
        reached = (null[None, :] >= observed[:, None] - 1e-12).sum(dim=1)
        return torch.where(size.squeeze(1).isnan(), torch.nan, (1 + reached) / (1 + n_flips))

    def __repr__(self) -> str:
        top = self.largest()
        facts = {
            "pairs": f"{len(self.pairs)}, {int(self.has_gap.sum())} with a gap to recover",
            "layers": few(self.layers),
            "positions": few(self.positions),
            "heads": few(self.heads),
            "largest recovery": ", ".join(f"{name} {value}" for name, value in top.iloc[0].items()) if len(top) else "",
        }
        return lines(f"PatchResult at {self.site}, {self.mode} from {self.source}, by {self.metric}", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.largest())

    def largest(self, n: int = MOST) -> "pandas.DataFrame":
        """The sites of the largest recovery: layer, position (and head), recovery as in `table`, without intervals."""
        import pandas as pd

        gap = torch.where(self.has_gap, self.target - self.start, 0.0).double()
        towards = (torch.where(gap != 0, self.effect().flatten(1).T.double() * gap.sign(), 0.0)).sum(dim=1)
        axes = [self.layers, self.positions, self.heads or (-1,)]
        frame = pd.MultiIndex.from_product(axes, names=["layer", "position", "head"]).to_frame(index=False)
        frame["recovery"] = (towards / gap.abs().sum()).numpy().round(3)
        frame = frame if self.heads else frame.drop(columns="head")
        return frame.dropna().nlargest(n, "recovery")
