"""Any input ends in what it says or in one sentence: no traceback, no hang, no row lost in silence.

    python scripts/fuzz_inputs.py [--cases 10000] [--kinds rows positions ...] [--seed 0]

Every case is drawn by its kind and number, so that `--kinds KIND --seed N --cases 1` makes it again. What each kind
must hold stands in `fuzz_kinds`; a fault is printed, and a table says what was tried, read, refused and found.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")

from fuzz_kinds import KINDS, Fault, World

from mechlens.errors import UserError
from mechlens.files import is_whole

SECONDS = 30
"""A case that takes more processor time hangs, and one that takes ten times as much by the clock."""
LONGEST_SENTENCE = 2500


@dataclass(frozen=True)
class Case:
    """One input and what came of it."""

    kind: str
    number: int
    outcome: str
    """read, refused, or found."""
    said: str
    seconds: float


def tried(kind: str, number: int, world: World) -> Case:
    """Makes one input and holds what happens to the laws of its kind."""
    began = time.process_time()
    for number_of, timer, seconds in ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
                                      (signal.SIGALRM, signal.ITIMER_REAL, 10 * SECONDS)):  # fmt: skip
        signal.signal(number_of, _hang)
        signal.setitimer(timer, seconds)
    try:
        KINDS[kind](random.Random(f"{kind} {number}"), world)
        outcome, said = "read", ""
    except UserError as error:
        said = unclear(error)
        outcome = "found" if said else "refused"
    except Fault as error:
        outcome, said = "found", str(error)
    except (Exception, SystemExit) as error:
        outcome, said = "found", f"{type(error).__name__}: {str(error)[:300]!r} at {_where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return Case(kind, number, outcome, said, time.process_time() - began)


def _hang(*_: Any) -> None:
    raise Fault(f"this hangs for {SECONDS} seconds")


def _where(error: BaseException) -> str:
    """The last line of ours that it went through."""
    places, frame = [], error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno}")
        frame = frame.tb_next
    return " < ".join(reversed(places[-4:]))


def unclear(error: UserError) -> str:
    """What is wrong with a sentence; "" for one that can be read."""
    said = error.typed
    if not is_whole(said) or "\n" in said or not said.isprintable():
        return f"a sentence that can't be printed: {said[:300]!r}"
    if not 8 < len(said) <= LONGEST_SENTENCE:
        return f"a sentence of {len(said)} characters: {said[:300]!r}"
    return ""


def run(kinds: Sequence[str], numbers: Sequence[int], folder: Path, tell: Callable[[Case], None]) -> list[Case]:
    """Every number once, its kind in turn."""
    world = World(folder)
    cases = []
    for number in numbers:
        cases.append(tried(kinds[number % len(kinds)], number, world))
        if cases[-1].outcome == "found":
            tell(cases[-1])
    return cases


def table(cases: Sequence[Case]) -> str:
    """A row a kind: how many were tried, read, refused in a sentence, found."""
    counted = Counter((case.kind, case.outcome) for case in cases)
    rows = []
    for kind in [*dict.fromkeys(case.kind for case in cases)]:
        own = [counted[kind, outcome] for outcome in ("read", "refused", "found")]
        slowest = max(case.seconds for case in cases if case.kind == kind)
        rows.append(f"| {kind} | {sum(own)} | {' | '.join(map(str, own))} | {slowest:.1f} |")
    head = [
        "| kind | tried | read | refused in a sentence | found | slowest (processor seconds) |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def _print(case: Case) -> None:
    print(f"{case.kind} {case.number}: {case.said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        numbers = range(given.seed, given.seed + given.cases)
        cases = run(given.kinds, numbers, Path(scratch), _print)
    print(table(cases))


if __name__ == "__main__":
    main()
