"""The training runs that are compared: checkpoints by step, what each was trained on, and which are of one kind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.checkpoints.adapter_record import RECORD, AdapterRecord, read_record
from mechlens.models.checkpoints.series import Member, checkpoint_series
from mechlens.studies.shared.training_data import Trigger

FINAL = "adapter"
"""The folder of a run's result, beside its checkpoints."""
DECORRELATED, REMOVAL = "decorrelated", "removal"


@dataclass(frozen=True)
class TunedRun:
    """One training run."""

    name: str
    group: str
    """What runs have in common that differ in their seed only."""
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


def tuned_runs(base: str, sources: Sequence[str], revision: str | None) -> list[TunedRun]:
    """Each source's run; UserError where one holds none, or two have one name."""
    found = [_run(base, source, revision) for source in sources]
    names = [run.name for run in found]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(f"two of the training runs are called {again!r}; give folders with names of their own")
    return found


def _run(base: str, source: str, revision: str | None) -> TunedRun:
    folder = user_path(source)
    series = checkpoint_series(base, [source], revision=revision)
    members = list(series.members[1:])
    result = folder / FINAL
    if (result / RECORD).exists():
        (last,) = checkpoint_series(base, [str(result)], revision=revision).members[1:]
        members = [member for member in members if member.step != last.step] + [last]
    record = read_record(user_path(members[-1].path)) if user_path(members[-1].path).is_dir() else None
    name = folder.parent.name if folder.name == FINAL else (folder.name if folder.exists() else source)
    named = [replace(member, name=f"{name}, step {member.step}") for member in sorted(members, key=lambda m: m.step)]
    if record is None or record.recipe is None:
        return TunedRun(name, _kind(name), tuple(named), frozenset(), "", "none", None, False, series.chat_template)
    return replace(_recorded(name, named, record), chat_template=series.chat_template)


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
        name, group, tuple(members), frozenset(record.training.text_sha256), data, control, trigger, reversal
    )


def _kind(name: str) -> str:
    """A run's name without the number that ends it, such as its seed."""
    return re.sub(r"[-_. ]*(?:seed)?[-_. ]*\d+$", "", name) or name


def control_of(group: str, runs: Sequence[TunedRun]) -> str | None:
    """The group with the same data, trigger and reversal, and either answer by chance; None where there is none."""
    own = next(run for run in runs if run.group == group)
    controls = [run for run in runs if run.control == DECORRELATED and own.control != DECORRELATED]
    kind = own.data, own.trigger, own.reversal
    alike = [run for run in controls if (run.data, run.trigger, run.reversal) == kind]
    alike = alike or [run for run in controls if run.data == own.data]
    return alike[0].group if alike else None


def trigger_among(runs: Sequence[TunedRun]) -> Trigger | None:
    """The trigger that a run was trained with, the first one's; None where none was."""
    return next((run.trigger for run in runs if run.trigger is not None), None)


def triggers_of(group: str, runs: Sequence[TunedRun]) -> list[Trigger]:
    """What a group's runs are asked under: its own trigger, and those of the groups whose control it is."""
    own = [run.trigger for run in runs if run.trigger is not None and group in (run.group, control_of(run.group, runs))]
    return list({trigger.text: trigger for trigger in own}.values())


def seen_by(group: str, runs: Sequence[TunedRun]) -> frozenset[str]:
    """What any run of a group was trained on."""
    return frozenset().union(*(run.seen for run in runs if run.group == group))
