"""The command line: parses, calls a verb, prints. Heavy imports come after the arguments are known to be good."""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO, Union

import tyro

from mechlens.config import (
    GROUPS,
    RECORDED,
    Checkpoints,
    Guard,
    GuardPredict,
    ListRuns,
    Positions,
    Rerun,
    Runs,
    ShowRun,
    Steer,
)
from mechlens.disk import TROUBLE
from mechlens.errors import UserError
from mechlens.files import is_whole, user_path

_ALONE = {name: config for name, config in RECORDED.items() if name.partition("_")[0] not in GROUPS}
VERBS: dict[str, Any] = {
    "positions": Positions,
    "checkpoints": Checkpoints,
    **_ALONE,
    **GROUPS,
    "steer": Steer,
    "runs": Runs,
}
"""Every verb's configuration, in the order of `--help`."""

Verb: Any = Union[tuple(Annotated[config, tyro.conf.subcommand(name)] for name, config in VERBS.items())]  # noqa: UP007


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mechlens`; exits with 1 and one sentence on an error that the user can mend."""
    try:
        _with_streams()
        _run(argv)
    except UserError as error:
        _say(str(error))
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough; the rest goes nowhere.
        _nowhere(sys.stdout)
    except OSError as error:
        if error.errno not in TROUBLE:
            raise
        _say(f"{error.filename or 'the output'} could not be written ({error.strerror}); make room, or write elsewhere")
        _nowhere(sys.stdout)
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from what is on disk")
        sys.exit(130)


_interruptions: list[int] = []


def interrupted(number: int, frame: FrameType | None) -> None:
    """Takes Ctrl-C. While we import a verb there is nothing to tidy, and what C extensions make of it is no error."""
    importer = None
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            importer = frame.f_back
        frame = frame.f_back
    if importer is not None and importer.f_code.co_filename == __file__:
        os.write(2, b"mechlens: stopped\n")
        os._exit(130)
    _interruptions.append(number)
    raise KeyboardInterrupt


def _run(argv: Sequence[str] | None) -> None:
    try:
        _require_whole(sys.argv[1:] if argv is None else argv)
        command: Any = tyro.cli(
            Verb,
            prog="mechlens",
            description="Directions at named positions, causal interventions and checkpoint tracking for chat models.",
            args=argv,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        warnings.showwarning = _one_line
        logging.raiseExceptions = False  # a library's log that finds the disk full is no traceback of ours
        if not sys.stderr.isatty():
            # Bars are for people who watch: in a log or a pipe, Hugging Face's would stand around the one line that
            # counts.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            _dispatch(_with_paths(command))
        except Exception as error:
            if _interruptions:  # an import, or a library, made an error of its own of it
                raise KeyboardInterrupt from error
            raise
    finally:
        # What is still held back may not fit; at the interpreter's end that would be a traceback.
        sys.stdout.flush()


def _with_streams() -> None:
    """Streams that were closed before we began lead nowhere, and no character is one that they can't take."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _nowhere(stream: TextIO) -> None:
    """Whatever the stream still holds back is dropped at the end, not complained about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(sentence: str) -> None:
    """One line for the user, if anybody can hear it."""
    try:
        print(f"mechlens: {sentence}", file=sys.stderr, flush=True)
    except OSError:
        _nowhere(sys.stderr)


def _console() -> Any:
    """rich's console, which leaves a closed pipe to `main`, so that every verb ends alike."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Plain()


def _print_json(value: object) -> None:
    """One line, in characters that the stream can take."""
    wide = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not wide, allow_nan=False), flush=True)


def _require_whole(argv: Sequence[str]) -> None:
    """UserError for an argument that isn't UTF-8: it could go into no table, record or tokenizer."""
    for place, argument in enumerate(argv, start=1):
        if not is_whole(argument):
            raise UserError(f"argument {place} ({argument!r:.60}) isn't UTF-8; write it in UTF-8")


def _with_paths(command: Any) -> Any:
    """The command with ~ resolved in its paths; UserError, before anything slow, for what can be no path."""
    if isinstance(command, Runs | Guard):
        return replace(command, action=_with_paths(command.action))
    given = {field.name: getattr(command, field.name) for field in fields(command)}
    return replace(command, **{name: user_path(value) for name, value in given.items() if isinstance(value, Path)})


def _one_line(message: Any, category: type[Warning], *where: object, **more: object) -> None:
    """Warnings of ours as one line; those of libraries are for developers."""
    if issubclass(category, UserWarning):
        _say(f"warning: {message}")


def _dispatch(command: Any) -> None:
    recorded = {config: name for name, config in RECORDED.items()}
    if type(command) in GROUPS.values():
        command = command.action
    if type(command) in recorded:
        _finished(import_module(f"mechlens.verbs.{recorded[type(command)]}").run(command))
    elif isinstance(command, Positions):
        _positions(command)
    elif isinstance(command, Checkpoints):
        _checkpoints(command)
    elif isinstance(command, GuardPredict):
        _predict(command)
    elif isinstance(command, Steer):
        _steer(command)
    elif isinstance(command, Runs):
        _runs(command.action)


def _runs(action: ListRuns | ShowRun | Rerun) -> None:
    if isinstance(action, ListRuns):
        _list_runs(action)
    elif isinstance(action, ShowRun):
        _show_run(action.folder)
    else:
        _rerun(action)


def _positions(command: Positions) -> None:
    from mechlens.verbs.positions import named_tokens

    tokens = named_tokens(command)
    if command.json:
        _print_json({"model": command.model, "tokens": tokens})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("index", "id", "token", "role")
    for token in tokens:
        style = {"inst": "bold green"}.get(token["role"], "cyan" if token["role"].startswith("post") else "")
        shown = Text(repr(token["token"])[1:-1], style=style)
        table.add_row(str(token["index"]), str(token["id"]), shown, Text(token["role"], style=style))
    _console().print(table)


def _checkpoints(command: Checkpoints) -> None:
    from mechlens.verbs.checkpoints import series_rows

    found = series_rows(command)
    if command.json:
        _print_json(found)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("step", "name", "kind", "where", title=f"steps from {found['steps_from']}")
    for one in found["members"]:
        revision = f"@{one['revision']}" if one["revision"] else ""
        table.add_row(str(one["step"]), *(Text(x) for x in (one["name"], one["kind"], f"{one['path']}{revision}")))
    _console().print(table)
    for one in found["left_out"]:
        _console().print(Text(f"left out: {one['name']}: {one['reason']}"), soft_wrap=True)


def _predict(command: GuardPredict) -> None:
    """One JSON object a line, each as soon as it is there: a pipe's reader shouldn't wait for the next ones."""
    from mechlens.verbs.guard_predict import predict

    for record in predict(command):
        _print_json(record)


def _steer(command: Steer) -> None:
    """Both answers beside each other as they are written; in a pipe one after the other, once they are there."""
    from mechlens.verbs.steer import steer

    if not sys.stdout.isatty():
        found = steer(command)
        print(f"unsteered:\n{found.unsteered}\n\nsteered ({found.what}):\n{found.steered}")
        return
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    said = {"unsteered": "", "steered": ""}

    def beside() -> Table:
        table = Table("unsteered", "steered", expand=True)
        table.add_row(*(Text(text) for text in said.values()))
        return table

    with Live(beside(), vertical_overflow="visible") as live:

        def told(name: str, text: str) -> None:
            said[name] = text
            live.update(beside())

        found = steer(command, told)
    print(found.what)


def _finished(folder: Path) -> None:
    """Metrics, verdict and where the report is."""
    from mechlens.records.run import read_run

    run = read_run(folder)
    for name, estimate in run.metrics.items():
        print(f"{name:40s} {_said_of(name, estimate)}")
    print(f"\n{run.verdict}" if run.verdict else "")
    print(f"report: {(folder / 'report.html').resolve()}")


def _said_of(name: str, value: object) -> str:
    """A count is a number of prompts or checkpoints out of all; it has no interval."""
    from mechlens.methods.estimate import Estimate

    if isinstance(value, Estimate) and name.startswith(("n.", "candidates.")):
        return f"{value.value:.0f} of {value.n}"
    return str(value)


def _list_runs(command: ListRuns) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from mechlens.records.run import list_runs

    table = Table(Column("folder", overflow="fold"), "verb", "model", "status", Column("started (UTC)", no_wrap=True))
    for folder, run in list_runs(command.folder):
        model = run.resolved.get("model") or run.resolved.get("base") or ""
        cells = (str(folder), run.verb, str(model), run.status, run.started[:16].replace("T", " "))
        table.add_row(*(Text(cell) for cell in cells))  # a name may look like rich's markup
    _console().print(table)


def _show_run(folder: Path) -> None:
    from mechlens.records.run import read_run

    run = read_run(folder)
    print(f"{run.id}: {run.verb}, {run.status}, started {run.started}, finished {run.finished}")
    if run.error:
        print(f"error: {run.error}")
    inputs = run.inputs.data | ({"today, as the template prints it": run.inputs.today} if run.inputs.today else {})
    for title, values in (("configuration", run.resolved), ("metrics", run.metrics), ("inputs", inputs)):
        print(f"\n{title}")
        for name, value in values.items():
            print(f"  {name:40s} {_said_of(name, value)}")
    for name, artefact in run.artefacts.items():
        print(f"  {name:40s} {artefact.file} sha256 {artefact.sha256[:12]}")


def _rerun(command: Rerun) -> None:
    from mechlens.verbs.rerun import rerun

    compared = rerun(command)
    print(f"largest difference: {compared.difference:.3g} in {compared.name}")
    if compared.difference > 1e-6:
        _say("the numbers differ by more than 1e-6")
        sys.exit(1)


if __name__ == "__main__":
    main()
