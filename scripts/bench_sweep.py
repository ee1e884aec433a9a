"""What `mechlens sweep` costs and saves: 12 small jobs (3 checkpoints, 2 seeds, 2 prompt sets), done three ways.

As commands one after the other; by two workers at a time, a process for each job; and by `mechlens sweep --workers 2`,
which does jobs of one model in one process. The checkpoints are tiny random models, so that nearly all of a job is what
is around it. With --shards: one job on a real model by one process that has both cores, and by two of one core each.

    scripts/bench_sweep.py                     about five minutes on two quiet cores
    scripts/bench_sweep.py --shards            about ten
    scripts/bench_sweep.py --write             puts its table into mechlens/studies/sweep/README.md
    scripts/bench_sweep.py --model A --model B --n 96
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from readme_table import head, row, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from saved import save_tiny

from mechlens.runs.run import read_run
from mechlens.studies.sweep.config import Ray, Slurm
from mechlens.studies.sweep.engines import local
from mechlens.studies.sweep.engines.engine import Resources
from mechlens.studies.sweep.folders import folder_of, write_jobs
from mechlens.studies.sweep.plan import Plan, jobs_of
from mechlens.studies.sweep.study import groups_of

ROOT = Path(__file__).resolve().parents[1]
SETS = [{"positive": "harmful", "negative": "harmless"}, {"positive": "looks-harmful", "negative": "benign"}]
SMALL = {"resamples": 50, "permutations": 10, "random_directions": 2, "wandb": {"mode": "disabled"}}
WORKERS = 2
EVERY = 0.2
"""Seconds between two looks at memory."""


@dataclass
class Seen:
    """What was seen of the processes that work, while all jobs were done."""

    wall: float = 0.0
    busy: float = 0.0
    """Seconds of all processes that do jobs, from their start to their end."""
    peak: int = 0
    """Bytes of all processes below this one, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", action="append", help="a model to take instead of the tiny ones; may be repeated")
    parser.add_argument("--n", type=int, help="prompts of each side: 16 unless said, with --shards 100")
    parser.add_argument("--shards", action="store_true", help="one job by one process and by two")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    args = parser.parse_args()
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        table = shards_table(args, Path(scratch)) if args.shards else jobs_table(args, Path(scratch))
    print(f"load at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    readme = ROOT / "mechlens/studies/sweep/README.md" if args.write else None
    show(__file__, {"one job" if args.shards else "12 small jobs": table}, readme)


def jobs_table(args: argparse.Namespace, here: Path) -> str:
    """Many jobs three ways."""
    plan = Plan("direction", {**SMALL, "n": args.n or 16}, {
        "model": args.model or [str(save_tiny(here / f"checkpoint-{i}", i)) for i in range(3)],
        "seed": [0, 1], "prompts": SETS,
    })  # fmt: skip
    ways: dict[str, Callable[[Path], None]] = {
        "commands, one after the other": lambda out: one_by_one(plan, out),
        f"{WORKERS} at a time, a process each": lambda out: a_process_each(plan, out),
        f"`mechlens sweep --workers {WORKERS}`": lambda out: swept(plan, out),
    }
    rows = []
    for i, (name, way) in enumerate(ways.items()):
        seen, jobs, inside = measured(way, here / str(i))
        each = (seen.busy - inside) / jobs
        rows.append(row([name, f"{3600 * jobs / seen.wall:.0f}", f"{seen.peak >> 20}", f"{each:.1f}"]))
        print(rows[-1], flush=True)
    return "\n".join([head(["", "jobs an hour", "peak memory (MB)", "overhead of a job (s)"]), *rows])


def shards_table(args: argparse.Namespace, here: Path) -> str:
    """One job that answers and reads many prompts, by one process and by two."""
    model = (args.model or ["smollm2"])[0]
    plan = Plan("separate", {**SMALL, "model": model, "n": args.n or 100})
    rows = []
    for shards in (1, WORKERS):
        seen, _, inside = measured(lambda out, shards=shards: sharded(plan, out, shards), here / str(shards))
        rows.append(row([f"`shards: {shards}`", f"{seen.wall:.0f}", f"{inside:.0f}", f"{seen.peak >> 20}"]))
        print(rows[-1], flush=True)
    return "\n".join([head(["", "seconds", "of these in the study", "peak memory (MB)"]), *rows])


def measured(way: Callable[[Path], None], out: Path) -> tuple[Seen, int, float]:
    """What was seen, how many jobs were done, and the seconds inside the phases of the study, without loading."""
    seen, over = Seen(), threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, over))
    began = time.perf_counter()
    watcher.start()
    way(out)
    seen.wall = time.perf_counter() - began
    over.set()
    watcher.join()
    runs = [read_run(path.parent) for path in sorted(out.glob("*/run.json"))]
    assert all(run.status == "success" for run in runs)
    inside = sum(sum(run.seconds.values()) - run.seconds.get("loading", 0.0) for run in runs)
    return seen, len(runs), inside


def watch(seen: Seen, over: threading.Event) -> None:
    """Adds up what processes below this one take, until it is `over`."""
    last = time.perf_counter()
    while not over.wait(EVERY):
        working, memory = 0, 0
        for process in psutil.Process().children(recursive=True):
            try:
                words, own = process.cmdline(), process.memory_info().rss
            except psutil.Error:
                continue
            working += local.WORKER in words
            memory += own
        now = time.perf_counter()
        seen.busy += working * (now - last)
        seen.peak = max(seen.peak, memory)
        last = now


def one_by_one(plan: Plan, out: Path) -> None:
    """A command each, as somebody would type them: the worker's, which starts as `mechlens direction` does."""
    a_process_each(plan, out, workers=1)


def a_process_each(plan: Plan, out: Path, workers: int = WORKERS) -> None:
    """Each job by a process of its own."""
    jobs = jobs_of(plan, out, "plan")
    write_jobs(jobs)
    resources = Resources(workers, 0, out / "logs", Slurm(), Ray())
    local.run([[folder_of(job)] for job in jobs], resources, lambda folders: None)


def sharded(plan: Plan, out: Path, shards: int) -> None:
    """One job by as many processes, which have all cores between them."""
    jobs = jobs_of(plan, out, "plan")
    write_jobs(jobs)
    local.run(groups_of(jobs, shards, shards), Resources(shards, 0, out / "logs", Slurm(), Ray()), lambda folders: None)


def swept(plan: Plan, out: Path) -> None:
    """The command, with the page that it makes at the end."""
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps({"study": plan.study, "options": plan.options, "over": plan.over}))  # JSON is YAML
    command = [sys.executable, "-m", "mechlens", "sweep", str(path), "--out", str(out), "--workers", str(WORKERS)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
