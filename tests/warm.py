"""A script in a process of its own, forked from one that has imported what takes seconds to import, and run nothing."""

import io
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import NamedTuple

_FORKED = multiprocessing.get_context("forkserver")
_STUDIES = [
    f"mechlens.studies.{name}.{part}" for name in ("separate", "finetune", "track") for part in ("study", "report")
]
_FORKED.set_forkserver_preload([*_STUDIES, "peft", "transformers.trainer", "transformers.models.llama.modeling_llama"])


class Ended(NamedTuple):
    """How a process ended, as `subprocess.run` tells it."""

    returncode: int
    stdout: str
    stderr: str


def python(code: str, *arguments: str) -> Ended:
    """What `python -c CODE ARGUMENTS` does, on one thread; not for tests of how an interpreter starts."""
    pipes = [_FORKED.Pipe(duplex=False) for _ in range(2)]
    process = _FORKED.Process(target=_run, args=(code, arguments, *(writer for _, writer in pipes)))
    process.start()
    for _, writer in pipes:
        writer.close()
    with ThreadPoolExecutor(2) as readers:
        said = list(readers.map(_all_of, [reader for reader, _ in pipes]))
    process.join()
    return Ended(process.exitcode, *said)


def _all_of(reader: Connection) -> str:
    with open(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as pipe:
        return pipe.read()


def _run(code: str, arguments: tuple[str, ...], *writers: Connection) -> None:
    import torch

    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
