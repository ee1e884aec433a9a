"""`mechlens wandb`: what was logged offline is uploaded by W&B's own command, and the view of a project."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sentence import Seen

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.run import Artefact, Inputs, Run, write_run
from mechlens.runs.wandb.sync import link_inputs
from mechlens.runs.wandb.workspace import workspace_of
from mechlens.studies.wandb import study
from mechlens.studies.wandb.config import SaveWorkspace, SyncRuns
from mechlens.studies.wandb.study import save_workspace, sync_runs

RUN = Run(
    id="separate-1", verb="separate", config={}, resolved={"model": "tiny"}, status="success",
    started="2026-01-01T00:00:00+00:00", inputs=Inputs(model="m" * 64, data={"harmful": "d" * 64}),
    metrics={"dissociation": Estimate(1.0, 0.5, 1.5, 40), "n.all": Estimate.exact(40, 40)},
    words={"dissociation": "D"}, headline="Two variables: D is 1.00 [0.50, 1.50].",
    artefacts={"direction": Artefact("direction.safetensors", "e" * 64, {"model": "m" * 64, "guard": "f" * 64})},
    figures=dict.fromkeys(("first", "second", "third", "fourth"), "0" * 64),
    tables={"quadrants": "0" * 64}, wandb_id="abc", wandb_project="me/mechlens",
)  # fmt: skip


def offline(folder: Path, run: Run = RUN) -> Path:
    """The folder of a run that W&B logged offline; the log."""
    log = folder / "wandb" / f"offline-run-{folder.name}" / "run-abc.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b":W&B")
    write_run(run, folder)
    return log


def log_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "has_login", lambda environ: False)


def test_what_there_is_to_upload_is_said_before_a_login_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_out(monkeypatch)
    screen = Seen()
    sync_runs(SyncRuns(folder=tmp_path), screen)
    assert "waits to be uploaded" in screen.shown[0]
    log = offline(tmp_path / "a")
    with pytest.raises(UserError, match="there is no login to W&B"):
        sync_runs(SyncRuns(folder=tmp_path), screen)
    log.with_name("run-abc.wandb.synced").write_bytes(b"")
    sync_runs(SyncRuns(folder=tmp_path), screen)
    assert screen.shown[0] == screen.shown[1]


@dataclass
class Server:
    """W&B's public API with some artefacts in it."""

    known: tuple[str, ...]
    used: list[str]

    def run(self, path: str) -> Any:
        assert path == "me/mechlens/abc"
        return SimpleNamespace(use_artifact=self.used.append)

    def artifact(self, path: str) -> str:
        if path not in self.known:
            raise ValueError(f"no artifact {path}")
        return path


def test_logs_are_uploaded_by_wandb_itself_and_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [offline(tmp_path / name) for name in ("a", "b")]
    asked: list[list[str]] = []

    def call(words: list[str], *, check: bool) -> Any:
        asked.append(words)
        for log in logs:
            log.with_name("run-abc.wandb.synced").write_bytes(b"")
        return subprocess.CompletedProcess(words, 0)

    server = Server((), [])
    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setattr(study, "has_login", lambda environ: True)
    monkeypatch.setattr(study, "public_api", lambda: server)
    screen = Seen()
    staged = [tmp_path / name / "wandb" / "data" / "artifacts" / "staging" / "x" for name in ("a", "b")]
    for file in staged:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    sync_runs(SyncRuns(folder=tmp_path), screen)
    assert [file.exists() for file in staged] == [False, False]  # an offline log needs them only until then
    assert all(log.exists() for log in logs)
    assert asked == [[sys.executable, "-m", "wandb", "sync", *(str(log.parent) for log in logs)]]
    assert screen.shown == ["2 of 2 uploaded, with 0 links to their inputs"]
    offline(tmp_path / "c")
    monkeypatch.setattr(subprocess, "run", lambda words, check: subprocess.CompletedProcess(words, 0))
    with pytest.raises(UserError, match="uploaded nothing"):
        sync_runs(SyncRuns(folder=tmp_path), screen)
    monkeypatch.setattr(subprocess, "run", lambda words, check: subprocess.CompletedProcess(words, 1))
    with pytest.raises(UserError, match="status 1"):
        sync_runs(SyncRuns(folder=tmp_path), screen)


def test_an_uploaded_run_is_linked_to_what_made_its_inputs_or_to_their_stubs() -> None:
    made, stub = f"me/mechlens/guard:sha256-{'f' * 16}", f"me/mechlens/input-model:sha256-{'m' * 16}"
    server = Server((made, stub), [])
    assert link_inputs(server, RUN) == 2  # nobody logged the data
    assert sorted(server.used) == [made, stub]


def test_a_view_has_the_main_figures_the_deciding_numbers_and_the_tables() -> None:
    pytest.importorskip("wandb_workspaces")
    view = workspace_of([RUN, replace(RUN, id="t", verb="track")], "me", "mechlens", "my view")
    told = json.dumps(view._to_model().model_dump(mode="json", by_alias=True))
    for name in ("0 main figures/first", "0 main figures/third", "dissociation", "tables/quadrants", "my view"):
        assert name in told, name
    assert "figures/fourth" not in told
    assert "n.all" not in told  # decides nothing
    assert told.count("tables by step/quadrants") >= 1
    assert "summary:sentence" in told


def test_a_view_needs_a_project_and_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_out(monkeypatch)
    screen = Seen()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: write(tmp_path / "none", None), "no run below"),
        (lambda: write(tmp_path / "one", "me/a"), "there is no login to W&B;.*`mechlens wandb sync "),
        (lambda: write(tmp_path / "two", "me/b"), "of the W&B projects me/a, me/b"),
    ]
    for prepare, said in cases:
        prepare()
        with pytest.raises(UserError, match=said):
            save_workspace(SaveWorkspace(folder=tmp_path), screen)
    assert screen.shown == []


def write(folder: Path, project: str | None) -> None:
    folder.mkdir()
    write_run(replace(RUN, wandb_project=project), folder)
