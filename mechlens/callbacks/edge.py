"""The numerical edge inside somebody's training run: a callback for the transformers Trainer."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TrainerCallback

from mechlens.callbacks.tracking import Log, tell
from mechlens.errors import warn
from mechlens.methods.numerics.edge import NumericalEdge, numerical_edge
from mechlens.methods.numerics.scaling import gradient_alignment

MOST = 128
"""Positions of a batch that are looked at: each is a row of logits in float64."""
IGNORED = -100
"""The label of a position that isn't learnt, as in transformers."""
UNREAD = (
    "EdgeCallback saw no logits with labels in a training batch, as where a fused loss or label smoothing hides "
    "them, so only the gradient's alignment is kept"
)


class EdgeCallback(TrainerCallback):  # type: ignore[misc]
    """At every logging step: how near the batch's logits are to where their softmax teaches nothing any more.

    Of up to 128 learnt positions of the step's last batch the numbers of `numerical_edge`, in the type of the logits,
    and of the whole gradient its `alignment` with the weights that are trained (see `gradient_alignment`). Nothing is
    changed. They go into the Trainer's log history and to `log`, or, where that is None, into the W&B run that the
    Trainer itself reports to, as `mechlens/edge.collapsed` and so on.

    >>> watch = ml.EdgeCallback()
    >>> # transformers.Trainer(..., callbacks=[watch]).train(); then watch.table()
    >>> list(watch.table())
    ['step', 'collapsed', 'zero_loss', 'scale', 'gap', 'alignment', 'dtype']
    """

    def __init__(self, *, log: Log | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._log = log
        self._seen: NumericalEdge | None = None
        self._alignment: float | None = None
        self._due = False
        self._hook: Any = None

    def table(self) -> pd.DataFrame:
        """One row for each step that was looked at."""
        columns = ["step", "collapsed", "zero_loss", "scale", "gap", "alignment", "dtype"]
        return pd.DataFrame(self.rows, columns=columns)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """From now on what goes through the model may be looked at."""
        self._hook = model.register_forward_hook(self._look, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Only steps that are logged are looked at."""
        self._seen, self._due = None, (state.global_step + 1) % max(1, int(args.logging_steps)) == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The whole gradient, before the step is made."""
        if self._due:
            trained = [own for own in model.parameters() if own.grad is not None]
            self._alignment = gradient_alignment(trained, [own.grad for own in trained])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What was seen goes into the table and the logs."""
        if not self._due or self._alignment is None:
            return
        self._due = False
        if self._seen is None and not any("collapsed" in row for row in self.rows):
            warn(UNREAD)
        seen = asdict(self._seen) if self._seen else {}
        self.rows.append({"step": int(state.global_step), **seen, "alignment": self._alignment})
        values = {f"edge.{name}": float(one) for name, one in self.rows[-1].items() if name not in ("step", "dtype")}
        tell(state, values, self._log)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The model is left as it was."""
        if self._hook is not None:
            self._hook.remove()

    def _look(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        logits, labels = getattr(output, "logits", None), kwargs.get("labels")
        if self._due and module.training and logits is not None and labels is not None:
            self._seen = edge_of_batch(logits.detach(), labels)


def edge_of_batch(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> NumericalEdge | None:
    """The edge at the first learnt positions of a batch, each before its label; None where nothing is learnt."""
    before, after = logits[:, :-1], labels[:, 1:]
    learnt = (after != IGNORED).nonzero()[:MOST]
    if not len(learnt):
        return None
    rows, tokens = learnt.T
    return numerical_edge(before[rows, tokens], after[rows, tokens])
