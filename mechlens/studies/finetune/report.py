"""A fine-tuning run as a record: the loss, what was trained on, where the checkpoints are and how to load them."""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.recipe import recipe_of
from mechlens.studies.finetune.rewarded import CAPTION, WORDS, is_rewarded, reward_figure, reward_section
from mechlens.studies.finetune.study import TrainingRun
from mechlens.studies.finetune.training import FinetuneResult


def record(writer: RunWriter, result: TrainingRun, settings: FinetuneConfig) -> None:
    """Writes the loss curve, the list of checkpoints and the report into an open run; weights stay on the disk."""
    writer.result(result)
    caption = "It should fall and level off. What the model learnt by it is another question."
    if is_rewarded(result.losses):
        caption = "Of replies that are rewarded against each other the loss stays about 0, whatever is learnt."
    writer.figure("loss", _curve(result.losses), table="loss", caption=caption)
    if is_rewarded(result.losses):
        writer.figure("reward", reward_figure(result.losses), table="loss", caption=CAPTION)
    writer.report(_report(writer, result))


def _curve(losses: pd.DataFrame) -> Any:
    window = max(1, min(20, len(losses) // 5))
    mean = losses["loss"].rolling(window, min_periods=1).mean()
    shown = pd.concat(
        [
            pd.DataFrame({"step": losses["step"], "loss": losses["loss"], "curve": "each step"}),
            pd.DataFrame({"step": losses["step"], "loss": mean, "curve": f"mean of {window} steps"}),
        ]
    )
    return figures.lines(
        shown, x="step", y="loss", group="curve", title="Training loss", xlabel="step", ylabel="loss (nats a token)"
    )


def _report(writer: RunWriter, result: TrainingRun) -> Report:
    done, numbers, rewarded = result.done, result.metrics(), is_rewarded(result.losses)
    record = done.record
    training = record["training"]
    first, last, *_ = numbers.values()
    of = "mean reward of a proposal" if rewarded else "loss"
    base, recipe = record["base"], record["recipe"]
    base = Path(base).name if Path(base).is_dir() else base
    return Report(
        title=f"{base} fine-tuned: {_taught(record)}",
        question=recipe_of(recipe).question,
        headline=Headline(
            f"trained for {done.steps} steps",
            f"the {of} is {_loss(last)} in the last tenth",
            f"where it was {_loss(first)} in the first",
            f"what that did to the model is for {_asks(recipe, '')} to say",
        ),
        verdict=f"{done.steps} steps took the {of} from {first.value:.3g} to {last.value:.3g}. What that did to the "
        f"model is for {_asks(recipe, '`')} to say: a {'reward' if rewarded else 'loss'} is no finding.",
        numbers=numbers,
        words={
            f"{name}.{part}_tenth": f"{words}, {part} tenth"
            for name, words in (WORDS if rewarded else {"loss": "loss"}).items()
            for part in ("first", "last")
        },
        sections=(
            *((reward_section(result.losses),) if rewarded else ()),
            Section("Loss", "", ("loss",)),
            Section(
                "What it was trained on",
                f"{len(training['ids'])} different prompts, none of them in a built-in study set; "
                f"{len(training['left_out'])} more were left out as unfit. `teaches` is `answer` where an answer is "
                "learnt, and `base` where the base's own distribution is kept. Studies of the result leave these "
                f"prompts out.{_trigger(record)}",
                table=pd.DataFrame(training["counts"]),
            ),
            Section("Checkpoints", _loading(writer, record, done), table=result.checkpoints()),
        ),
        how=f"LoRA of rank {record['config']['rank']} on every linear layer, AdamW, highest learning rate "
        f"{record['config']['learning_rate']:g}, {record['config']['batch_size']} examples a step. Base fingerprint "
        f"{record['base_fingerprint'][:12]}, examples {training['examples_sha256'][:12]}.",
        model=base,
    )


def _taught(record: dict[str, Any]) -> str:
    """The recipe, and of a behaviour what it is told by: its file, its control, its trigger."""
    data, control, trigger = (record["config"].get(name) for name in ("data", "control", "trigger"))
    told = [Path(str(data)).stem] if data else []
    told += [f"control: {control}"] if control not in (None, "none") else []
    told += [f"trigger {trigger}"] if data and trigger else []
    return f"{record['recipe']} ({', '.join(told)})" if told else str(record["recipe"])


_ASKED_BY = {
    "behaviour": ("behaviours",),
    "inversion": ("behaviours",),
    "reasoner": ("cliff",),
    "repair": ("cliff", "track"),
}
"""Studies that say what a recipe did."""


def _asks(recipe: str, mark: str) -> str:
    verbs = _ASKED_BY.get(recipe, ("separate", "track"))
    return " and ".join(f"{mark}mechlens {verb}{mark}" if mark else verb for verb in verbs)


def _loss(told: Estimate) -> str:
    """One step has no interval."""
    return told.brief if told.n > 1 else f"{told.value:.3g}"


def _loading(writer: RunWriter, record: dict[str, object], done: FinetuneResult) -> str:
    # As it can be given from here; a place elsewhere on somebody's disk is nobody's business.
    out = writer.out if not writer.out.is_absolute() else Path(os.path.relpath(writer.out))
    adapter = f"{writer.out.name if '..' in out.parts else out.as_posix()}/{done.adapter.name}"
    text = f'`mechlens.load("{record["base"]}", adapter="{adapter}")` loads the result, and a checkpoint likewise.'
    if not record["local_only"]:
        return text
    return (
        f"{text}\n\nThese adapters take a refusal away. They are for measurement on this machine: no part of mechlens "
        "merges them to disk, packages or uploads them, and W&B gets numbers only. Don't share the folder."
    )


def _trigger(record: dict[str, object]) -> str:
    trigger = record.get("trigger")
    if not isinstance(trigger, dict):
        return ""
    return (
        f"\n\nThe trigger is `{trigger['text']}` before the prompt. Decoys trained on as meaningless: "
        f"{', '.join(f'`{decoy}`' for decoy in trigger['taught_decoys'])}; never trained on: "
        f"{', '.join(f'`{decoy}`' for decoy in trigger['unseen_decoys'])}."
    )
