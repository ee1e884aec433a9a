"""What one layer's attention to one text says about sinks, and how large its residual stream is there.

Patterns have the axes head, query and key; a key that a query can't see (later, or outside a sliding window) has a
logit of minus infinity. Definitions are those of Gu et al. 2024 (sink rate), Guo et al. 2024 (sink logit, value norm,
entropies) and Sun et al. 2024 (massive activations).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pattern = Float[Tensor, "head query key"]
PerHead = Float[Tensor, " head"]

RATE = 0.3
"""Attention received beyond which a head counts for the sink rate."""
WITHIN = 64
"""Tokens of a text that the sink rate is of."""
FEWEST_QUERIES = 8
"""Queries that a key's attention is averaged over at least: the last keys are seen by too few to tell."""


def received(pattern: Pattern, visible: Bool[Tensor, "query key"]) -> Float[Tensor, "head key"]:
    """Mean attention of every key from the queries that can see it, itself among them; NaN where few can."""
    seen = visible.sum(dim=0)
    return torch.where(seen >= FEWEST_QUERIES, pattern.sum(dim=1) / seen.clamp(min=1), torch.nan)


def sink_mass(pattern: Pattern, visible: Bool[Tensor, "query key"], sinks: Sequence[int]) -> PerHead:
    """Mean attention to sinks, from the queries that can see a sink and another token besides; NaN without any."""
    queries = _choosing(visible, sinks)
    return pattern[:, queries][:, :, list(sinks)].sum(dim=2).mean(dim=1)


def sink_logit(logits: Pattern, visible: Bool[Tensor, "query key"], sinks: Sequence[int]) -> PerHead:
    """Mean logit to the sinks minus the mean logit to the other keys, of the same queries as `sink_mass`."""
    queries = _choosing(visible, sinks)
    is_sink = _flags(visible.shape[1], sinks)
    gaps = _mean_where(logits, visible & is_sink) - _mean_where(logits, visible & ~is_sink)
    return gaps[:, queries].mean(dim=1)


def first_share(pattern: Pattern) -> PerHead:
    """Mean attention to the first token from all others, as Gated Attention reports it."""
    return pattern[:, 1:, 0].mean(dim=1)


def sink_rate(pattern: Pattern, visible: Bool[Tensor, "query key"], sinks: Sequence[int]) -> PerHead:
    """1 where a sink receives more than RATE within the first WITHIN tokens, else 0; its mean is the rate."""
    short = received(pattern[:, :WITHIN, :WITHIN], visible[:WITHIN, :WITHIN])
    there = [place for place in sinks if place < short.shape[1]]
    if not there:
        return torch.zeros(len(pattern))
    return (short[:, there].nan_to_num() > RATE).any(dim=1).float()


def row_entropy(pattern: Pattern, visible: Bool[Tensor, "query key"]) -> PerHead:
    """Mean entropy of a query's attention as a share of what even attention has; of queries that see two or more."""
    seen = visible.sum(dim=1)
    shares: Tensor = torch.special.entr(pattern).sum(dim=2)[:, seen > 1] / seen[seen > 1].log()
    return shares.mean(dim=1)


def column_entropy(pattern: Pattern, visible: Bool[Tensor, "query key"]) -> PerHead:
    """How evenly queries attend to the key that they attend to most evenly, as a share of the largest entropy.

    A sink is attended to by all, so its column is even; of keys that few can see nothing is said. NaN without others,
    as in a window of a few tokens.
    """
    seen = visible.sum(dim=0)
    if not bool((seen >= FEWEST_QUERIES).any()):
        return torch.full((len(pattern),), torch.nan)
    columns = pattern[:, :, seen >= FEWEST_QUERIES]
    shares = columns / columns.sum(dim=1, keepdim=True).clamp_min(1e-12)
    even: Tensor = torch.special.entr(shares).sum(dim=1) / seen[seen >= FEWEST_QUERIES].log()
    return even.amax(dim=1)


def sinks_against_others(norms: Float[Tensor, "*any key"], sinks: Sequence[int]) -> Float[Tensor, "*any"]:
    """Mean over the sinks as a share of the mean over all other tokens: below 1 for drained values."""
    is_sink = _flags(norms.shape[-1], sinks)
    return norms[..., is_sink].mean(dim=-1) / norms[..., ~is_sink].mean(dim=-1)


def residual_peak(norms: Float[Tensor, "*any token"], sinks: Sequence[int]) -> Float[Tensor, "*any"]:
    """The largest norm of a sink as a multiple of the largest norm of any other token."""
    is_sink = _flags(norms.shape[-1], sinks)
    return norms[..., is_sink].amax(dim=-1) / norms[..., ~is_sink].amax(dim=-1)


def massive(residual: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """The largest entry as a multiple of the median one, both by size."""
    sizes = residual.abs()
    return sizes.max() / sizes.median().clamp_min(1e-12)


def massive_dimensions(residual: Float[Tensor, "token d_model"], k: int) -> list[tuple[int, int, float]]:
    """The k largest entries, each of another dimension, as (token, dimension, value)."""
    at = residual.abs().argmax(dim=0)
    values = residual[at, torch.arange(residual.shape[1], device=residual.device)]
    most = values.abs().topk(min(k, residual.shape[1])).indices.tolist()
    return [(int(at[dim]), dim, float(values[dim])) for dim in most]


def _choosing(visible: Bool[Tensor, "query key"], sinks: Sequence[int]) -> Bool[Tensor, " query"]:
    """Queries that have a choice between a sink and another token."""
    is_sink = _flags(visible.shape[1], sinks)
    return (visible & is_sink).any(dim=1) & (visible & ~is_sink).any(dim=1)


def _flags(n: int, places: Sequence[int]) -> Bool[Tensor, " key"]:
    flags = torch.zeros(n, dtype=torch.bool)
    flags[list(places)] = True
    return flags


def _mean_where(logits: Pattern, there: Bool[Tensor, "query key"]) -> Float[Tensor, "head query"]:
    return logits.masked_fill(~there, 0.0).sum(dim=2) / there.sum(dim=1)
