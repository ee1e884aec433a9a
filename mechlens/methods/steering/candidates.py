"""What a direction does to refusal: bypass, induce and KL scores of many candidates at once (Arditi et al. 2024)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add, Intervention
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch


@dataclass(frozen=True)
class SelectionRule:
    """Candidates are dropped by these rules in this order; of the rest the lowest bypass score is taken.

    >>> "KL above 0.2" in ml.SelectionRule(highest_kl=0.2).words
    True
    """

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
class CandidateFilter:
    """What became of every candidate."""

    status: tuple[str, ...]
    """By candidate: "kept", or the filter that dropped it."""
    chosen: int | None
    """Number of the candidate taken, None where none was kept."""

    def counts(self) -> dict[str, int]:
        """Candidates dropped by each filter, in order, and kept."""
        return {name: self.status.count(name) for name in STATUSES}


NO_DIRECTION, LAST_LAYERS, HIGH_KL, LOW_INDUCE, KEPT = "no direction", "last layers", "KL", "induce", "kept"
STATUSES = (NO_DIRECTION, LAST_LAYERS, HIGH_KL, LOW_INDUCE, KEPT)


def filter_candidates(
    candidates: Sequence[Direction],
    means: Float64[Tensor, "candidate score"],
    n_layers: int,
    rule: SelectionRule,
) -> CandidateFilter:
    """Filters and chooses by the mean scores (bypass, induce, KL); of equals the first candidate is taken."""
    # As published, the number of layers that stay is rounded down; the small constant is for the share's rounding.
    first_dropped = int((1 - rule.last_layers) * n_layers + 1e-9)

    def status(one: Direction, bypass: float, induce: float, kl: float) -> str:
        if one.norm == 0 or not all(math.isfinite(score) for score in (bypass, induce, kl)):
            return NO_DIRECTION
        if one.level >= first_dropped:
            return LAST_LAYERS
        if kl > rule.highest_kl:
            return HIGH_KL
        return LOW_INDUCE if induce < rule.least_induce else KEPT

    statuses = tuple(status(one, *scores) for one, scores in zip(candidates, means.tolist(), strict=True))
    kept = [i for i, name in enumerate(statuses) if name == KEPT]
    return CandidateFilter(statuses, min(kept, key=lambda i: float(means[i, 0])) if kept else None)


@dataclass(frozen=True)
class CandidateScores:
    """Scores of every candidate on every prompt; NaN throughout for a candidate without a direction.

    A refusal score is the log-odds that the answer starts with a refusal token (see `refusal_log_odds`).
    """

    bypass: Float64[Tensor, "candidate harmful"]
    """Refusal score of harmful prompts with the direction ablated: at every site, layer and token."""
    induce: Float64[Tensor, "candidate harmless"]
    """Refusal score of harmless prompts with the direction added once at its own layer, at every token."""
    kl: Float64[Tensor, "candidate harmless"]
    """KL divergence (nats) of the first answer token of harmless prompts, ablated from unchanged."""
    bare_harmful: Float64[Tensor, " harmful"]
    """Refusal score with nothing done."""
    bare_harmless: Float64[Tensor, " harmless"]

    def means(self) -> Float64[Tensor, "candidate score"]:
        """Bypass, induce and KL of every candidate, each the mean over its prompts."""
        return torch.stack([self.bypass.mean(dim=1), self.induce.mean(dim=1), self.kl.mean(dim=1)], dim=1)


def score_candidates(
    model: LanguageModel,
    candidates: Sequence[Direction],
    batch: TokenBatch,
    harmful: Sequence[int],
    harmless: Sequence[int],
    tokens: Sequence[int],
    *,
    cache: Cache | None = None,
) -> CandidateScores:
    """All three scores of all candidates on the batch's harmful and harmless rows; `tokens` are the refusal tokens.

    Prompts only: no answer is generated. A candidate at level l is added at the input of block l, so the last level
    is refused. Candidates of length 0 get no score.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> batch = ml.tokenize(prompts, ml.template_of(model))
    >>> acts = ml.collect(model, batch, positions=["last"])
    >>> candidates = [ml.mean_difference(acts, "harmful", "harmless", level=at, position="last") for at in (1, 2)]
    >>> tokens = [model.to_single_token("I")]
    >>> scores = ml.score_candidates(model, candidates, batch, range(20), range(20, 40), tokens)
    >>> len(scores.bypass)
    2
    """
    usable = [i for i, one in enumerate(candidates) if one.norm > 0]
    directions = [candidates[i] for i in usable]
    # Both classes in one batch, so that what ablating does to the start of every prompt is worked out once.
    both, n = batch.select([*harmful, *harmless]), len(harmful)
    bare = logits_under(model, both, [], cache=cache)
    under = _scored(model, both, [ablation(one) for one in directions], RefusalAndKl(tuple(tokens), bare), cache)
    alone = both.select(range(n, len(bare)))
    pushed = _scored(model, alone, [addition(one) for one in directions], RefusalAndKl(tuple(tokens), bare[n:]), cache)
    clean = refusal_log_odds(bare, tokens)
    return CandidateScores(
        bypass=_placed(under[:, :n, 0], usable, len(candidates)),
        induce=_placed(pushed[:, :, 0], usable, len(candidates)),
        kl=_placed(under[:, n:, 1], usable, len(candidates)),
        bare_harmful=clean[:n],
        bare_harmless=clean[n:],
    )


def ablation(direction: Direction) -> Ablate:
    """The direction taken out of the residual stream wherever it is written or read, at every token."""
    return Ablate(direction, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)


def addition(direction: Direction) -> Add:
    """The direction as it is, added once at the input of its own layer, at every token."""
    return Add(direction, strength=1.0, unit="raw", layers=(direction.level,), positions=ALL, phase="both")


@dataclass(frozen=True)
class RefusalAndKl:
    """Logits to refusal score and KL, prompt by prompt."""

    tokens: tuple[int, ...]
    clean: Float[Tensor, "prompt vocab"]
    """Logits with nothing done; they follow from the model and the prompts, so the key needn't say them."""

    @property
    def key(self) -> str:
        return f"refusal score of {sorted(self.tokens)} and KL"

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: list[int]) -> Float64[Tensor, "row 2"]:
        prompts = [row % len(self.clean) for row in rows]
        return torch.stack([refusal_log_odds(logits, self.tokens), published_kl(self.clean[prompts], logits)], dim=1)


def published_kl(clean: Float[Tensor, "row vocab"], changed: Float[Tensor, "row vocab"]) -> Float64[Tensor, " row"]:
    """sum_v p_v (log(p_v + 1e-6) - log(q_v + 1e-6)) in nats, p clean and q changed: Arditi et al.'s KL.

    The constant makes it differ a little from the divergence, and can make it slightly negative.
    """
    p, q = clean.double().softmax(-1), changed.double().softmax(-1)
    return (p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1)


def _scored(
    model: LanguageModel,
    batch: TokenBatch,
    interventions: Sequence[Intervention],
    scores: RefusalAndKl,
    cache: Cache | None,
) -> Float64[Tensor, "candidate prompt 2"]:
    """Every intervention on every prompt of the batch."""
    n = len(batch.prompts)
    if not interventions:
        return torch.empty(0, n, 2, dtype=torch.float64)
    rows = batch.select(list(range(n)) * len(interventions))
    each = [[one] for one in interventions for _ in range(n)]
    return logits_under(model, rows, each, reduce=scores, cache=cache).reshape(len(interventions), n, 2)


def _placed(
    values: Float64[Tensor, "usable prompt"], usable: Sequence[int], n: int
) -> Float64[Tensor, "candidate prompt"]:
    placed = torch.full((n, values.shape[1]), float("nan"), dtype=torch.float64)
    placed[torch.tensor(usable, dtype=torch.long)] = values
    return placed
