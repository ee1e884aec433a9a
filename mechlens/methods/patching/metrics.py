"""What a run's next-token logits say, as one number: the metrics of patching and steering."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.behaviour.judges import refusal_log_odds, require_scorable


@runtime_checkable
class Metric(Protocol):
    """A number for each row of logits; `clean` are the logits of the clean run, for metrics that compare."""

    @property
    def name(self) -> str:
        """How the metric is called in tables."""
        ...

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        """One value for each row (float64)."""
        ...


@dataclass(frozen=True)
class LogitDifference:
    """logit(first) - logit(second): the default of patching, linear in the residual stream."""

    first: int
    second: int
    name: str = "logit_difference"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        require_scorable((self.first, self.second), logits.shape[-1])
        return (logits[:, self.first] - logits[:, self.second]).double()

    def narrowed(self) -> "tuple[tuple[int, int], LogitDifference]":
        """The tokens whose logits are all that it takes, and the same metric of those alone."""
        return (self.first, self.second), LogitDifference(0, 1, self.name)


@dataclass(frozen=True)
class LogProbability:
    """Log-probability of one token (nats)."""

    token: int
    name: str = "log_probability"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        require_scorable((self.token,), logits.shape[-1])
        return logits.double().log_softmax(dim=-1)[:, self.token]


@dataclass(frozen=True)
class KLDivergence:
    """KL(clean || patched) of the next token (nats): every change counts, whatever token it favours."""

    name: str = "kl"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        reference = clean.double().log_softmax(dim=-1)
        patched = logits.double().log_softmax(dim=-1)
        return (reference.exp() * (reference - patched)).sum(dim=-1)


@dataclass(frozen=True)
class RefusalLogOdds:
    """Log-odds that the answer starts with a refusal token (Arditi et al. 2024)."""

    tokens: tuple[int, ...]
    name: str = "refusal_logodds"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        return refusal_log_odds(logits, self.tokens)


@dataclass(frozen=True)
class OwnMetric:
    """A function of the last-position logits, such as a notebook's lambda."""

    function: Callable[[Tensor], Tensor]
    name: str = "own_metric"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        values = torch.as_tensor(self.function(logits)).double()
        if values.numel() != len(logits):
            raise UserError(
                f"the metric {self.name!r} gave {values.numel()} numbers for {len(logits)} rows of logits; it takes "
                "logits of shape (row, vocab) and must give one number for each row, such as logits[:, 5]"
            )
        return values.reshape(len(logits))


def require_tokens(metric: Metric, vocabulary: int) -> None:
    """UserError where a metric of ours asks for a token beyond so many logits, said before anything is run."""
    if isinstance(metric, LogitDifference | LogProbability | RefusalLogOdds):
        metric(torch.zeros(1, vocabulary), torch.zeros(vocabulary))
