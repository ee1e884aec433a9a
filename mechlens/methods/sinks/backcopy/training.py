"""Trains a small transformer on the task and watches, step by step, what its heads do with the start of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pandas as pd
import torch
from annotated_types import Gt
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechlens.methods.progress import progress_bar
from mechlens.methods.shown import lines
from mechlens.methods.sinks.backcopy.task import BackcopyTask, Sequences
from mechlens.methods.sinks.backcopy.transformer import BackcopyShape, BackcopyTransformer
from mechlens.methods.sinks.measures import residual_peak, sinks_against_others
from mechlens.methods.statistics.resample import one_thread
from mechlens.settings import Options, PositiveInt

HELD_OUT = 64
"""Sequences that are never trained on, which everything is measured on."""


@dataclass(frozen=True)
class BackcopyTraining(Options):
    """How it is trained.

    >>> ml.BackcopyTraining(steps=100, optimiser="sgd", learning_rate=0.3).batch
    32
    """

    steps: PositiveInt
    optimiser: Literal["adam", "sgd"] = "adam"
    """adam: AdamW with betas .9 and .99; sgd: with momentum .9; both with a weight decay of 1e-4, as the authors'."""
    learning_rate: Annotated[float, Gt(0)] = 3e-3
    batch: PositiveInt = 32
    every: PositiveInt = 100
    """Steps between two looks."""
    seed: int = 0


@dataclass(frozen=True, repr=False)
class BackcopyRun:
    """What was seen of a training, and the model at its end.

    >>> task, shape = ml.backcopy_task(), ml.BackcopyShape(width=16, length=16)
    >>> run = ml.train_backcopy(task, shape, ml.BackcopyTraining(steps=2, every=1))
    >>> list(run.losses["step"]), sorted(run.heads.columns)
    ([0, 1, 2], ['block', 'mass', 'mass_at_triggers', 'step', 'value'])
    """

    model: BackcopyTransformer = field(repr=False)
    losses: pd.DataFrame
    """By step: the loss after triggers (`copy`, at least 0), at other letters (`rest`), and the entropy of the table of
    bigrams there (`entropy`), which no model can be below."""
    heads: pd.DataFrame
    """By step and block: attention to the start from letters that are no triggers (`mass`) and from triggers, and the
    norm of W_O v at the start as a share of that elsewhere (`value`)."""
    levels: pd.DataFrame
    """By step and block: the start's norm in what the block puts out, as a multiple of the largest other norm."""

    def __repr__(self) -> str:
        last, peak = self.losses.iloc[-1], self.levels[self.levels["step"] == self.levels["step"].max()]["peak"].max()
        told = {
            "loss after triggers": f"{last['copy']:.3f}",
            "loss elsewhere": f"{last['rest']:.3f} (entropy {last['entropy']:.3f})",
            "largest mass on the start": f"{self.heads[self.heads['step'] == last['step']]['mass'].max():.2f}",
            "largest peak": f"{peak:.2f}",
        }
        return lines(f"BackcopyRun after {int(last['step'])} steps", told)


def train_backcopy(task: BackcopyTask, shape: BackcopyShape, training: BackcopyTraining) -> BackcopyRun:
    """Trains on sequences that are drawn anew at every step, on one thread; the same seeds give the same run.

    >>> task, shape = ml.backcopy_task(), ml.BackcopyShape(width=16, length=16)
    >>> run = ml.train_backcopy(task, shape, ml.BackcopyTraining(steps=2, every=1))
    >>> list(run.losses["step"]), sorted(run.heads.columns)
    ([0, 1, 2], ['block', 'mass', 'mass_at_triggers', 'step', 'value'])
    """
    model = BackcopyTransformer(shape, n_tokens=task.n_tokens, seed=training.seed)
    optimiser, first = _optimiser(model, training), training.seed << 32
    held_out = task.draw(HELD_OUT, shape.length, seed=first - 1)
    seen: list[_Seen] = []
    with one_thread():
        for step in progress_bar(range(training.steps + 1), title="training", unit="step"):
            if step % training.every == 0 or step == training.steps:
                seen.append(_look(model, held_out, step))
            if step == training.steps:
                break
            tokens = task.draw(training.batch, shape.length, seed=first + step).tokens
            loss = _loss(model, tokens).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    parts = (_Seen.losses, _Seen.of_heads, _Seen.of_levels)
    tables = (pd.DataFrame([row for one in seen for row in part(one)]) for part in parts)
    return BackcopyRun(model, *tables)


def _optimiser(model: nn.Module, training: BackcopyTraining) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, 1e-4
    if training.optimiser == "adam":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)


def _loss(model: BackcopyTransformer, tokens: Tensor) -> Float[Tensor, "sequence place"]:
    """Of the token after each one but the last."""
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")


@dataclass(frozen=True)
class _Seen:
    """One look."""

    step: int
    loss: tuple[float, float, float]
    heads: Sequence[tuple[int, float, float, float]]
    peaks: Float[Tensor, " block"]

    def losses(self) -> list[dict[str, int | float]]:
        return [{"step": self.step} | dict(zip(("copy", "rest", "entropy"), self.loss, strict=True))]

    def of_heads(self) -> list[dict[str, int | float]]:
        names = ("block", "mass", "mass_at_triggers", "value")
        return [{"step": self.step} | dict(zip(names, own, strict=True)) for own in self.heads]

    def of_levels(self) -> list[dict[str, int | float]]:
        return [{"step": self.step, "block": i, "peak": peak} for i, peak in enumerate(self.peaks.tolist())]


@torch.no_grad()
def _look(model: BackcopyTransformer, held_out: Sequences, step: int) -> _Seen:
    tokens, trigger, oracle = held_out
    loss, told = _loss(model, tokens), trigger[:, :-1]
    copy, rest, entropy = (float(own.mean()) for own in (loss[told], loss[~told], oracle[:, :-1][~told]))
    watched = model.watched(tokens)
    # Rows of ReLU attention have any sum; a row of zeros gives the start nothing.
    shares = watched.pattern / watched.pattern.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    # A query that sees only the start and itself has hardly a choice.
    late = torch.arange(tokens.shape[1]) > 1
    masses = [_mass(shares[..., 0], chosen & late) for chosen in (~trigger, trigger)]
    values = sinks_against_others(watched.written.norm(dim=-1), [0]).mean(dim=1)
    peaks = residual_peak(watched.residual.norm(dim=-1), [0]).mean(dim=1)
    heads = list(zip(model.with_heads, masses[0], masses[1], values.tolist(), strict=True))
    return _Seen(step, (copy, rest, entropy), heads, peaks)


def _mass(to_first: Float[Tensor, "head sequence query"], chosen: Bool[Tensor, "sequence query"]) -> list[float]:
    return [float(own[chosen].mean()) for own in to_first]
