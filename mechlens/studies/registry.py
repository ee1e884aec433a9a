"""The commands there are: ours by name, and those of other packages by the entry point group `mechlens.studies`.

Nothing here imports torch, and neither may a study's configuration: `--help` is made from it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol, get_type_hints, runtime_checkable

from mechlens.errors import UserError, kind_of, warn
from mechlens.registry import Choice, Lazy, Registry
from mechlens.settings import such


@runtime_checkable
class Screen(Protocol):
    """Where a command that leaves nothing behind writes to."""

    def interactive(self) -> bool:
        """Whether somebody watches."""
        ...

    def show(self, value: object) -> None:
        """Text as it is, a dict as one line of JSON, all else as rich draws it."""
        ...

    def updating(self, value: object) -> AbstractContextManager[Callable[[object], None]]:
        """A part of the screen that is drawn anew with each value."""
        ...


@dataclass(frozen=True)
class Command:
    """A command that leaves nothing behind."""

    name: str
    """Its words on the command line, such as "positions" or "runs list"."""
    config: type
    """Frozen dataclass of its options, each with a docstring; its module imports no torch."""
    execute: Lazy
    """(config, screen): does it, and shows on the `Screen` what there is to see."""
    examples: tuple[str, ...] = ()
    """Whole command lines, which its `--help` ends with."""


@dataclass(frozen=True)
class Study:
    """A command that leaves a run folder; `mechlens.studies.driver` calls its three functions.

    >>> study = ml.Study("loudness", ml.Separate, "package.study:prepare", "package.study:execute")
    >>> study.verb
    'loudness'
    """

    name: str
    """Its words on the command line, such as "separate" or "guard fit"."""
    config: type
    """Frozen dataclass of its options, a `mechlens.settings.RunChoice`; its module imports no torch."""
    prepare: Lazy
    """(config) -> Prepared: reads and checks all that goes in; UserError before anything slow."""
    execute: Lazy
    """(config, content, writer) -> result: computes; finished pieces are kept in `writer.cache`."""
    report: Lazy | None = None
    """(writer, result, content): metrics, tables, figures and report.html; None where `execute` writes them."""
    examples: tuple[str, ...] = ()
    """Whole command lines, which its `--help` ends with."""

    @property
    def verb(self) -> str:
        """The name under which records know it."""
        return self.name.replace(" ", "_")


def of_folder(name: str, config: type, *examples: str, ending: str = "") -> Study:
    """A study whose functions stand in `study.py` and `report.py` beside its configuration."""
    folder = config.__module__.rpartition(".")[0]
    functions = (f"{folder}.study:prepare{ending}", f"{folder}.study:execute{ending}", f"{folder}.report:record")
    return Study(name, config, *functions, examples)


def _ours(**names: str) -> dict[str, Choice]:
    """Command by command where its Study or Command object is; `about` is its configuration's docstring."""
    return {
        name.replace("_", " "): Choice(f"mechlens.studies.{place}", "")
        for name, place in names.items()
    }  # fmt: skip


COMMANDS: Registry[Study | Command] = Registry(
    "command",
    "mechlens.studies",
    _ours(
        positions="positions.config:COMMAND",
        checkpoints="checkpoints.config:COMMAND",
        separate="separate.config:STUDY",
        direction="direction.config:STUDY",
        patch="patch.config:STUDY",
        select="select.config:STUDY",
        causal="causal.config:STUDY",
        guard_fit="guard.config:FIT",
        guard_eval="guard.config:EVAL",
        guard_predict="guard.config:PREDICT",
        jailbreaks="jailbreaks.config:STUDY",
        finetune="finetune.config:STUDY",
        track="track.config:STUDY",
        compare="compare.config:STUDY",
        behaviours="behaviours.config:STUDY",
        cliff="cliff.config:STUDY",
        sinks="sinks.config:STUDY",
        geometry="geometry.config:STUDY",
        steer="steer.config:COMMAND",
        steer_train="controllers.config:STUDY",
        directions_export="directions.config:EXPORT",
        directions_import="directions.config:IMPORT",
        sweep="sweep.config:COMMAND",
        runs_list="runs.config:LIST",
        runs_show="runs.config:SHOW",
        runs_compare="runs.config:COMPARE",
        runs_rerun="runs.config:RERUN",
        runs_index="runs.config:INDEX",
        runs_prune="runs.config:PRUNE",
        wandb_sync="wandb.config:SYNC",
        wandb_workspace="wandb.config:WORKSPACE",
        env="env.config:COMMAND",
    ),
)
"""In the order of `--help`."""
GROUPS = {
    "steer": "Answer a prompt with and without a direction; `steer train` fits a controller that decides per prompt.",
    "directions": "Take directions out to other tools, or in from them: export, import.",
    "guard": "Detect harmful prompts from the model's own representation: fit, eval, predict.",
    "wandb": "Upload what was logged offline, or save a view of the project.",
    "runs": "List, show, compare, rerun, index or prune recorded runs.",
}
"""What the first of two words stands for."""


@cache
def commands() -> Mapping[str, Study | Command]:
    """Every command by name; another package's that can't be used becomes one warning."""
    usable: dict[str, Study | Command] = {}
    for name in COMMANDS.names():
        try:
            command = COMMANDS[name]
            if name not in COMMANDS.ours:
                _require_usable(name, command, usable)
        except UserError as error:
            if name in COMMANDS.ours:
                raise
            warn(f"the command {name!r} can't be used: {error}")
        else:
            usable[name] = command
    return MappingProxyType(usable)


def _require_usable(name: str, command: Any, taken: Mapping[str, Study | Command]) -> None:
    """UserError for what is no command, or one whose runs could not be recorded."""
    if not isinstance(command, Study | Command):
        raise UserError(f"it is {kind_of(command)}, not a Study or a Command")
    if command.name != name or not re.fullmatch(r"[a-z][\w-]*( [a-z][\w-]*)?", name):
        raise UserError(
            f"its name is {command.name!r} and it is registered as {name!r}; give one name, of a word or two"
        )
    first, _, second = name.partition(" ")
    alike = [one for one in taken if name.replace(" ", "_") == one.replace(" ", "_")]
    alike += [one for one in taken if one == first or (not second and one.startswith(f"{first} "))]
    if alike:
        raise UserError(f"there is a command {alike[0]!r}; choose another name")
    if not (isinstance(command.config, type) and dataclasses.is_dataclass(command.config)):
        raise UserError("its configuration is no dataclass; inherit from mechlens.settings.RunChoice")
    if command.config in [known.config for known in taken.values()]:
        raise UserError(f"its configuration {command.config.__name__} is another command's; give it one of its own")
    try:
        get_type_hints(command.config, include_extras=True)
    except Exception as error:  # whatever an annotation of another package comes to
        raise UserError(f"its configuration {command.config.__name__} can't be read: {error}") from error
    fields = {field.name for field in dataclasses.fields(command.config)}
    missing = [name for name in ("out", "wandb") if isinstance(command, Study) and name not in fields]
    if missing:
        raise UserError(f"its configuration has no {missing[0]!r}; inherit from mechlens.settings.RunChoice")


def studies() -> dict[str, Study]:
    """Every recorded study by the name under which records know it."""
    return {study.verb: study for study in commands().values() if isinstance(study, Study)}


def study_of(config: object) -> Study:
    """The study whose configuration this is; UserError for anything else."""
    known = {study.config: study for study in studies().values()}
    if type(config) in known:
        return known[type(config)]
    meant = studies()[config].config if isinstance(config, str) and config in studies() else config
    if meant in list(known):
        given = f"the name {config!r}" if isinstance(config, str) else kind_of(config)
        raise UserError(f"{given} alone says no options; give a configuration, such as ml.{such(meant)}")
    names = [kind.__name__ for kind in known]
    raise UserError(
        f"{kind_of(config)} is no study's configuration; give one, such as ml.{such(next(iter(known)))}, or another "
        f"of {', '.join(names)}"
    )
