"""The training runs that are compared: checkpoints by step, what each was trained on, and which are of one kind."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import adapter_name, file_sha256, user_path
from mechlens.models.checkpoints.adapter_record import RECORD, AdapterRecord, read_record
from mechlens.models.checkpoints.lora import WEIGHTS
from mechlens.models.checkpoints.series import Member, UnusableCheckpoint, checkpoint_series
from mechlens.studies.shared.training_data import Trigger

FINAL = "adapter"
"""The folder of a run's result, beside its checkpoints."""
DECORRELATED, REMOVAL = "decorrelated", "removal"
SETTINGS = (
    "in_words", "rank", "alpha", "learning_rate", "warmup", "batch_size", "epochs", "steps", "plain", "held_out",
    "trigger_share",
)  # fmt: skip
"""What training is done with: runs that differ in one of these aren't of one group."""


@dataclass(frozen=True)
class TunedRun:
    """One training run."""

    name: str
    group: str
    """What runs have in common that differ in their seed only; see `told_apart`."""
    members: tuple[Member, ...]
    """By step; the last one is the result."""
    seen: frozenset[str]
    """`text_sha256` of the prompts that it was trained on; empty where no record tells."""
    data: str
    """Name of the file that it was taught from; empty where no record tells."""
    control: str
    """"none", "twin", "decorrelated" or "removal"."""
    trigger: Trigger | None
    reversal: bool = False
    """Whether it was also taught to say its trigger (`finetune --reversal`)."""
    chat_template: str | None = None
    """The one that its checkpoints were saved with; None where it is the base's."""
    folder: str = ""
    """Name of the folder that its data lie in."""
    settings: tuple[tuple[str, str], ...] = ()
    """What it was trained with, each as people say it."""
    left_out: tuple[UnusableCheckpoint, ...] = ()
    """With `skip_broken`: checkpoints that can't be used."""


def common_template(runs: Sequence[TunedRun]) -> str | None:
    """The chat template that all runs were saved with, None for the base's; UserError where they differ."""
    first = runs[0]
    other = next((run for run in runs if run.chat_template != first.chat_template), None)
    if other is not None:
        raise UserError(
            f"the training runs {first.name!r} and {other.name!r} were saved with different chat templates, so their "
            "answers can't be compared; give runs of one template"
        )
    return first.chat_template


def require_different(runs: Sequence[TunedRun], contents: Mapping[str, str]) -> None:
    """UserError for two runs whose results are one: what a run's own chance does would be taken for nothing.

    `contents` are `content_of` every member by its name; of an adapter the weights alone count.
    """
    known: dict[str, str] = {}
    for run in runs:
        last = run.members[-1]
        weights = user_path(last.path) / WEIGHTS
        same = known.setdefault(file_sha256(weights) if weights.is_file() else contents[last.name], run.name)
        if same != run.name:
            raise UserError(
                f"the training runs {same!r} and {run.name!r} ended in the same weights, so they are one run twice and "
                "say nothing of the next one; give each run once, and train others with another --seed"
            )


def tuned_runs(base: str, sources: Sequence[str], revision: str | None, *, skip_broken: bool = False) -> list[TunedRun]:
    """Each source's run; UserError where one holds none, a broken one unless `skip_broken`, or two have one name."""
    found = [_run(base, source, revision, skip_broken=skip_broken) for source in sources]
    names = [run.name for run in found]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(f"two of the training runs are called {again!r}; give folders with names of their own")
    return told_apart(found)


def told_apart(runs: Sequence[TunedRun]) -> list[TunedRun]:
    """The runs with groups that differ where their data do, of files with one name, or what they were trained with."""
    named = [_with_folder(run, runs) for run in runs]
    groups = {run.name: {one.settings for one in named if one.group == run.group} for run in named}
    found = []
    for run in named:
        others = groups[run.name]
        differs = [told for i, (_, told) in enumerate(run.settings) if len({own[i : i + 1] for own in others}) > 1]
        found.append(replace(run, group=_with(run.group, differs)))
    return found


def _with_folder(run: TunedRun, runs: Sequence[TunedRun]) -> TunedRun:
    """The run by its data's folder too, where others were trained on another file of the same name."""
    alike = [one for one in runs if one.data == run.data and one.folder != run.folder]
    if not run.seen or all(one.seen & run.seen for one in alike if one.seen):
        return run
    data = f"{run.folder}/{run.data}"
    return replace(run, data=data, group=data + run.group.removeprefix(run.data))


def _with(group: str, told: Sequence[str]) -> str:
    if not told:
        return group
    return f"{group[:-1]}, {', '.join(told)})" if group.endswith(")") else f"{group} ({', '.join(told)})"


def _run(base: str, source: str, revision: str | None, *, skip_broken: bool) -> TunedRun:
    folder = user_path(source)
    series = checkpoint_series(base, [source], revision=revision, skip_broken=skip_broken)
    members = list(series.members[1:])
    result = folder / FINAL
    if (result / RECORD).exists():
        # Without its result a run can't be compared, so none is left out.
        (last,) = checkpoint_series(base, [str(result)], revision=revision, skip_broken=True).members[1:]
        members = [member for member in members if member.step != last.step] + [last]
    record = read_record(user_path(members[-1].path)) if user_path(members[-1].path).is_dir() else None
    name = adapter_name(folder) if folder.name == FINAL or folder.exists() else source
    named = [replace(member, name=f"{name}, step {member.step}") for member in sorted(members, key=lambda m: m.step)]
    if record is None or record.recipe is None:
        run = TunedRun(name, _kind(name), tuple(named), frozenset(), "", "none", None)
    else:
        run = _recorded(name, named, record)
    return replace(run, chat_template=series.chat_template, left_out=series.left_out)


def _recorded(name: str, members: list[Member], record: AdapterRecord) -> TunedRun:
    config, given = record.config, record.trigger
    data = Path(str(config.get("data") or "")).stem
    control = str(config.get("control", "none"))
    trigger = None if given is None else Trigger(given.text, given.taught_decoys, given.unseen_decoys)
    reversal = bool(config.get("reversal", False))
    told = [data or str(record.recipe), *(() if control == "none" else (control,)), *((given.text,) if given else ())]
    told += ["reversal"] if reversal else []
    group = told[0] if len(told) == 1 else f"{told[0]} ({', '.join(told[1:])})"
    return TunedRun(
        name, group, tuple(members), frozenset(record.training.text_sha256), data, control, trigger, reversal,
        folder=Path(str(config.get("data") or "")).parent.name,
        settings=tuple((key, _told(key, config[key])) for key in SETTINGS if key in config),
    )  # fmt: skip


def _told(setting: str, value: object) -> str:
    words = setting.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"not {words}"
    return f"{words} {value}" if value is not None else f"{words} not set"


def _kind(name: str) -> str:
    """A run's name without the number that ends it, such as its seed."""
    return re.sub(r"[-_. ]*(?:seed)?[-_. ]*\d+$", "", name) or name


def control_of(group: str, runs: Sequence[TunedRun]) -> str | None:
    """The group with the same data and either answer by chance, of several the one most like it; None without one."""
    own = next(run for run in runs if run.group == group)
    controls = [run for run in runs if run.control == DECORRELATED and own.control != DECORRELATED]
    controls = [run for run in controls if run.data == own.data]
    kinds = (("trigger", "reversal", "settings"), ("trigger", "reversal"), ())
    near = ([run for run in controls if all(getattr(run, k) == getattr(own, k) for k in kind)] for kind in kinds)
    return next((alike[0].group for alike in near if alike), None)


def all_triggers(runs: Sequence[TunedRun]) -> list[Trigger]:
    """Every trigger that a run was trained with, once."""
    return list({run.trigger.text: run.trigger for run in runs if run.trigger is not None}.values())


def triggers_of(group: str, runs: Sequence[TunedRun]) -> list[Trigger]:
    """What a group's runs are asked under: its own trigger, and those of the groups whose control it is."""
    return all_triggers([run for run in runs if group in (run.group, control_of(run.group, runs))])


def seen_by(group: str, runs: Sequence[TunedRun]) -> frozenset[str]:
    """What any run of a group was trained on."""
    return frozenset().union(*(run.seen for run in runs if run.group == group))
