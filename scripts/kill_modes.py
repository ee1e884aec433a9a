"""What can happen to a run: each mode disturbs one process at a random moment, from inside or from outside."""

import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_process import Process

CAPABILITIES = 0x20080522
"""The version of the kernel's records of them."""
PASSING_OVER = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run of the same command took."""

    out: Path
    seconds: float
    """Processor time."""
    writes: int
    """Files put in place."""
    size: int
    """Kilobytes of its folder while it ran."""


@dataclass(frozen=True)
class Mode:
    """One kind of trouble."""

    outside: Callable[[random.Random, Process, Whole], bool] | None = None
    """Done to the process while it runs; False where it had ended by then."""
    inside: Callable[[random.Random, Whole], None] | None = None
    """Done in the process before the command."""
    after: Callable[[random.Random, Path], bool] | None = None
    """Done to its folder when it has ended; False where there was nothing to do it to."""
    disk: Callable[[random.Random, Path, Whole], Any] | None = None
    """A context in which it runs: the disk below its folder."""
    ends: tuple[int, ...] = (0,)
    """Exit codes with which the disturbed process may end."""
    wandb: str = "disabled"
    again: bool = True
    """The same command is given again, as the disturbed process need not have come to its end."""


def signalled(number: int) -> Callable[[random.Random, Process, Whole], bool]:
    """A signal at a moment drawn uniformly over the run's processor time."""

    def disturb(draw: random.Random, process: Process, whole: Whole) -> bool:
        there = process.wait_until(draw.random(), whole.seconds)
        process.send(number)
        return there

    return disturb


def _dying_at_a_write(draw: random.Random, whole: Whole) -> None:
    """Dies just before or after a file is put in place, or with half of it written."""
    at, how = draw.randrange(whole.writes), draw.choice(("before", "after", "half"))
    real, count = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        count[0] += 1
        if count[0] - 1 != at:
            real(source, target)
            return
        if how == "half" and Path(source).is_file():
            os.truncate(source, Path(source).stat().st_size // 2)
        if how == "after":
            real(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def _jumping_clock(draw: random.Random, whole: Whole) -> None:
    """The wall clock jumps by up to ten years, forth or back, a few times in the run; what counts seconds goes on."""
    import mechlens.runs.writer as writer

    real, began = time.time, time.process_time()
    jumps = sorted((draw.random() * whole.seconds, draw.choice((-1, 1)) * 10 ** draw.uniform(0, 8.5)) for _ in range(4))

    def jumped() -> float:
        gone = time.process_time() - began
        return real() + sum(by for at, by in jumps if at <= gone)

    class Clock(writer.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return writer.datetime.fromtimestamp(jumped(), tz)

    time.time = jumped
    writer.datetime = Clock  # type: ignore[attr-defined, misc]


def _bound_by_permissions(draw: random.Random, whole: Whole) -> None:
    """Permissions don't stop root, unless it gives up the right to pass over them."""
    if os.getuid() != 0:
        return
    libc = ctypes.CDLL(None)
    header, held = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, held)
    for of in (0, 1):  # effective and permitted
        held[of] &= ~PASSING_OVER
    if libc.capset(header, held):
        raise PermissionError("capset")


def _revoked(draw: random.Random, process: Process, whole: Whole) -> bool:
    there = process.wait_until(draw.random(), whole.seconds)
    out = process.out
    for folder in [out, *(path for path in out.rglob("*") if path.is_dir())] if out.exists() else []:
        folder.chmod(0o500)
    return there


def _granted(draw: random.Random, out: Path) -> bool:
    for folder in [out, *(path for path in out.rglob("*") if path.is_dir())] if out.exists() else []:
        folder.chmod(0o777)
    return True


def _deafened(draw: random.Random, process: Process, whole: Whole) -> bool:
    there = process.wait_until(draw.random(), whole.seconds)
    process.deafen()
    return there


def _flipped(draw: random.Random, out: Path) -> bool:
    """One bit of one piece on the cache."""
    pieces = sorted((out / "cache").rglob("*.safetensors"))
    if not pieces:
        return False
    path = draw.choice(pieces)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return True


def _without_wandb(draw: random.Random, process: Process, whole: Whole) -> bool:
    """Its W&B process is killed."""
    there = process.wait_until(draw.random(), whole.seconds)
    for pid in process.started():
        try:
            if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    return there


@contextmanager
def _small_disk(draw: random.Random, folder: Path, whole: Whole) -> Iterator[None]:
    """A disk that fills up before the run is done, then has room again; needs the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    size = draw.randint(16, max(17, whole.size))
    _mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder))
    try:
        yield
        _mount("-o", f"remount,size={2 * whole.size + 100_000}k", str(folder))
    except BaseException:
        unmount(folder)
        raise


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    """Takes a small disk away again."""
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


MODES: dict[str, Mode] = {
    "kill": Mode(signalled(signal.SIGKILL), ends=(0, -signal.SIGKILL)),
    "write": Mode(inside=_dying_at_a_write, ends=(0, -signal.SIGKILL)),
    "term": Mode(signalled(signal.SIGTERM), ends=(0, -signal.SIGTERM)),
    "int": Mode(signalled(signal.SIGINT), ends=(0, 130)),
    "flip": Mode(signalled(signal.SIGKILL), after=_flipped, ends=(0, -signal.SIGKILL)),
    "disk": Mode(disk=_small_disk, ends=(0, 1)),
    "permission": Mode(_revoked, inside=_bound_by_permissions, after=_granted, ends=(0, 1)),
    "stdout": Mode(_deafened, ends=(0, 1)),
    "clock": Mode(inside=_jumping_clock, again=False),
    "wandb": Mode(_without_wandb, wandb="offline", again=False),
}
"""`two`, which needs a second process, stands in `kill_runs`."""
