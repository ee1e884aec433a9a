"""Disturbs every recorded study at random moments, gives the same command again, and compares all that it wrote.

    python scripts/kill_runs.py [--rounds 10] [--kills 3] [--study NAME ...] [--modes kill write ...] [--log FILE]

Each study runs on a tiny random model (`kill_subjects`), twice undisturbed: what differs between these two is no fault
of a kill, and is said. Then every round disturbs one run (`kill_modes`), `--kills` times where it is killed, and the
same command ends it. Its tables, metrics, words, figures and artefacts must be those of the undisturbed run, bit for
bit; nothing half-written and no process may be left, and what a command says must be one sentence. Linux only.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_SILENT="true")

import pandas as pd
from kill_modes import MODES, Mode, Whole, unmount
from kill_process import Ended, Process, command, done, preload
from kill_subjects import STUDIES, Subjects
from safetensors import SafetensorError
from safetensors.torch import load_file

TWO = "two"
KILLED = ("kill", "write", "term", "int")
"""Modes that may hit one run several times."""


@dataclass(frozen=True)
class Trial:
    """One disturbed run and what came of it."""

    study: str
    mode: str
    seed: int
    hits: int
    """Times it was disturbed before it had ended."""
    found: str
    """What was wrong in the end; "" for a run that survived."""


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between two run folders, apart from times, identities and the machine."""
    found = []
    a, b = (json.loads((out / "run.json").read_text(encoding="utf-8")) for out in (whole, other))
    for name in ("status", "error", "metrics", "verdict", "headline", "words", "inputs", "resolved", "seed"):
        if a.get(name) != b.get(name):
            found.append(f"{name} of run.json: {_first_difference(a.get(name), b.get(name))}")
    for name in ("tables", "figures", "artefacts"):
        if list(a.get(name, {})) != list(b.get(name, {})):
            found.append(f"the names of {name}: {list(a.get(name, {}))} and {list(b.get(name, {}))}")
    ours, theirs = (_files(out) for out in (whole, other))
    found += [f"{name} is in one folder only" for name in sorted(ours ^ theirs)]
    found += [f"{name} differs" for name in sorted(ours & theirs) if not _same(whole / name, other / name)]
    return found


def _first_difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        name = next((key for key in [*a, *b] if a.get(key) != b.get(key)), "")
        return f"{name}: {_first_difference(a.get(name), b.get(name))}"
    return f"{str(a)[:120]} and {str(b)[:120]}"


def _files(out: Path) -> set[str]:
    skipped = ("wandb", "cache")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in names if name.partition("/")[0] not in skipped and name != ".lock"}


def _same(a: Path, b: Path) -> bool:
    """Whether two files hold the same; a report and run.json hold times and are compared by what they are made of."""
    if a.name in ("run.json", "report.html"):
        return True
    if a.read_bytes() == b.read_bytes():
        return True
    if a.suffix == ".parquet":
        return pd.read_parquet(a).equals(pd.read_parquet(b))
    if a.suffix == ".safetensors":  # whose entries come in an order that changes
        try:
            ours, theirs = load_file(a), load_file(b)
        except SafetensorError:
            return False
        return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    return False


class Killer:
    """One study: its command, its undisturbed run, and trials of it."""

    def __init__(self, study: str, folder: Path, *, control: bool = True) -> None:
        self.study, self.folder = study, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = self._undisturbed(folder / "whole")
        self.found: list[str] = []
        """What differs between two undisturbed runs, which no kill is to blame for."""
        if control:
            again = self._undisturbed(folder / "again")
            self.found = differences(self.whole.out, again.out)
            shutil.rmtree(again.out)

    def words(self, out: Path, wandb: str = "disabled") -> list[str]:
        """The command line that writes to `out`; what it reads was made before."""
        kept = self.folder.parent / f"{self.study}.words.json"
        if not kept.exists():
            self._require(done(lambda: _keep(kept, self.study), self.folder / "errors.txt"))
        marked: list[str] = json.loads(kept.read_text())
        return [{"OUT": str(out), "WANDB": wandb}.get(word, word) for word in marked]

    def _undisturbed(self, out: Path) -> Whole:
        shutil.rmtree(out, ignore_errors=True)
        told = self.folder / "told.json"
        do = command(self.words(out))
        self._require(done(lambda: _measured(do, out, told), self.folder / "errors.txt"))
        return Whole(out, **json.loads(told.read_text()))

    def _require(self, ended: Ended) -> None:
        if ended.code or ended.trouble:
            raise SystemExit(f"{self.study} does not run undisturbed: {ended.trouble or ended.stderr[-2000:]}")

    def trial(self, mode: str, seed: int, kills: int) -> Trial:
        """Disturbs a run, ends it, and compares."""
        draw = random.Random(f"{self.study} {mode} {seed}")
        disk = self.folder / "disk"
        out = (disk if mode == "disk" else self.folder) / "out"
        shutil.rmtree(out, ignore_errors=True)
        hits, found = 0, ""
        try:
            if mode == TWO:
                hits, found = self._two(draw, out)
            else:
                for _ in range(kills if mode in KILLED else 1):
                    hit, found = self._disturbed(MODES[mode], draw, out, disk)
                    hits += hit
                    if found or not hit:
                        break
            found = found or self._ended(out)
        except TimeoutError as error:
            found = str(error)
        finally:
            if mode == "disk":
                unmount(disk)
        return Trial(self.study, mode, seed, hits, found)

    def _disturbed(self, mode: Mode, draw: random.Random, out: Path, disk: Path) -> tuple[bool, str]:
        """Whether trouble came before its end, and what was wrong with how it ended."""
        do, whole = command(self.words(out, mode.wandb)), self.whole

        def inside() -> None:
            if mode.inside is not None:
                mode.inside(draw, whole)
            do()

        def run() -> tuple[bool, Ended]:
            process = Process(inside, self.folder / "errors.txt", out)
            hit = mode.outside is None or mode.outside(draw, process, whole)
            return hit, process.end()

        if mode.disk is not None:
            with mode.disk(draw, disk, whole):
                hit, ended = run()
            hit = ended.code != 0
        else:
            hit, ended = run()
        if mode.after is not None:
            hit = mode.after(draw, out) and hit
        if ended.code not in mode.ends:
            return hit, ended.trouble or f"it ended with {ended.code}: {ended.stderr[-300:]!r}"
        if mode.inside is not None and mode.outside is None and mode.again:
            hit = ended.code != 0
        return hit, "" if ended.code < 0 and not ended.left else ended.trouble

    def _two(self, draw: random.Random, out: Path) -> tuple[int, str]:
        """Two processes with the same command: one writes, the other says so or finds the run done."""
        first = Process(command(self.words(out)), self.folder / "errors.txt", out)
        hit = first.wait_until(draw.random(), self.whole.seconds)
        second = Process(command(self.words(out)), self.folder / "second.txt", out)
        ends = [first.end(), second.end()]
        trouble = next((one.trouble for one in ends if one.trouble), "")
        codes = [one.code for one in ends]
        if not trouble and sorted(codes) not in ([0, 0], [0, 1]):
            trouble = f"two processes ended with {codes}"
        if not trouble and 1 in codes and "another mechlens process" not in ends[codes.index(1)].stderr:
            trouble = f"one of two said {ends[codes.index(1)].stderr[-200:]!r}"
        return int(hit), trouble

    def _ended(self, out: Path) -> str:
        """Gives the command once more and says what is wrong with what then lies there."""
        ended = done(command(self.words(out)), self.folder / "errors.txt")
        if ended.code or ended.trouble:
            return f"the same command then ended with {ended.code}: {ended.trouble or ended.stderr[-300:]!r}"
        partial = [path.name for path in out.rglob("*.partial")]
        if partial:
            return f"{partial[0]} is left"
        return "; ".join(differences(self.whole.out, out)[:3])


def _keep(path: Path, study: str) -> None:
    words = Subjects(path.parent / "subjects").command(study, Path("OUT"))
    words[words.index("disabled")] = "WANDB"
    path.write_text(json.dumps(words))


def _measured(do: Callable[[], None], out: Path, told: Path) -> None:
    """Runs it and tells what it took."""
    import time

    real, count, size = os.replace, [0], [0]

    def replace(source: Any, target: Any) -> None:
        count[0] += 1
        real(source, target)
        if str(target).startswith(str(out)):
            size[0] = max(size[0], sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) >> 10)

    os.replace = replace
    do()
    told.write_text(json.dumps({"seconds": time.process_time(), "writes": count[0], "size": size[0]}))


def table(trials: Sequence[Trial]) -> str:
    """Rows of study, mode, runs, times disturbed, survived, found."""
    runs, hits, bad = Counter(), Counter(), Counter()  # type: ignore[var-annotated]
    for one in trials:
        for key in ((one.study, one.mode), ("all", one.mode), ("all", "all")):
            runs[key] += 1
            hits[key] += one.hits
            bad[key] += bool(one.found)
    rows = [f"| {study} | {mode} | {runs[key]} | {hits[key]} | {runs[key] - bad[key]} | {bad[key]} |"
            for key in sorted(runs) for study, mode in (key,)]  # fmt: skip
    return "\n".join(
        ["| study | what happened | runs | times | survived | found |", "|---|---|---|---|---|---|", *rows]
    )


def trials(given: argparse.Namespace, folder: Path) -> list[Trial]:
    """Round by round, so that every study has its turn however early this is stopped."""
    killers = {}
    all_of: list[Trial] = []

    def keep(one: Trial) -> None:
        all_of.append(one)
        if given.log:
            with given.log.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(vars(one))}\n")
        if one.found:
            print(f"{one.study}, {one.mode}, seed {one.seed}: {one.found}", flush=True)

    for seed in range(given.seed, given.seed + given.rounds):
        for study in given.study:
            if study not in killers:
                killers[study] = Killer(study, folder / study)
                for found in killers[study].found:
                    keep(Trial(study, "undisturbed", 0, 0, found))
            for mode in given.modes:
                keep(killers[study].trial(mode, seed, given.kills))
    return all_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--study", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--modes", nargs="+", default=[*MODES, TWO], choices=[*MODES, TWO])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        print(table(trials(given, Path(scratch))))


if __name__ == "__main__":
    main()
