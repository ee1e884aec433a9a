"""Tracking inside somebody's training run: a callback for the transformers Trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from mechlens.errors import UserError
from mechlens.prompts.asked import Prompts
from mechlens.runs.artifacts import load, save
from mechlens.settings import DetectionPlan
from mechlens.studies.track.live import LivePrompts, LiveReference, live_numbers, live_reference, watch

REFERENCE_FILE = "mechlens_reference.safetensors"
"""In the Trainer's output folder, for a training run that is gone on with."""


Log = Callable[[int, dict[str, float]], None]
"""A step, and numbers by name."""


class MechlensCallback(TrainerCallback):  # type: ignore[misc]
    """At the start and at every evaluation: is the concept where it was, and can it still be read?

    The plain module is read, without gradients, in evaluation mode; modes and random states are put back, so that
    training with this callback ends in the same weights as without it. At the start the words and three networks with
    random blocks are read too, for which the blocks lie in memory twice: the floor under what is read. The numbers
    (see `live_numbers`) go into the Trainer's log history and to `log`, or, where that is None, into the W&B run that
    the Trainer itself reports to (`report_to="wandb"`), as `mechlens/NAME.auroc.inst.frozen` and so on. Prompt texts go
    nowhere.

    >>> tokenizer = ml.load_tokenizer("smollm2")
    >>> watch = ml.MechlensCallback(ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40], tokenizer)
    >>> # transformers.Trainer(..., callbacks=[watch]).train(); then watch.table()
    >>> len(watch.table())
    0
    """

    def __init__(
        self,
        positive: Prompts,
        negative: Prompts,
        tokenizer: Any,
        *,
        name: str = "harmful",
        positions: Sequence[str] = ("inst", "last"),
        plan: DetectionPlan | None = None,
        refusal_tokens: Sequence[int] = (),
        today: str | None = None,
        template_arg: Sequence[str] = (),
        log: Log | None = None,
    ) -> None:
        self.name = name
        self.watched: LivePrompts = watch(
            positive,
            negative,
            tokenizer,
            positions=positions,
            plan=plan or DetectionPlan(seed=0),
            refusal_tokens=refusal_tokens,
            today=today,
            template_arg=template_arg,
        )
        self.reference: LiveReference | None = None
        self.rows: list[dict[str, float | int | str]] = []
        self._log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The reference: the model as training found it, or what was kept of that when a run is gone on with."""
        if args.world_size > 1:
            raise UserError(
                f"MechlensCallback reads a model that lies in one process, and there are {args.world_size}; "
                "track the saved checkpoints instead"
            )
        path = Path(args.output_dir) / REFERENCE_FILE
        if state.global_step == 0:
            if path.exists():
                load(path, LiveReference)  # an earlier run's may be replaced, and nobody else's file
            self.reference = live_reference(model, self.watched, 0)
            save(self.reference, path)
        else:
            self.reference = self._kept(path, state.global_step)
        self._measure(state, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The same numbers for the model as it is now."""
        self._measure(state, model)

    def table(self) -> pd.DataFrame:
        """One row for each step and number: step, number, value, low, high, n."""
        return pd.DataFrame(self.rows, columns=["step", "number", "value", "low", "high", "n"])

    def _kept(self, path: Path, step: int) -> LiveReference:
        if not path.exists():
            raise UserError(
                f"training goes on from step {step}, and there is no {REFERENCE_FILE} in {path.parent} from its start; "
                "train from the beginning with this callback"
            )
        reference = load(path, LiveReference)
        if reference.watched != self.watched.fingerprint:
            raise UserError(f"{path} was made from other prompts or settings; give the callback what it had before")
        return reference

    def _measure(self, state: Any, model: Any) -> None:
        if self.reference is None:
            return  # Trainer.evaluate() without training: there is nothing to compare with
        step = int(state.global_step)
        if any(row["step"] == step for row in self.rows):
            return
        found = live_numbers(model, self.watched, self.reference, step)
        values: dict[str, float] = {}
        for number, estimate in found.items():
            key = f"{self.name}.{number}"
            self.rows.append({"step": step, "number": key, **estimate.row()})
            if estimate.measurable:
                values[key] = estimate.value
            if estimate.measurable and estimate.has_interval:
                values |= {f"{key}/low": estimate.low, f"{key}/high": estimate.high}
        tell(state, values, self._log)


def tell(state: Any, values: dict[str, float], log: Log | None) -> None:
    """Into the Trainer's log history and to `log`, or, where that is None, into the open W&B run."""
    step = int(state.global_step)
    state.log_history.append({"step": step, **{f"mechlens/{key}": value for key, value in values.items()}})
    (log or _to_wandb)(step, values)


def _to_wandb(step: int, values: dict[str, float]) -> None:
    """Into the run that is open, on the Trainer's own step axis."""
    import wandb

    if wandb.run is not None:
        wandb.run.log({**{f"mechlens/{key}": value for key, value in values.items()}, "train/global_step": step})
