"""A command in a process of its own, forked from one that has imported everything and run nothing; Linux only."""

import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mechlens.registry import loaded
from mechlens.studies.registry import studies

LONGEST = 900.0
"""Seconds after which a command hangs."""
LINGERS = 10.0
"""Seconds in which what a process had started must be gone after its end."""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    code: int
    """Exit code; negative is the signal that ended it."""
    stderr: str
    left: int
    """Processes that it had started and that outlived it."""

    @property
    def trouble(self) -> str:
        """What no command may end in; "" where it ended well, by a signal, or in one sentence."""
        if "Traceback" in self.stderr or "Fatal Python error" in self.stderr:
            return f"a traceback: {(self.stderr.strip().splitlines() or ['?'])[-1]}"
        if self.left:
            return f"{self.left} processes left"
        lines = [line for line in self.stderr.splitlines() if line.startswith("mechlens: ")]
        said = [line for line in lines if not line.startswith("mechlens: warning: ")]
        if self.code == 1 and len(said) != 1:
            return f"exit 1 with {len(said)} sentences: {self.stderr[-300:]!r}"
        return "" if self.code <= 1 or self.code == 130 else f"exit {self.code}: {self.stderr[-300:]!r}"


def preload() -> None:
    """Imports what studies import, so that a process costs nothing to begin."""
    for study in studies().values():
        for name in filter(None, (study.prepare, study.execute, study.report)):
            loaded(name)
    for module in ("peft", "transformers.trainer", "transformers.models.llama.modeling_llama", "sklearn.linear_model",
                   "transformers.models.gpt2.modeling_gpt2", "plotly.graph_objects", "pandas.io.parquet"):  # fmt: skip
        importlib.import_module(module)


class Process:
    """A forked process that does one thing, its errors in a file."""

    def __init__(self, do: Callable[[], object], errors: Path, out: Path = Path(".")) -> None:
        self._errors, self.out = errors, out
        errors.unlink(missing_ok=True)
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _child(do, errors, writer)
        os.close(writer)
        os.set_blocking(self.reader, False)
        self._status: int | None = None

    def seconds(self) -> float:
        """Processor time that it has used."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICK

    def runs(self) -> bool:
        """Whether it has not ended yet; reads what it prints."""
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if done else None
        try:
            while os.read(self.reader, 1 << 16):
                pass
        except OSError:
            pass  # nothing to read now, or no longer ours
        return self._status is None

    def wait_until(self, share: float, whole: float) -> bool:
        """Waits for that share of a whole run's processor time; False where it ended before."""
        while self.runs():
            if self.seconds() >= share * whole:
                return True
            time.sleep(0.004)
        return False

    def send(self, number: int) -> None:
        """A signal to this process alone."""
        if self.runs():
            os.kill(self.pid, number)

    def deafen(self) -> None:
        """Nobody reads what it prints any more."""
        os.close(self.reader)
        self.reader = -1

    def started(self) -> list[int]:
        """Processes of its session other than itself."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != self.pid:
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(folder.name))
        return found

    def end(self) -> Ended:
        """Waits for its end, and for that of what it started."""
        began = time.monotonic()
        while self.runs():
            if time.monotonic() - began > LONGEST:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} hangs: {self._errors.read_text(errors='replace')[-500:]}")
            time.sleep(0.01)
        assert self._status is not None
        ended = time.monotonic()
        while (left := self.started()) and time.monotonic() - ended < LINGERS:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if self.reader >= 0:
            os.close(self.reader)
        code = os.waitstatus_to_exitcode(self._status)
        return Ended(code, self._errors.read_text(encoding="utf-8", errors="replace"), len(left))


def _child(do: Callable[[], object], errors: Path, writer: int) -> None:
    """Never comes back."""
    code = 1
    try:
        os.setsid()
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, writer), (2, handle)):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False), line_buffering=True) for number in (1, 2)
        )
        do()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stderr.flush()
            sys.stdout.flush()
        except OSError:
            code = code or 120
        os._exit(code)


def done(do: Callable[[], object], errors: Path) -> Ended:
    """How a process ends that nobody disturbs."""
    return Process(do, errors).end()


def command(words: Sequence[str]) -> Callable[[], None]:
    """What `mechlens` does with these words, as the entry point does it."""

    def run() -> None:
        import torch

        from mechlens import cli

        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, cli.interrupted)
        sys.argv = ["mechlens", *words]
        cli.main(list(words))

    return run
