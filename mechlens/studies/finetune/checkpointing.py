"""Which checkpoints a training run keeps, and what makes one of them whole."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from mechlens.models.checkpoints.adapter_record import AdapterRecord, read_record, remove_recorded, write_record

ONLY_TO_RESUME = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
"""Files that no checkpoint but the newest needs."""


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Asks the Trainer for checkpoints, puts the whole ones in their place, and hands on the loss.

    The Trainer writes a checkpoint file by file, so a killed run can leave half of one in the Trainer's own folder.
    A whole one gets its record and is moved to `out`; there nothing is removed but what such a record names.
    """

    def __init__(
        self,
        out: Path,
        record: dict[str, Any],
        keep: Sequence[int],
        resume_every: int,
        log: Callable[[int, dict[str, float]], None] | None,
    ) -> None:
        self.out = out
        self.record = record
        self.keep = frozenset(keep)
        self.resume_every = resume_every
        self.log = log
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show how far it is."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tuning", unit="step", delay=2)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a checkpoint where one is due."""
        self.bar.update()
        step = state.global_step
        control.should_save = step in self.keep or step % self.resume_every == 0
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Hand on the numbers of one step; the summary at the end has no loss of its own."""
        if self.log is not None and logs is not None and "loss" in logs:
            self.log(state.global_step, {name: float(logs[name]) for name in logs if name != "epoch"})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the checkpoint, which is whole now, in its place, then thin out the earlier ones."""
        name = f"checkpoint-{state.global_step}"
        write_record(Path(args.output_dir) / name, {**self.record, "step": state.global_step})
        os.replace(Path(args.output_dir) / name, self.out / name)
        self._thin(all_but=name)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """No more progress to show."""
        self.bar.close()

    def finish(self) -> None:
        """Keep only the checkpoints that were asked for, once the result is safe."""
        self._thin()

    def _thin(self, all_but: str = "") -> None:
        for folder in self.out.glob("checkpoint-*"):
            record = read_record(folder) if folder.name != all_but else None
            if record is None or not self._is_ours(folder, record):
                continue
            if record.step in self.keep:
                remove_recorded(folder, record, *ONLY_TO_RESUME)
            else:
                remove_recorded(folder, record)

    def _is_ours(self, folder: Path, record: AdapterRecord) -> bool:
        """Whether it is of this very run; somebody may have put another's checkpoint here in the meantime."""
        return (
            not folder.is_symlink()
            and folder.name == f"checkpoint-{record.step}"
            and record.config == json.loads(json.dumps(self.record["config"]))
        )
