"""Jobs that several processes share: the same numbers as by one, whatever the others did and however they ended."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from saved import save_tiny

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.activations import collect as collecting
from mechlens.methods.activations.reading import BatchReader
from mechlens.models.engine.forward import FIRST, in_turn
from mechlens.runs.folder import FolderCache
from mechlens.runs.lock import FolderLock
from mechlens.studies.sweep import shards
from mechlens.studies.sweep.config import Sweep
from mechlens.studies.sweep.folders import folder_of, helpers_of, is_helper, state_of, write_jobs
from mechlens.studies.sweep.plan import Job, Plan, jobs_of
from mechlens.studies.sweep.study import groups_of, sweep
from mechlens.studies.sweep.worker import work_on

SMALL = {
    "positive": "harmful", "negative": "harmless", "n": 16, "positions": ["last"], "resamples": 20, "permutations": 10,
    "random_directions": 2, "wandb": {"mode": "disabled"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sixteen prompts are several batches."""
    monkeypatch.setattr(collecting, "_default_tokens", lambda model: 160)


def job_in(folder: Path, model: str) -> Job:
    (job,) = jobs_of(Plan("direction", {**SMALL, "model": model}), folder, "plan")
    write_jobs([job])
    return job


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """A process that has begun the job and gets no further."""

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(BatchReader, "read", stop)
        work_on([folder])
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


def pieces(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*.safetensors"))


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted((folder / "tables").glob("*.parquet"))}


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "_default_tokens", lambda model: 160)
        job = job_in(tmp_path_factory.mktemp("alone"), model)
        work_on([folder_of(job)])
    return folder_of(job)


def test_the_job_finds_what_its_helpers_made_and_has_the_numbers_of_one_process(
    model: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One helper goes through all, as if the job's own process had been slow; another is ended in the middle."""
    job = job_in(tmp_path / "out", model)
    folder = folder_of(job)
    first, second = helpers_of(folder, 3)
    put: list[str] = []
    real = FolderCache.put

    def noted(self: FolderCache, key: str, value: Any) -> None:
        put.append(key)
        real(self, key, value)

    monkeypatch.setattr(FolderCache, "put", noted)
    with at_work(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "is_held", lambda folder: not put)
            work_on([first])
        assert len(put) == 1  # the job ended, and so did its helper
        work_on([second])
    assert len(put) == len(set(put)) >= 3
    assert pieces(folder) == sorted(f"{key}.safetensors" for key in put)
    ran: list[Any] = []
    run = BatchReader._run
    monkeypatch.setattr(BatchReader, "_run", lambda self, prefix: (ran.append(prefix), run(self, prefix))[1])
    work_on([folder])
    assert ran == []
    assert state_of(job).status == "done"
    assert ml.read_run(folder).metrics == ml.read_run(alone).metrics
    mine, theirs = tables(folder), tables(alone)
    assert mine.keys() == theirs.keys()
    for name in mine:
        pd.testing.assert_frame_equal(mine[name], theirs[name], check_exact=True)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # helpers leave nothing
    monkeypatch.undo()
    work_on([first])  # of a finished job: nothing, at once


def test_helpers_begin_elsewhere_and_go_through_all() -> None:
    batches = [[i] for i in range(8)]
    begun = []
    for number in range(4):
        token = FIRST.set(number / 4)
        begun.append(in_turn(batches)[0][0])
        assert sorted(in_turn(batches)) == batches
        FIRST.reset(token)
    assert begun == [0, 2, 4, 6]
    assert in_turn(batches) == batches
    assert in_turn([]) == []


def test_a_job_and_its_helpers_are_side_by_side(model: str, tmp_path: Path) -> None:
    jobs = jobs_of(Plan("direction", {**SMALL, "model": model}, {"seed": [0, 1]}), tmp_path, "plan")
    groups = groups_of(jobs, workers=2, shards=3)
    assert [len(group) for group in groups] == [1] * 6
    assert [is_helper(group[0]) for group in groups] == [False, True, True] * 2
    assert [group[0] for group in groups if not is_helper(group[0])] == list(map(folder_of, jobs))
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"study": "direction", "options": {**SMALL, "model": model}, "shards": 2}))
    with pytest.raises(UserError, match="several processes each can't be on memory://bucket/sweep"):
        sweep(Sweep(plan=plan, out=Path("memory://bucket/sweep")), None)  # type: ignore[arg-type]
    plan.write_text(json.dumps({"study": "direction", "shards": 0}))
    with pytest.raises(UserError, match="shards"):
        sweep(Sweep(plan=plan, out=tmp_path / "out"), None)  # type: ignore[arg-type]
