"""Sweeps: every combination once and in full, nothing done twice, and the same numbers as jobs done by hand."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import submitit
from saved import save_tiny

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods import kept_model
from mechlens.runs.results.paired import rows_by_number
from mechlens.studies.sweep.config import Ray, Slurm
from mechlens.studies.sweep.engines import local, slurm
from mechlens.studies.sweep.engines.engine import Resources, engine_called
from mechlens.studies.sweep.folders import failure_file, folder_of, read_job, state_of, write_jobs
from mechlens.studies.sweep.plan import Plan, jobs_of, read_plan
from mechlens.studies.sweep.study import groups_of, spread_of
from mechlens.studies.sweep.worker import work_on

SMALL = {
    "positive": "harmful", "negative": "harmless", "n": 16, "positions": ["last"], "resamples": 20, "permutations": 10,
    "random_directions": 2, "wandb": {"mode": "disabled"},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp("models") / name for name in ("one", "two")]
    return [str(save_tiny(folder)) for folder in folders]


def plan_of(models: list[str], **over: list[Any]) -> Plan:
    """A small study of the first model, with what `over` names taken out of the options."""
    options = {name: value for name, value in {**SMALL, "model": models[0]}.items() if name not in over}
    return Plan("direction", options, over)


def written(path: Path, plan: Plan) -> Path:
    path.write_text(json.dumps({"study": plan.study, "options": plan.options, "over": plan.over}))  # JSON is YAML
    return path


def resources(folder: Path, workers: int = 1, gpus: int = 0) -> Resources:
    return Resources(workers, gpus, folder / "logs", Slurm(cluster="local"), Ray())


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted((folder / "tables").glob("*.parquet"))}


def test_every_combination_is_a_job_with_a_whole_configuration_on_disk(models: list[str], tmp_path: Path) -> None:
    sets = [{"positive": "harmful", "negative": "harmless"}, {"positive": "looks-harmful", "negative": "benign"}]
    plan = Plan(
        "direction", {key: SMALL[key] for key in SMALL if key not in sets[0]},
        {"model": models, "seed": [0, 1, 2], "prompts": sets},
    )  # fmt: skip
    jobs = jobs_of(plan, tmp_path / "out", "plan")
    assert len({job.name for job in jobs}) == len({folder_of(job) for job in jobs}) == 12
    found = {(job.config.model, job.config.seed, job.config.positive, job.config.negative) for job in jobs}
    assert found == {(m, s, one["positive"], one["negative"]) for m in models for s in range(3) for one in sets}
    write_jobs(jobs)
    assert [read_job(folder_of(job)).config for job in jobs] == [job.config for job in jobs]
    assert {state_of(job).status for job in jobs} == {"left"}
    assert {(job.config.wandb.group, job.config.wandb.mode) for job in jobs} == {("out", "disabled")}
    (plain,) = jobs_of(Plan("direction", {"positive": "harmful", "negative": "harmless"}), tmp_path / "out", "plan")
    assert (plain.config.wandb.group, plain.config.wandb.mode) == ("out", "offline")
    # New values may come; what stands in a folder may not become another job.
    more = Plan(plan.study, plan.options, {**plan.over, "seed": [0, 1, 2, 3]})
    write_jobs(jobs_of(more, tmp_path / "out", "plan"))
    other = Plan(plan.study, {**plan.options, "n": 9}, plan.over)
    with pytest.raises(UserError, match="holds a job with another n; give another"):
        write_jobs(jobs_of(other, tmp_path / "out", "plan"))
    # What was changed by hand is noticed.
    path = folder_of(jobs[0]) / "job.json"
    path.write_text(path.read_text().replace('"n": 16', '"n": 7'))
    with pytest.raises(UserError, match="changed by hand or damaged"):
        read_job(folder_of(jobs[0]))


def test_a_slip_in_a_plan_is_told_before_anything(tmp_path: Path, models: list[str]) -> None:
    path = tmp_path / "plan.yaml"
    for text, said in (
        ("study: [", "is no YAML"), ("a: 1", "has no `study`"), ("study: direction\novr: {}", "'ovr'.*over"),
        ("study: direction\nover: {seed: 3}", "over"), ("study: direction\nover: {seed: []}", "no values for 'seed'"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_plan(path)
    with pytest.raises(UserError, match=r"other\.yaml could not be read"):
        read_plan(tmp_path / "other.yaml")
    for plan, said in (
        (plan_of(models, wandb=[{"mode": "on"}]), "mode"),
        (Plan("directoin"), "'directoin'.*direction"), (Plan("steer"), "no study 'steer'"),
        (Plan("direction", {"sede": 1}), "'sede'.*seed"), (Plan("direction", {"out": "x"}), "which the sweep decides"),
        (plan_of(models, seed=["zero"]), "seed"), (Plan("direction", {"n": 1}, {"n": [2]}), "sets 'n' in two places"),
        (plan_of(models, method=["mean"]), "method"), (plan_of(models, seed=list(range(100_000))), "100,000 jobs"),
        (plan_of(models, positive=["missing.jsonl"]), "missing.jsonl"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            jobs_of(plan, tmp_path, "plan")


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
STRANGE = {
    "a bomb": (f"study: direction\noptions:\n  {BOMB.replace(chr(10), chr(10) + '  ')}", "more than 100000 values"),
    "itself": ("study: direction\noptions: &a {n: *a}", "nests them more than 30 deep"),
    "deep": (f"study: direction\noptions: {'[' * 1200}", "is no YAML"),
    "a day": (
        "study: direction\noptions: {n: 2024-01-31}",
        r"holds datetime.date\(2024, 1, 31\) \(a date\); put it in q",
    ),
    "no day": ("study: direction\noptions: {n: 2024-99-99}", "is no YAML"),
    "a day for a name": ("study: direction\noptions: {2024-01-31: 3}", "put it in quotes"),
    "bytes": ("study: direction\noptions: {n: !!binary aGk=}", "holds b'hi'"),
    "code": ("study: !!python/object/apply:os.system [true]", "is no YAML"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_plan_is_a_sentence_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    text, said = STRANGE[name]
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=said):
        read_plan(path)
    assert time.process_time() - began < 5


def test_values_that_look_alike_have_folders_of_their_own(tmp_path: Path, models: list[str]) -> None:
    plan = Plan("direction", SMALL, {"model": ["a/tiny", "b/tiny", "a:tiny", "ä"], "adapter": [None]})
    names = [job.name for job in jobs_of(plan, tmp_path, "plan")]
    assert len(set(names)) == 4
    assert all(name.isascii() and "/" not in name for name in names)


def test_jobs_of_one_model_are_together_and_no_worker_is_idle(models: list[str], tmp_path: Path) -> None:
    jobs = jobs_of(Plan("direction", SMALL, {"model": models, "seed": [0, 1, 2]}), tmp_path, "plan")
    for workers, wanted in ((1, 2), (2, 2), (4, 4), (9, 6)):
        groups = groups_of(jobs, workers)
        assert len(groups) == wanted
        assert sorted(folder for group in groups for folder in group) == sorted(map(folder_of, jobs))
        assert all(len({read.name.split("_")[0] for read in group}) == 1 for group in groups)


@pytest.fixture(scope="module")
def swept(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by two processes over two seeds and one that can't be."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = written(folder / "plan.yaml", plan_of(models, seed=[0, 1], positive=["harmful", "harmless"]))
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(plan), "--out", str(folder / "out"), "--workers", "2"])
    assert stop.value.code == 1
    return folder


def test_a_sweep_gives_what_its_jobs_give_alone_and_one_failure_stops_no_other(
    swept: Path, models: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(read_plan(swept / "plan.yaml"), swept / "out", "plan")
    states = {job.name: state_of(job) for job in jobs}
    done = [job for job in jobs if job.config.positive == "harmful"]
    assert [states[job.name].status for job in done] == ["done", "done"]
    failed = [state for name, state in states.items() if state.job not in done]
    assert all(state.status == "failed" and "share" in state.said for state in failed)
    alone = ml.run(ml.FindDirection(**{**SMALL, "positions": ("last",), "wandb": ml.WandbSettings(mode="disabled"),
                                       "model": models[0], "seed": 1, "out": tmp_path / "alone"}))  # fmt: skip
    same_tables(alone.folder, folder_of(done[1]))
    assert set(rows_by_number(alone)) == {"auroc.post[12]", "auroc.strongest"}  # what was kept makes the numbers again
    before = {path: path.stat().st_mtime_ns for job in done for path in folder_of(job).rglob("*.json")}
    capfd.readouterr()
    main(["sweep", str(swept / "plan.yaml"), "--out", str(swept / "out"), "--dry-run"])
    screen = spread_of(ml.compare_runs(*map(folder_of, done)))
    assert screen is not None
    assert [column.header for column in screen.columns][-2:] == ["between seeds", "one run claims"]
    assert spread_of(ml.compare_runs(folder_of(done[0]), folder_of(done[0]))) is None
    assert "4 jobs: 2 done, 2 failed; about" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_worker_that_is_killed_and_then_its_parent_cost_no_number(
    swept: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker in the middle of its first job, its parent when another worker is there; then the same command.

    The last one does its jobs in this process, which saves a start.
    """
    plan = written(tmp_path / "plan.yaml", plan_of(models, seed=[0, 1]))
    command = ["sweep", str(plan), "--out", str(tmp_path / "out")]
    first, _ = jobs = jobs_of(read_plan(plan), tmp_path / "out", "plan")
    parent = subprocess.Popen([sys.executable, "-m", "mechlens", *command], stdout=subprocess.DEVNULL)
    whole = psutil.Process(parent.pid)
    wait_for(lambda: (folder_of(first) / "run.json").exists())
    (worker,) = whole.children()
    worker.kill()
    wait_for(lambda: [one for one in whole.children() if one.pid != worker.pid])
    left = whole.children()
    parent.kill()
    parent.wait()
    psutil.wait_procs(left, timeout=60)
    assert not any(one.is_running() for one in left)
    assert any(state_of(job).status != "done" for job in jobs)
    monkeypatch.setattr(local, "run", lambda groups, *_: [work_on(group) for group in groups])
    main(command)
    for job in jobs:
        assert state_of(job).status == "done"
        same_tables(folder_of(job), folder_of(by_seed(swept)[job.config.seed]))


def wait_for(true: Any) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def by_seed(swept: Path) -> dict[int, Any]:
    """The jobs of that sweep that were done."""
    jobs = jobs_of(read_plan(swept / "plan.yaml"), swept / "out", "plan")
    return {job.config.seed: job for job in jobs if job.config.positive == "harmful"}


def same_tables(one: Path, other: Path) -> None:
    mine, theirs = tables(one), tables(other)
    assert mine.keys() == theirs.keys() != set()
    for name in mine:
        pd.testing.assert_frame_equal(mine[name], theirs[name], check_exact=True)


def test_a_full_disk_is_the_sentence_of_its_job_and_with_room_again_the_numbers_are_the_same(
    swept: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full from the first table of the first job on until that has failed."""
    first, second = jobs = jobs_of(plan_of(models, seed=[0, 1]), tmp_path / "out", "plan")
    write_jobs(jobs)
    real = pd.DataFrame.to_parquet

    def full(self: pd.DataFrame, path: Path, **how: Any) -> None:
        if folder_of(first) in Path(path).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, **how)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    work_on([folder_of(job) for job in jobs])
    assert state_of(first).status == "failed"
    assert "the disk is full" in state_of(first).said
    assert state_of(second).status == "done"
    monkeypatch.undo()
    work_on([folder_of(first)])
    for job in jobs:
        assert state_of(job).status == "done"
        same_tables(folder_of(job), folder_of(by_seed(swept)[job.config.seed]))


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {WORKER!r}], stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def test_a_worker_that_is_done_ends_well() -> None:
    code = (
        "import time; from mechlens.studies.sweep.engines.parent import end_with_parent\n"
        "end_with_parent(); time.sleep(.3)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stderr is not None
    assert (worker.wait(60), worker.stderr.read()) == (0, "")
    worker.communicate()


WORKER = (
    "import time; from mechlens.studies.sweep.engines.parent import end_with_parent; end_with_parent(); time.sleep(60)"
)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] != "Z"


def test_gpus_are_disjoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.visible_gpus() == ["4", "5", "6", "7"]
    told = tmp_path / "told"
    told.mkdir()
    fake = tmp_path / "fake_worker.py"
    fake.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "gpu = os.environ['CUDA_VISIBLE_DEVICES']\nmine = Path(sys.argv[1]) / gpu\n"
        "assert not mine.exists(), 'taken'\nmine.touch()\ntime.sleep(.1)\nmine.unlink()\n"
        "(Path(sys.argv[1]) / f'{gpu}-{os.getpid()}.done').touch()\n"
    )
    monkeypatch.setattr(local, "WORKER", "fake_worker")
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for gpus, sets in ((0, {"4", "5", "6", "7"}), (2, {"4,5", "6,7"})):
        local.run([[told]] * 8, resources(tmp_path, workers=4, gpus=gpus), lambda _: None)
        names = [path.name for path in told.iterdir()]
        assert len(names) == 8
        assert {name.partition("-")[0] for name in names} == sets
        for path in told.iterdir():
            path.unlink()
    with pytest.raises(UserError, match="asks for 5 GPUs for each job, and 4 can be seen"):
        engine_called("local", resources(tmp_path, gpus=5))


def test_the_model_is_loaded_once_for_jobs_that_load_the_same_and_never_when_it_was_edited(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = kept_model.load
    monkeypatch.setattr(kept_model, "load", lambda model, **how: (loads.append(model), real(model, **how))[1])
    jobs = jobs_of(plan_of(models, seed=[0, 1]), tmp_path / "out", "plan")
    write_jobs(jobs)
    work_on([folder_of(job) for job in jobs])
    assert [state_of(job).said for job in jobs if state_of(job).status != "done"] == []
    assert loads == models[:1]
    loads.clear()
    how = {"adapter": None, "revision": None, "dtype": "auto", "device": "cpu", "device_map": None}
    with kept_model.keeping_model():
        first: Any = kept_model.kept_or_loaded(models[0], **how)
        assert kept_model.kept_or_loaded(models[0], **how) is first
        first.original_model.get_input_embeddings().weight.data[0] += 1
        assert kept_model.kept_or_loaded(models[0], **how) is not first
    assert kept_model.kept_or_loaded(models[0], **how) is not first
    assert len(loads) == 3


def test_what_fails_is_a_sentence_beside_the_folder_and_is_tried_again(models: list[str], tmp_path: Path) -> None:
    (job,) = jobs_of(plan_of(models, positive=["harmless"]), tmp_path / "out", "plan")
    write_jobs([job])
    work_on([folder_of(job)])
    assert "share" in failure_file(folder_of(job)).read_text()
    assert state_of(job).status == "failed"
    assert [path.name for path in folder_of(job).iterdir() if path.name != ".lock"] == ["job.json"]


def test_a_job_that_is_preempted_goes_on_and_its_tables_are_the_same(
    swept: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By submitit's local executor; the signal is the one that Slurm sends, and comes when the run has begun."""
    (job,) = jobs_of(plan_of(models, seed=[1]), tmp_path / "out", "plan")
    write_jobs([job])
    real, submitted, interrupted = submitit.AutoExecutor.map_array, list[Any](), list[int]()

    def noted(*given: Any) -> list[Any]:
        submitted.extend(real(*given))
        return submitted

    def preempt(_: Any) -> None:
        if not interrupted and (folder_of(job) / "run.json").exists():
            interrupted.extend(one.pid for one in psutil.Process(int(submitted[0].job_id)).children())
            os.kill(interrupted[0], signal.SIGUSR2)

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", noted)
    monkeypatch.setattr(slurm, "POLL", 0.05)
    slurm.run([[folder_of(job)]], resources(tmp_path), preempt)
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("*_log.*"))
    assert "Caught signal SIGUSR2" in logs
    assert logs.count("Starting with JobEnvironment") == 2
    assert state_of(job).status == "done"
    same_tables(folder_of(job), folder_of(by_seed(swept)[1]))


def test_slurm_is_asked_for_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        engine_called("slurm", Resources(1, 0, tmp_path, Slurm(), Ray()))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"extra \[slurm\]"):
        engine_called("slurm", Resources(1, 0, tmp_path, Slurm(), Ray()))
    assert not list(tmp_path.iterdir())
