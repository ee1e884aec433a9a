"""What a run's next-token logits say, as one number: the metrics of patching and steering."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of
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
    """logit(first) - logit(second): the default of patching, linear in the residual stream.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> metric = ml.LogitDifference(model.to_single_token("a"), model.to_single_token("the"))
    >>> ml.patch_sweep(model, pairs, metric, ml.PatchPlan("resid_pre", positions=("last",))).metric
    'logit_difference'
    """

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
    """Log-probability of one token (nats).

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> result = ml.patch_sweep(model, pairs, ml.LogProbability(model.to_single_token("a")), plan)
    >>> bool((result.values < 0).all())
    True
    """

    token: int
    name: str = "log_probability"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        require_scorable((self.token,), logits.shape[-1])
        return logits.double().log_softmax(dim=-1)[:, self.token]


@dataclass(frozen=True)
class KLDivergence:
    """KL(clean || patched) of the next token (nats): every change counts, whatever token it favours.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> result = ml.patch_sweep(model, pairs, ml.KLDivergence(), plan)
    >>> bool((result.values > -1e-5).all())
    True
    """

    name: str = "kl"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        reference = clean.double().log_softmax(dim=-1)
        patched = logits.double().log_softmax(dim=-1)
        return (reference.exp() * (reference - patched)).sum(dim=-1)


@dataclass(frozen=True)
class RefusalLogOdds:
    """Log-odds that the answer starts with a refusal token (Arditi et al. 2024).

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> metric = ml.RefusalLogOdds((model.to_single_token("I"),))
    >>> ml.patch_sweep(model, pairs, metric, plan).metric
    'refusal_logodds'
    """

    tokens: tuple[int, ...]
    name: str = "refusal_logodds"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        return refusal_log_odds(logits, self.tokens)


@dataclass(frozen=True)
class OwnMetric:
    """A function of the logits at the place that is read: (row, vocab) in, one number for each row out.

    `lambda logits: logits[:, 5] - logits[:, 7]` may be given itself where a metric is asked for.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> largest = ml.OwnMetric(lambda logits: logits.max(dim=-1).values, name="largest logit")
    >>> ml.patch_sweep(model, pairs, largest, plan).metric
    'largest logit'
    """

    function: Callable[[Float[Tensor, "row vocab"]], Any]
    name: str = "own_metric"

    def __call__(self, logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"]) -> Float[Tensor, " row"]:
        try:
            found = self.function(logits)
        except Exception as error:  # whatever a function of the user's raises
            raise UserError(
                f"the metric {self.name!r} raised {type(error).__name__} ({error!s:.200}); {_EXPECTED}"
            ) from error
        try:
            values = torch.as_tensor(found).double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the metric {self.name!r} gave {kind_of(found)}; {_EXPECTED}") from error
        if values.numel() != len(logits):
            raise UserError(
                f"the metric {self.name!r} gave {values.numel()} numbers for {len(logits)} rows of logits; {_EXPECTED}"
            )
        return values.reshape(len(logits))


_EXPECTED = (
    "it takes logits of shape (row, vocab) and must give one number for each row, such as logits[:, 5] - logits[:, 7]"
)
MetricLike = Metric | Callable[[Tensor], Any]
"""A metric, or a function of logits of shape (row, vocab) that gives one number for each row."""


def as_metric(given: object) -> Metric:
    """The metric, or the function as one; UserError for what can't be called."""
    if isinstance(given, Metric):
        return given
    if not callable(given):
        raise UserError(
            f"the metric is {kind_of(given)}; give ml.LogitDifference, another metric of ours, or a function: "
            + _EXPECTED
        )
    name = getattr(given, "__name__", "<lambda>")
    return OwnMetric(given) if name == "<lambda>" else OwnMetric(given, name)


def try_metric(metric: Metric, logits: Float[Tensor, "2 vocab"], *, gradient: bool) -> None:
    """UserError where a metric of the user's can't be used on two prompts' logits: said before anything slow."""
    if not isinstance(metric, OwnMetric):
        return
    with torch.inference_mode(False), torch.enable_grad():
        asked = logits.detach().clone().requires_grad_(gradient)
        together, alone = metric(asked, asked[0]), metric(asked[1:], asked[0])
    if not bool(torch.isfinite(together).all()):
        raise UserError(
            f"the metric {metric.name!r} gave {together.tolist()} for the first pair, which are no finite numbers; "
            "mend it (a logarithm of 0?)"
        )
    if not torch.allclose(together[1:], alone, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"the metric {metric.name!r} gives a prompt {float(together[1]):.4g} beside another and {float(alone):.4g} "
            f"alone, so it mixes rows; {_EXPECTED}"
        )
    if gradient and not together.requires_grad:
        raise UserError(
            f"the metric {metric.name!r} gives numbers without a gradient, which attribution needs; keep to torch "
            "(no .item(), no numpy), or choose another engine"
        )


def require_tokens(metric: Metric, vocabulary: int) -> None:
    """UserError where a metric of ours asks for a token beyond so many logits, said before anything is run."""
    if isinstance(metric, LogitDifference | LogProbability | RefusalLogOdds):
        metric(torch.zeros(1, vocabulary), torch.zeros(vocabulary))
