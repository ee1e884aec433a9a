"""The command line: parses, runs a command, prints. Heavy imports come after the arguments are known to be good."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, TextIO, Union, get_type_hints

import tyro

from mechlens import registry
from mechlens.choices import require_known
from mechlens.errors import UserError, quoted
from mechlens.files import TROUBLE, is_whole
from mechlens.studies.mistyped import command_of, what_is_wrong
from mechlens.studies.possible import require_possible, with_paths
from mechlens.studies.registry import GROUPS, Command, Study, commands

ABOUT = "Directions at named positions, causal interventions and checkpoint tracking for chat models."


def parser_type(known: Mapping[str, Study | Command]) -> Any:
    """Every command's configuration as one union that tyro reads; commands of two words below their first."""
    outer: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, command in known.items():
        first, _, second = name.partition(" ")
        outer[first] = command.config
        if second:
            groups.setdefault(first, {})[second] = command.config
    for first, inner in groups.items():
        group = dataclasses.make_dataclass(first.title(), [(first, _union(inner))], frozen=True, kw_only=True)
        group.__doc__ = GROUPS.get(first, f"{', '.join(inner)}.")
        outer[first] = group
    return _union(outer)


def _union(configs: Mapping[str, Any]) -> Any:
    named = ((config, tyro.conf.subcommand(name, description=_about(config))) for name, config in configs.items())
    return Union[tuple(Annotated[config, command] for config, command in named)]  # noqa: UP007


def _about(config: Any) -> str:
    """What the command does, from its configuration's docstring; the example after it is for Python."""
    about, _, _ = (config.__doc__ or "").partition(">>>")
    return inspect.cleandoc(about)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mechlens`; an error that the user can mend is one sentence.

    Exits with 2 where a command or an option can't be what was typed, and with 1 where what was asked for can't be had.
    """
    try:
        _with_streams()
        with _in_a_sentence(exit_code=1):
            _run(sys.argv[1:] if argv is None else argv)
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


@contextlib.contextmanager
def _in_a_sentence(exit_code: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _say(error.typed)
        sys.exit(exit_code)


_interruptions: list[int] = []


def interrupted(number: int, frame: FrameType | None) -> None:
    """Takes Ctrl-C. While we import a command there is nothing to tidy, and what C code makes of it is no error."""
    importer = None
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            importer = frame.f_back
        frame = frame.f_back
    if importer is not None and importer.f_code.co_filename in (__file__, registry.__file__):
        os.write(2, b"mechlens: stopped\n")
        os._exit(130)
    _interruptions.append(number)
    raise KeyboardInterrupt


def _run(argv: Sequence[str]) -> None:
    try:
        warnings.showwarning = functools.partial(_one_line, set())
        if list(argv) == ["--version"]:
            print(f"mechlens {version('mechlens-toolkit')}")
            return
        known = commands()
        with _in_a_sentence(exit_code=2), _with_examples(argv, known):
            _require_whole(argv)
            config = _parsed(argv, known)
        logging.raiseExceptions = False  # a library's log that finds the disk full is no traceback of ours
        if not sys.stderr.isatty():
            # Bars are for people who watch: in a log or a pipe, Hugging Face's would stand around the one line that
            # counts.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        by_config = {command.config: command for command in known.values()}
        if type(config) not in by_config:  # a command of two words, in a group that is named as its one field
            config = getattr(config, fields(config)[0].name)
        config = with_paths(config)
        try:
            _dispatch(by_config[type(config)], config)
        except Exception as error:
            if _interruptions:  # an import, or a library, made an error of its own of it
                raise KeyboardInterrupt from error
            raise
    finally:
        # What is still held back may not fit; at the interpreter's end that would be a traceback.
        sys.stdout.flush()


def _parsed(argv: Sequence[str], known: Mapping[str, Study | Command]) -> Any:
    """What the arguments say; where they name a command, no other's options are thought of."""
    words = command_of(argv, known)
    shape, about = (known[words].config, _about(known[words].config)) if words else (parser_type(known), ABOUT)
    rest = list(argv)[len(words.split()) :]

    def parse() -> Any:
        unprefixed = (tyro.conf.OmitSubcommandPrefixes,)
        return tyro.cli(shape, prog=f"mechlens {words}".strip(), description=about, args=rest, config=unprefixed)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            raise
        if (ours := _of_ours(stop)) is not None:  # which the parser would put into a box
            raise ours from None
    options = [f"--{one.name.replace('_', '-')}" for one in fields(shape)] if words else []
    hints = get_type_hints(shape, include_extras=True) if words else {}
    places = [name for name, hint in hints.items() if _is_bare(hint)]
    group = next((one for one in argv[:1] if not one.startswith("-")), "")  # of which no command was named
    if sentence := what_is_wrong(said.getvalue(), rest, words or group, options, places):
        raise UserError(sentence)
    return parse()  # which ends in what it has to say, in its own colours


def _is_bare(hint: Any) -> bool:
    """Whether an option stands without its name."""
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _of_ours(error: BaseException | None) -> UserError | None:
    """What a configuration said of its options, on the way to the parser's end."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


@contextlib.contextmanager
def _with_examples(argv: Sequence[str], known: Mapping[str, Study | Command]) -> Iterator[None]:
    """Ends the `--help` of a command, or of a group of them, with command lines to copy."""
    try:
        yield
    except SystemExit as stop:
        words = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        if not stop.code and words and {"--help", "-h"} & set(argv):
            alike = [
                one for name, one in known.items() if f"{words} ".startswith(f"{name} ") or name.startswith(f"{words} ")
            ]
            print("\nexamples:", *(line for one in alike for line in one.examples), sep="\n  ")
        raise


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


def _require_whole(argv: Sequence[str]) -> None:
    """UserError for an argument that isn't UTF-8: it could go into no table, record or tokenizer."""
    for place, argument in enumerate(argv, start=1):
        if not is_whole(argument):
            raise UserError(f"argument {place} ({quoted(argument)}) isn't UTF-8; write it in UTF-8")


def _one_line(told: set[str], message: Any, category: type[Warning], *where: object, **more: object) -> None:
    """Warnings of ours as one line, each said once; those of libraries are for developers."""
    if issubclass(category, UserWarning) and str(message) not in told:
        told.add(str(message))
        _say(f"warning: {message}")


def _dispatch(command: Study | Command, config: Any) -> None:
    require_possible(config)
    require_known(config)
    if isinstance(command, Command):
        registry.loaded(command.execute)(config, Terminal())
        return
    from mechlens.studies.driver import run, summary

    print(summary(run(config).folder))


@dataclass(frozen=True)
class Terminal:
    """Where commands write to: a `mechlens.studies.registry.Screen`."""

    def interactive(self) -> bool:
        """Whether somebody watches."""
        return sys.stdout.isatty()

    def show(self, value: object) -> None:
        """Text as it is, a dict as one line of JSON, in characters that the stream can take, all else by rich."""
        if isinstance(value, str):
            print(value)
        elif isinstance(value, dict):
            wide = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
            print(json.dumps(value, ensure_ascii=not wide, allow_nan=False), flush=True)
        else:
            _console().print(value, soft_wrap=not hasattr(value, "columns"))

    @contextlib.contextmanager
    def updating(self, value: object) -> Iterator[Callable[[object], None]]:
        """A part of the screen that is drawn anew with each value."""
        from rich.live import Live

        live: Any
        with Live(value, console=_console(), vertical_overflow="visible") as live:  # type: ignore[arg-type]
            yield live.update


def _console() -> Any:
    """rich's console, which leaves a closed pipe to `main`, so that every command ends alike."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Plain()


if __name__ == "__main__":
    main()
