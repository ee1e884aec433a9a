"""The record is true at every moment: started, ended, failed, gone on with, compared."""

import errno
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import warm

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import load, sha256
from mechlens.runs.folder import read_prompts
from mechlens.runs.headline import Headline
from mechlens.runs.lock import FolderLock
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report
from mechlens.runs.results.result import list_runs, open_run_folder
from mechlens.runs.run import Inputs, Run, changed_since, largest_difference, read_run, write_run
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings

OFF = WandbSettings(mode="disabled")


@dataclass(frozen=True)
class Data:
    harmful: Path
    n: int = 10


@dataclass(frozen=True)
class Config:
    model: str
    data: Data = Data(Path("harmful.json"))
    out: Path = Path("runs")
    wandb: WandbSettings = OFF
    seed: int = 5


def start(folder: Path, verb: str = "separate", **changes):
    return open_run(verb=verb, config=replace(Config("tiny"), **changes), out=folder, wandb=OFF)


def status(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["status"]


def test_the_record_is_started_then_success_and_reads_back(tmp_path):
    with start(tmp_path) as run:
        assert status(tmp_path) == "started"
        assert open_run_folder(tmp_path).status == "running"
        run.inputs(Inputs(model="m" * 64, template="t" * 64, data={"harmful": "d" * 64}), device="cpu", dtype="float32")
        run.metric("auroc.inst", Estimate(0.9, 0.8, 0.95, 40))
        run.metrics({"refusal": Estimate.missing(2)})
        made = run.artifact("checkpoint", Checkpoint("tiny", "/tiny"), inputs={"model": "m" * 64})
    record = read_run(tmp_path)
    assert record == replace(run.run, metrics=record.metrics)
    assert record.status == "success"
    assert record.seed == 5
    assert record.config == {"model": "tiny", "data": {"harmful": "harmful.json", "n": 10}, "seed": 5}
    assert record.inputs == Inputs("m" * 64, "t" * 64, {"harmful": "d" * 64})
    assert (record.device, record.dtype) == ("cpu", "float32")
    assert record.metrics["auroc.inst"] == Estimate(0.9, 0.8, 0.95, 40)
    assert math.isnan(record.metrics["refusal"].value)
    assert json.loads((tmp_path / "run.json").read_text())["metrics"]["refusal"]["value"] is None
    assert record.artefacts["checkpoint"] == made
    assert made.sha256 == sha256(tmp_path / made.file)
    assert load(tmp_path / made.file, Checkpoint).name == "tiny"
    assert record.packages.keys() >= {"torch", "numpy", "transformers", "transformer-lens"}
    assert record.git is None or len(record.git.commit) == 40
    assert record.started <= record.finished


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt(), UserError("bad file")])
def test_an_error_is_recorded_and_goes_on_up(error, tmp_path):
    def fail():
        with start(tmp_path):
            raise error

    with pytest.raises(type(error)):
        fail()
    record = read_run(tmp_path)
    assert record.status == "error"
    assert record.error.startswith(type(error).__name__)
    assert str(error) in record.error


def test_the_same_work_goes_on_under_the_same_id(tmp_path):
    with pytest.raises(RuntimeError):
        crash(tmp_path)
    first = read_run(tmp_path)
    (tmp_path / ".table.parquet.123.partial").write_text("half")
    with start(tmp_path, out=Path("elsewhere")) as run:
        assert run.cache.get("a" * 64) is not None
        assert run.run.id == first.id
        assert run.run.error is None
    assert status(tmp_path) == "success"
    assert not list(tmp_path.rglob("*.partial"))


def crash(out: Path) -> None:
    import torch

    with start(out) as run:
        run.cache.put("a" * 64, {"x": torch.zeros(2)})
        raise RuntimeError


def test_other_work_in_the_same_folder_is_refused_by_name(tmp_path):
    with start(tmp_path):
        pass
    with pytest.raises(UserError, match=r'`model` was "tiny" and is now "big"; give .* or choose another `out` for a'):
        start(tmp_path, model="big")
    with pytest.raises(UserError, match=r"`data\.n` was 10 and is now 11"):
        start(tmp_path, data=Data(Path("harmful.json"), 11))
    with pytest.raises(UserError, match="a run of `separate`, not of `direction`"):
        start(tmp_path, verb="direction")
    # A refusal leaves the folder free.
    with start(tmp_path):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path):
    with start(tmp_path), pytest.raises(UserError, match="another mechlens process"):
        start(tmp_path)


def test_a_killed_run_says_started_and_can_be_gone_on_with(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from mechlens.settings import WandbSettings\n"
        "from mechlens.prompts.prompt import PromptPair, Prompt\n"
        "from mechlens.runs.writer import open_run\n"
        f"run = open_run(verb='v', config=Prompt('a', 'b'), out=Path({str(tmp_path)!r}),"
        " wandb=WandbSettings(mode='disabled'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert warm.python(code).returncode == -9
    assert status(tmp_path) == "started"
    assert open_run_folder(tmp_path).status == "interrupted"
    with open_run(verb="v", config=Prompt("a", "b"), out=tmp_path, wandb=OFF):
        pass
    assert status(tmp_path) == "success"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file could not be written"):
        start(tmp_path / "file")


def test_a_full_disk_is_the_error_that_is_seen(tmp_path, monkeypatch):
    def fill(out):
        with start(out) as run:
            monkeypatch.setattr(os, "replace", full)
            run.metric("a", Estimate(1.0, 1.0, 1.0, 1))

    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"the disk is full: .*run\.json"):
        fill(tmp_path)
    monkeypatch.undo()
    assert status(tmp_path) == "started"
    assert not list(tmp_path.rglob("*.partial"))


def test_tables_prompts_and_steps_are_on_disk(tmp_path):
    asked = [
        Prompt("a", "hi 🙂", "harmful", system="be kind", history=(("user", "x"), ("assistant", "y")), family="f"),
        Prompt("b", "bye"),
    ]
    frame = pd.DataFrame({"level": [0, 1], "auroc": [0.5, math.nan]})
    with start(tmp_path) as run:
        run.prompts(asked)
        run.table("auroc", frame)
        run.log_step(1, {"loss": 0.5})
        run.log_step(2, {"loss": 0.25})
    assert read_prompts(tmp_path) == asked
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "tables" / "auroc.parquet"), frame)
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_the_report_ends_with_the_final_status(tmp_path):
    frame = pd.DataFrame({"level": [0, 1], "auroc": [0.5, 0.9]})

    def fail():
        with start(tmp_path) as run:
            run.table("auroc", frame)
            drawn = figures.lines(frame, x="level", y="auroc", title="t", xlabel="x", ylabel="y")
            run.figure("auroc", drawn, table="auroc")
            run.report(Report(title="T", question="Q?", verdict="V."))
            killed_here = (tmp_path / "report.html").read_text()
            assert '<span class="status started">interrupted' in killed_here
            assert "The process was killed before the run had ended: the same call goes on." in killed_here
            raise RuntimeError("later")

    with pytest.raises(RuntimeError):
        fail()
    assert '<span class="status error">error' in (tmp_path / "report.html").read_text()


def test_a_figure_names_a_table_that_exists(tmp_path):
    def draw():
        with start(tmp_path) as run:
            run.figure("f", None, table="absent")

    with pytest.raises(ValueError, match="'absent'"):
        draw()


def test_runs_are_listed_and_a_damaged_one_is_a_warning(tmp_path):
    for name in ("b", "a/deep"):
        with start(tmp_path / name):
            pass
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match="not JSON"):
        runs = list_runs(tmp_path)
    assert len(runs) == 2
    with pytest.raises(UserError, match="there is no folder"):
        list_runs(tmp_path / "absent")
    with pytest.raises(UserError, match=r"there is no run\.json"):
        read_run(tmp_path)


def test_what_changed_is_named(tmp_path):
    with start(tmp_path) as run:
        run.inputs(Inputs(model="m" * 64, template="t" * 64, data={"harmful": "d" * 64, "same": "s" * 64}))
    record = read_run(tmp_path)
    assert changed_since(record, record.inputs) == []
    now = Inputs("n" * 64, "t" * 64, {"harmful": "e" * 64, "same": "s" * 64})
    changed = changed_since(record, now)
    assert [phrase.split(" (")[0] for phrase in changed] == ["model", "data harmful"]


def test_the_largest_difference_of_two_runs(tmp_path):
    with start(tmp_path) as run:
        run.metrics({"a": Estimate(0.5, 0.4, 0.6, 10), "b": Estimate.missing(1)})
    one = read_run(tmp_path)
    assert largest_difference(one, one).difference == 0.0
    other = replace(one, metrics={**one.metrics, "a": Estimate(0.5, 0.4, 0.7, 10)})
    found = largest_difference(one, other)
    assert found.name == "a"
    assert found.difference == pytest.approx(0.1)
    measurable = replace(one, metrics={**one.metrics, "b": Estimate(0.1, 0.1, 0.1, 1)})
    assert largest_difference(one, measurable) == ("b", math.inf)


# Folders and names


def test_a_folder_with_others_files_is_refused_and_left_alone(tmp_path):
    for name in ("steps.jsonl", "report.html", ".tmpAbC123", "notes.txt", "tables"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"holds '{name}' and no run of mechlens"):
            start(folder)
        assert (folder / name).read_text() == "mine"
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_refused_folder_keeps_a_lock_that_was_there_and_frees_it(tmp_path):
    with start(tmp_path):
        pass
    with pytest.raises(UserError, match="holds a run of"):
        start(tmp_path, verb="another")
    assert (tmp_path / ".lock").exists()
    with start(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path, monkeypatch):
    opened = os.open

    def removed(path, *rest):
        handle = opened(path, *rest)
        os.unlink(path)
        return handle

    monkeypatch.setattr(os, "open", removed)
    with pytest.raises(UserError, match="another mechlens process"):
        FolderLock(tmp_path)


def test_an_unfinished_run_keeps_the_day_that_it_began_with(tmp_path):
    @dataclass(frozen=True)
    class Dated:
        today: str | None = None

    def begin(run, day):
        run.inputs(Inputs(model="m" * 64, template=day[-1] * 64, today=day))

    def again(day, given=None):
        return open_run(verb="v", config=Dated(given), out=tmp_path, wandb=OFF)

    run = again(None)
    begin(run, "2024-07-26")
    run._lock.release()  # as a kill does
    again(None)._lock.release()  # killed before it said what goes in
    record = (tmp_path / "run.json").read_bytes()
    for _ in range(2):  # the refusal leaves the record as it was
        with (
            pytest.raises(UserError, match=r"prints 2024-07-26, and now .* 2024-07-27; give `today` 2024-07-26 to go"),
            again(None) as run,
        ):
            begin(run, "2024-07-27")
        assert (tmp_path / "run.json").read_bytes() == record
    with again(None, "2024-07-26") as run:
        begin(run, "2024-07-26")
    assert read_run(tmp_path).inputs.today == "2024-07-26"
    with pytest.raises(UserError, match='`today` was left out and is now "2024-07-27"'):
        again(None, "2024-07-27")


def test_a_run_that_goes_on_removes_only_what_it_wrote(tmp_path):
    with start(tmp_path) as run:
        run.table("a", pd.DataFrame({"x": [1]}))
    theirs = [tmp_path / "notes.txt", tmp_path / ".tmpAbC123", tmp_path / "mine" / ".a.parquet.123.partial"]
    ours = [tmp_path / "tables" / ".a.parquet.123.partial", tmp_path / ".run.json.ab_1.partial" / ".run.json"]
    for path in (*theirs, *ours):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    with start(tmp_path):
        pass
    assert [path.exists() for path in (*theirs, *ours)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    "name", ["../../escape", "/escape", "a/b", "a\\b", "..", ".hidden", "", "a\0b", "x" * 300, "\ud83d"]
)
def test_a_name_never_leads_out_of_the_folder(name, tmp_path):
    with start(tmp_path / "a" / "b") as run:
        for write in (
            lambda: run.table(name, pd.DataFrame({"x": [1]})),
            lambda: run.figure(name, None),
            lambda: run.artifact(name, Checkpoint("tiny", "/tiny"), inputs={}),
        ):
            with pytest.raises(UserError, match="can't be the name of a file"):
                write()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [".lock", "run.json"]
    assert {path.parent for path in files} == {tmp_path / "a" / "b"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_permissions_that_the_user_wants(umask, tmp_path):
    import torch

    before = os.umask(umask)
    try:
        config = Config("tiny")
        with open_run(verb="separate", config=config, out=tmp_path / "run", wandb=OFF, keep_cache=True) as run:
            run.table("a", pd.DataFrame({"x": [1]}))
            run.artifact("checkpoint", Checkpoint("tiny", "/tiny"), inputs={})
            run.cache.put("a" * 64, {"x": torch.zeros(2)})
            run.log_step(1, {"loss": 0.5})
            run.report(Report(title="T", question="Q?", verdict="V."))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(modes) == 7
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_the_command_can_be_copied_into_a_shell(tmp_path):
    import shlex

    argv = ["/usr/bin/mechlens", "steer", "--text", 'What\'s "it"; rm -rf $HOME & *', "--out", "my runs/a"]
    with open_run(verb="steer", config=Config("tiny"), out=tmp_path, wandb=OFF, argv=argv) as run:
        assert shlex.split(run.run.command) == ["mechlens", *argv[1:]]
    assert replace(run.run, argv=()).command == ""
    assert replace(run.run, argv=("ipykernel_launcher.py", "-f", "kernel.json")).command == ""
    assert replace(run.run, verb="guard_fit", argv=("mechlens", "guard", "fit", "--n", "3")).command.endswith("--n 3")


def test_a_setting_that_is_newer_than_the_run_was_at_its_default(tmp_path):
    @dataclass(frozen=True)
    class Old:
        seed: int = 3

    @dataclass(frozen=True)
    class New(Old):
        judge: str = "phrases"

    open_run(verb="v", config=Old(), out=tmp_path, wandb=OFF)._lock.release()  # as a kill of an older version does
    with pytest.raises(UserError, match='`judge` was "phrases" and is now "zhao"'):
        open_run(verb="v", config=New(judge="zhao"), out=tmp_path, wandb=OFF)
    with open_run(verb="v", config=New(), out=tmp_path, wandb=OFF) as run:
        assert run.run.resolved == {"seed": 3, "judge": "phrases"}


def test_a_runs_sentence_is_its_headline_or_else_the_first_of_its_verdict(tmp_path: Path) -> None:
    open_ = Headline(
        "inconclusive", "D is 0.81 [0.65, 0.99]", "where one variable reaches 0.34", "more would settle it"
    )
    assert str(open_) == ("Inconclusive: D is 0.81 [0.65, 0.99] where one variable reaches 0.34; more would settle it.")
    assert str(Headline("nothing to see")) == "Nothing to see."
    run = Run(id="a", verb="v", config={}, resolved={}, status="success", started="2026-01-01T00:00:00+00:00")
    assert run.sentence == ""
    assert replace(run, verdict="Inconclusive. D is 0.81, open. More.").sentence == "Inconclusive: D is 0.81, open."
    write_run(replace(run, headline="Two: it is.", verdict="Long."), tmp_path)
    assert read_run(tmp_path).sentence == "Two: it is."


def test_a_run_that_failed_by_what_was_asked_gives_its_folder_to_the_mended_call(tmp_path):
    def fail(error, out=tmp_path, **found):
        with start(out) as run:
            run.table("prompts", pd.DataFrame({"x": [1]}))
            run.metrics(found)
            raise error

    with pytest.raises(UserError):
        fail(UserError("too few; take about 2 times as many"))
    failed = open_run_folder(tmp_path)
    assert failed.state.startswith("failed: too few; take about 2 times as many; mend it and give the c")
    with start(tmp_path, seed=6):
        pass
    anew = read_run(tmp_path)
    assert (anew.status, anew.seed, anew.tables) == ("success", 6, {})
    assert anew.id != failed.record.id
    assert not (tmp_path / "tables" / "prompts.parquet").exists()
    # What found something, or was no fault of the options, keeps its folder.
    for name, error, found in (
        ("results", UserError("late"), {"a": Estimate(1.0, 1.0, 1.0, 1)}),
        ("crash", RuntimeError("no memory"), {}),
    ):
        with pytest.raises(type(error)):
            fail(error, tmp_path / name, **found)
        with pytest.raises(UserError, match="made with other options"):
            start(tmp_path / name, seed=6)
