"""Sweeps on a Ray cluster: nodes go and come, and the tables are those of a quiet run.

Ray may wait for ever for what doesn't come: all of this together has a limit.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from saved import save_tiny

from mechlens.errors import UserError
from mechlens.studies.sweep.config import Ray, Slurm
from mechlens.studies.sweep.engines import ray as engine
from mechlens.studies.sweep.engines.engine import Resources, engine_called
from mechlens.studies.sweep.folders import folder_of, state_of, write_jobs
from mechlens.studies.sweep.plan import Plan, jobs_of
from mechlens.studies.sweep.study import work
from mechlens.studies.sweep.worker import work_on

SMALL = {
    "positive": "harmful", "negative": "harmless", "n": 16, "positions": ["last"], "resamples": 20, "permutations": 10,
    "random_directions": 2, "wandb": {"mode": "disabled"},
}  # fmt: skip
NODE = {"num_cpus": 2, "num_gpus": 4, "object_store_memory": 10**8}


LIMIT = 600.0
"""Seconds for everything here."""
spent: list[float] = []


@contextmanager
def within_limit() -> Iterator[None]:
    """TimeoutError where no time is left."""

    def end(*_: object) -> None:
        raise TimeoutError(f"tests on Ray have taken {LIMIT:g} s")

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(LIMIT - sum(spent), 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        spent.append(time.monotonic() - began)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    """A head that does no jobs, and a node of four made-up GPUs."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 10**8}
    made = Cluster()
    try:
        with within_limit():
            made.add_node(**head)
            nodes = [made.add_node(**NODE)]
    except Exception as error:
        made.shutdown()
        pytest.skip(f"a Ray cluster can't be started here: {error}")
    yield made, nodes
    with suppress(TimeoutError), within_limit():
        ray.shutdown()
        made.shutdown()


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    with within_limit():
        yield
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()  # a late word about a task that was cut off ends the process that hears it


def resources(cluster: tuple[Any, list[Any]], folder: Path, workers: int = 1, gpus: int = 0) -> Resources:
    return Resources(workers, gpus, folder / "logs", Slurm(), Ray(address=cluster[0].address))


def test_a_node_that_is_lost_costs_no_job_and_changes_no_number(
    cluster: tuple[Any, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is removed hard when the second job has begun there, and another one is added."""
    plan = Plan("direction", {**SMALL, "model": str(save_tiny(tmp_path / "model"))}, {"seed": [0, 1]})
    quiet, jobs = (jobs_of(plan, tmp_path / name, "plan") for name in ("quiet", "ray"))
    for made in (quiet, jobs):
        write_jobs(made)
    work_on([folder_of(job) for job in quiet])
    runs: list[int] = []

    def disturbed(groups: Any, resources: Resources, look: Any) -> None:
        def remove(folders: Any) -> None:
            look(folders)
            if not runs and (folders[-1] / "run.json").exists():
                runs.append((folders[0] / "run.json").stat().st_mtime_ns)
                cluster[0].remove_node(cluster[1].pop(), allow_graceful=False)
                cluster[1].append(cluster[0].add_node(**NODE))

        engine.run(groups, resources, remove)

    monkeypatch.setattr(engine, "POLL", 0.05)
    work(jobs, disturbed, resources(cluster, tmp_path))
    assert runs
    assert runs[0] == (folder_of(jobs[0]) / "run.json").stat().st_mtime_ns  # what was done stayed done
    assert [state_of(job).status for job in jobs] == ["done", "done"]
    for one, other in zip(quiet, jobs, strict=True):
        paths = sorted((folder_of(one) / "tables").glob("*.parquet"))
        assert paths
        for path in paths:
            theirs = pd.read_parquet(folder_of(other) / "tables" / path.name)
            pd.testing.assert_frame_equal(pd.read_parquet(path), theirs, check_exact=True)


def test_gpus_of_tasks_at_a_time_are_disjoint(
    cluster: tuple[Any, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(_: str, folders: list[str]) -> None:
        import time

        mine = [Path(folders[0]).parent / f"taken-{gpu}" for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        for path in mine:
            path.touch(exist_ok=False)
        late = time.monotonic() + 60
        while len(list(mine[0].parent.glob("taken-*"))) < 4 and time.monotonic() < late:
            time.sleep(0.05)  # until two tasks are at work at a time, however slowly the second begins
        for path in mine:
            path.rename(path.with_name(f"{path.name}-by-{Path(folders[0]).name}"))

    monkeypatch.setattr(engine, "work_in", seen)
    engine.run([[tmp_path / str(i)] for i in range(3)], resources(cluster, tmp_path, workers=2, gpus=2), lambda _: None)
    taken = sorted(path.name.partition("-by-") for path in tmp_path.iterdir())
    assert len(taken) == 6
    assert {one[0] for one in taken} == {f"taken-{gpu}" for gpu in range(4)}


def test_a_task_that_can_not_begin_ends_the_sweep(
    cluster: tuple[Any, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_: str, folders: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'mechlens'")

    monkeypatch.setattr(engine, "work_in", absent)
    with pytest.raises(UserError, match=r"No module named 'mechlens'\); install this mechlens on its nodes"):
        engine.run([[tmp_path / "one"]], resources(cluster, tmp_path), lambda _: None)


def test_what_is_missing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999999"):
        with pytest.raises(UserError, match=r"no Ray cluster at .*; give the .ray.address. of one"):
            engine_called("ray", Resources(1, 0, tmp_path, Slurm(), Ray(address=address)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="asks for 1 GPU"):
        engine_called("ray", Resources(1, 1, tmp_path, Slurm(), Ray()))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"extra \[ray\]"):
        engine_called("ray", Resources(1, 0, tmp_path, Slurm(), Ray()))
