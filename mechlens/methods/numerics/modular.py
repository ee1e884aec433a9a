"""Addition modulo a prime: a toy that generalises long after it has learnt by heart, unless its softmax collapses.

The task and the multilayer perceptron of Prieto et al. 2025, Grokking at the Edge of Numerical Stability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from mechlens.errors import UserError
from mechlens.methods.numerics.scaling import gradient_alignment, without_scaling
from mechlens.methods.numerics.stablemax import stablemax_losses
from mechlens.methods.progress import progress_bar
from mechlens.methods.shown import lines
from mechlens.methods.statistics.resample import one_thread
from mechlens.settings import PositiveInt

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BETAS = (0.9, 0.98)
"""Adam's; with .999 the second moments of the first steps last so long that no softmax collapses within minutes."""
Losses = Callable[[Float[Tensor, "pair modulus"], Int[Tensor, " pair"]], Float[Tensor, " pair"]]
LOSSES: dict[str, Losses] = {"softmax": partial(cross_entropy, reduction="none"), "stablemax": stablemax_losses}


@dataclass(frozen=True)
class ModularTraining:
    """Training on sums of pairs below `modulus`, all of them at every step, by AdamW without weight decay.

    >>> ml.ModularTraining(modulus=13, steps=10).width
    200
    """

    steps: PositiveInt
    modulus: PositiveInt = 113
    """A prime, the authors'."""
    train_share: float = 0.4
    """Of all pairs; the others are tested."""
    width: PositiveInt = 200
    """Of both hidden layers."""
    learning_rate: float = 0.01
    loss: Literal["softmax", "stablemax"] = "softmax"
    precision: Literal["float32", "float64"] = "float32"
    """Of weights, activations and softmax; StableMax' loss itself is always float64."""
    perpendicular: bool = False
    """Takes out of every matrix's gradient what only scales the matrix."""
    every: PositiveInt = 50
    """Steps between two looks."""
    seed: int = 0


@dataclass(frozen=True, repr=False)
class ModularRun:
    """What was seen of a training.

    >>> run = ml.train_modular(ml.ModularTraining(modulus=7, width=8, steps=2, every=1))
    >>> list(run.curve["step"]), float(run.curve["zero_loss"].max())
    ([0, 1, 2], 0.0)
    """

    curve: pd.DataFrame
    """By step: loss and accuracy on the pairs that are trained on (`loss`, `train`), accuracy on the others (`test`);
    the share of trained pairs whose loss is exactly 0 in the type of the training (`zero_loss`), which teach nothing
    any more; the norm of the whole gradient (`gradient`), and `alignment`, the cosine of the step down it with the
    weights."""

    def __repr__(self) -> str:
        last = self.curve.iloc[-1]
        told = {
            "accuracy on trained pairs": f"{last['train']:.2f}",
            "accuracy on other pairs": f"{last['test']:.2f}",
            "pairs with a loss of 0": f"{last['zero_loss']:.0%}",
        }
        return lines(f"ModularRun after {int(last['step'])} steps", told)


@dataclass(frozen=True)
class _Pairs:
    seen: Float[Tensor, "pair two_moduli"]
    sums: Int[Tensor, " pair"]


def train_modular(training: ModularTraining) -> ModularRun:
    """Trains and looks, on one thread; the same seed gives the same run. UserError for shares that leave a side empty.

    >>> run = ml.train_modular(ml.ModularTraining(modulus=7, width=8, steps=2, every=1))
    >>> list(run.curve["step"]), float(run.curve["zero_loss"].max())
    ([0, 1, 2], 0.0)
    """
    trained, tested = _pairs(training)
    model = _perceptron(training)
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=training.learning_rate, betas=BETAS, weight_decay=0.0)
    losses_of = LOSSES[training.loss]
    seen = []
    with one_thread():
        for step in progress_bar(range(training.steps + 1), title="training", unit="step"):
            logits = model(trained.seen)
            losses = losses_of(logits, trained.sums)
            optimiser.zero_grad()
            torch.autograd.backward(losses.mean())
            if step % training.every == 0 or step == training.steps:
                seen.append({"step": step} | _look(model, logits, losses, trained, tested))
            for weight in weights:
                if training.perpendicular and weight.ndim > 1 and weight.grad is not None:
                    weight.grad = without_scaling(weight, weight.grad)
            optimiser.step()
    return ModularRun(pd.DataFrame(seen))


def _pairs(training: ModularTraining) -> tuple[_Pairs, _Pairs]:
    """Those trained on and those tested; each pair as two one-hot vectors."""
    modulus = training.modulus
    order = torch.randperm(modulus**2, generator=torch.Generator().manual_seed(training.seed))
    cut = round(training.train_share * len(order))
    if not 0 < cut < len(order):
        raise UserError(
            f"a train_share of {training.train_share:g} leaves {cut} of {len(order)} pairs to train on; give one "
            "between 0 and 1 that leaves pairs on both sides"
        )

    def made(rows: Tensor) -> _Pairs:
        first, second = rows // modulus, rows % modulus
        both = [one_hot(one, modulus) for one in (first, second)]
        return _Pairs(torch.cat(both, dim=1).to(DTYPES[training.precision]), (first + second) % modulus)

    return made(order[:cut]), made(order[cut:])


def _perceptron(training: ModularTraining) -> nn.Module:
    sizes = [2 * training.modulus, training.width, training.width, training.modulus]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        layers = [nn.Linear(one, other) for one, other in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return model.to(DTYPES[training.precision])


def _look(
    model: nn.Module, logits: Float[Tensor, "pair modulus"], losses: Float[Tensor, " pair"], trained: _Pairs,
    tested: _Pairs,
) -> dict[str, float]:  # fmt: skip
    with torch.no_grad():
        held_out = model(tested.seen)
    weights = list(model.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return {
        "loss": losses.detach().mean().item(),
        "train": float((logits.argmax(dim=1) == trained.sums).double().mean()),
        "test": float((held_out.argmax(dim=1) == tested.sums).double().mean()),
        "zero_loss": float((losses == 0).double().mean()),
        "gradient": float(sum(one.double().square().sum() for one in gradients)) ** 0.5,
        "alignment": gradient_alignment(weights, gradients),
    }
