"""What W&B is told, read back from its offline log; what it is not told, looked for in every byte."""

import json
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.runs.headline import Headline
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.run import Inputs, read_run
from mechlens.runs.wandb.start import _group, choose_mode, has_login
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings

SECRET = "how do I quietly obtain a zorblax"
ANSWER = "certainly, visit the flumph market"
SYSTEM = "you are a grumbly wizard assistant"
ENDS = ("exit", "footer", "final")
SECRETS = (SECRET, ANSWER, SYSTEM)


@dataclass(frozen=True)
class Config:
    model: str
    level: int = 12
    system: str | None = None


@dataclass(frozen=True)
class Answers:
    ids: tuple[str, ...]
    answers: tuple[str, ...]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of a LevelDB log: 32 KiB blocks, each piece with crc, length and type before it."""
    at = 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            at += left
            continue
        if at + 7 + length > len(data):
            return
        yield kind, data[at + 7 : at + 7 + length]
        at += 7 + length


def read_log(out: Path) -> list:
    """Every record in the run's offline log, once W&B has written the last one."""
    (path,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    # `finish` returns a little before W&B's own process has flushed the log.
    while not (records := parse(path.read_bytes())) or records[-1].WhichOneof("record_type") not in ENDS:
        assert time.monotonic() < deadline, "W&B's log has no end"
        time.sleep(0.05)
    return records


def parse(data: bytes) -> list:
    """The records in the bytes of a log, up to the first that is not all there yet."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, whole = [], b""
    for kind, piece in chunks(data):
        # Types: 1 whole, 2 first, 3 middle, 4 last.
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            records.append(Record.FromString(whole))
    return records


def updates(records: list, kind: str, field: str) -> dict[str, object]:
    """The last value of every key that records of one kind set."""
    found: dict[str, object] = {}
    for record in records:
        if record.WhichOneof("record_type") != kind:
            continue
        message = getattr(record, kind)
        for item in getattr(message, field):
            key = item.key or "/".join(item.nested_key)
            found[key] = json.loads(item.value_json)
    return found


def record_everything(out: Path, settings: WandbSettings, config: Config) -> None:
    frame = pd.DataFrame(
        {
            "id": ["p1", "p2"],
            "text": [SECRET, "x"],
            "goal": [f"goal: {SECRET}!", "y"],
            "judge_answer": ["n", ANSWER],
            "score": [0.5, float("nan")],
            "rank": np.array([1, 2]),
        }
    )
    with open_run(verb="separate", config=config, out=out, wandb=settings) as run:
        run.inputs(Inputs(model="m" * 64, template="t" * 64, data={"harmful": "d" * 64}), device="cpu")
        run.prompts([Prompt("p1", SECRET, system=SYSTEM)])
        run.metrics({"auroc.inst": Estimate(0.9, 0.8, 0.95, 40), "refusal": Estimate.missing(2)})
        run.log_step(10, {"loss": 0.5})
        run.log_step(20, {"loss": 0.25})
        run.table("scores", frame)
        words = {"title": "t", "xlabel": "x", "ylabel": "y"}
        run.figure("safe", figures.scatter(frame, x="rank", y="score", hover=["id"], **words))
        run.figure("hover", figures.scatter(frame, x="rank", y="score", hover=["text"], **words))
        run.figure("axis", figures.bars(frame, x="text", y="score", **words))
        packed = go.Scatter(x=np.arange(3.0), y=np.arange(3), text=[SECRET] * 3, name=f"about {SECRET}")
        run.figure("own", go.Figure(packed))
        run.artifact("direction", Checkpoint("tiny", "/tiny"), inputs={"model": "m" * 64, "harmful": "d" * 64})
        steps = pd.DataFrame({"step": [0, 0, 10], "number": ["a", "b", "a"], "value": [0.1, 0.2, 0.3]})
        run.table("over_steps", steps)
        headline = Headline("inconclusive", "D is 0.81 [0.65, 0.99]", "where one variable reaches 0.34")
        run.report(Report("T", "Q?", "V.", headline=headline, sections=(Section("S", figures=("axis", "safe")),)))
        run.artifact("answers", Answers(("p1",), (ANSWER,)), inputs={"direction": "e" * 64})


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run without text in W&B's offline log: its folder and the log's records."""
    out = tmp_path_factory.mktemp("told")
    settings = WandbSettings(mode="offline", entity="me", group="g", tags=("a", "b"), name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        record_everything(out, settings, Config("tiny", system=SYSTEM))
    return out, read_log(out)


def files(out: Path) -> dict[str, dict]:
    """W&B's media files as JSON, by name."""
    return {path.name: json.loads(path.read_text()) for path in out.rglob("wandb/*run*/files/media/*/*/*.json")}


def test_config_and_names_are_told(told):
    out, records = told
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config |= updates(records, "config", "update")
    assert (config["model"], config["level"], config["system"]) == ("tiny", 12, "[withheld]")
    assert config["mechlens"]["id"] == read_run(out).id
    assert config["inputs"] == {"model": "m" * 64, "template": "t" * 64, "data": {"harmful": "d" * 64}}
    assert (run.project, run.entity, run.run_group, run.display_name) == ("mechlens", "me", "g", "mine")
    assert list(run.tags) == ["a", "b"]
    assert run.job_type == "separate"
    assert run.run_id == read_run(out).wandb_id


def test_metrics_are_told_with_their_intervals(told):
    summary = updates(told[1], "summary", "update")
    assert summary["auroc.inst"] == 0.9
    assert [summary[f"auroc.inst/{part}"] for part in ("low", "high", "n")] == [0.8, 0.95, 40]
    assert summary["refusal"] is None
    assert summary["refusal/n"] == 2
    assert summary["status"] == "success"


def test_the_sentence_is_the_runs_own_in_summary_and_notes(told):
    out, records = told
    sentence = read_run(out).sentence
    assert sentence == "Inconclusive: D is 0.81 [0.65, 0.99] where one variable reaches 0.34."
    assert updates(records, "summary", "update")["sentence"] == sentence
    assert [r.run.notes for r in records if r.WhichOneof("record_type") == "run"][-1] == sentence


def test_a_sentence_that_holds_a_prompt_stays_here(tmp_path):
    with open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="offline")) as run:
        run.prompts([Prompt("p1", SECRET)])
        run.report(Report("T", "Q?", f"The prompt {SECRET} is a bad one."))
    assert SECRET in read_run(tmp_path).sentence
    assert SECRET.encode() not in everything(tmp_path)
    assert updates(read_log(tmp_path), "summary", "update")["sentence"] == "[withheld]"


def test_tables_over_checkpoints_are_cut_by_step_on_the_axis_of_the_steps(told):
    out, records = told
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    cut = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]
    cut = [row for row in cut if "tables by step/over_steps/path" in row]
    assert [row["step"] for row in cut] == [0, 10]
    (run_folder,) = (out / "wandb").glob("offline-run-*")
    assert [row["tables by step/over_steps/nrows"] for row in cut] == [2, 1]
    for row in cut:
        path = run_folder / "files" / row["tables by step/over_steps/path"]
        table = json.loads(path.read_text())
        assert {line[0] for line in table["data"]} == {row["step"]}
    defined = {r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert defined["tables by step/over_steps"] == "step"
    assert not any("tables by step/scores" in row for row in history_keys(records))


def test_runs_in_one_folder_are_one_group(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert _group(WandbSettings(), tmp_path / "sweep" / "a") == "sweep"
    assert _group(WandbSettings(group="mine"), tmp_path / "sweep" / "a") == "mine"
    monkeypatch.setenv("WANDB_RUN_GROUP", "outside")
    assert _group(WandbSettings(), tmp_path / "sweep" / "a") == "outside"


def test_inputs_are_told_offline_as_stubs_that_can_be_linked_later(told):
    _, records = told
    artefacts = {r.artifact.name: r.artifact for r in records if r.WhichOneof("record_type") == "artifact"}
    for name, sha in (("model", "m"), ("template", "t"), ("harmful", "d"), ("direction", "e")):
        stub = artefacts[f"input-{name}"]
        assert stub.type == "input"
        assert json.loads(stub.metadata) == {"sha256": sha * 64}
        assert f"sha256-{sha * 16}" in stub.aliases


def test_steps_have_their_axis(told):
    records = [record for record in told[1] if record.WhichOneof("record_type") == "history"]
    rows = [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in r.history.item} for r in records]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(10, 0.5), (20, 0.25)]
    defined = {r.metric.name: r.metric.step_metric for r in told[1] if r.WhichOneof("record_type") == "metric"}
    assert defined["loss"] == "step"


def test_tables_are_told_without_their_words(told):
    out, records = told
    tables = [data for name, data in files(out).items() if name.endswith(".table.json")]
    (scores,) = (table for table in tables if "score" in table["columns"])
    assert scores == {**scores, "columns": ["id", "score", "rank"], "data": [["p1", 0.5, 1], ["p2", None, 2]]}
    assert any("tables/scores" in row for row in history_keys(records))


def history_keys(records: list) -> list[set[str]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0] for item in row.item} for row in rows]


def test_figures_are_told_as_lists_and_without_words(told):
    out, records = told
    drawn = {name.split("_")[0]: data for name, data in files(out).items() if name.endswith(".plotly.json")}
    shown = {key for row in history_keys(records) for key in row if "figures/" in key}
    # The report begins with "axis" and "safe"; "axis" has prompts as its axis: there is nothing to show without them.
    assert shown == {"0 main figures/safe", "0 main figures/hover", "figures/own"}
    assert set(drawn) == {"safe", "hover", "own"}
    assert drawn["safe"]["data"][0]["customdata"] == [["p1"], ["p2"]]
    assert drawn["own"]["data"][0]["x"] == [0.0, 1.0, 2.0]
    assert drawn["own"]["data"][0]["name"] == "[withheld]"
    assert all("bdata" not in json.dumps(data) for data in drawn.values())


def test_artefacts_are_told_with_their_inputs(told):
    out, records = told
    artefacts = {r.artifact.name: r.artifact for r in records if r.WhichOneof("record_type") == "artifact"}
    for name, kind in (("direction", "checkpoint"), ("answers", "answers")):
        kept = read_run(out).artefacts[name]
        assert artefacts[name].type == kind
        assert json.loads(artefacts[name].metadata) == {"sha256": kept.sha256, "inputs": kept.inputs}
        assert f"sha256-{kept.sha256[:16]}" in artefacts[name].aliases
    assert [entry.path for entry in artefacts["direction"].manifest.contents] == ["direction.safetensors"]
    # A file that holds answers stays; its hash is told.
    assert not artefacts["answers"].manifest.contents


def test_no_word_of_a_prompt_is_in_any_file_of_wandb(told):
    out, _ = told
    assert all(word.encode() not in everything(out) for word in SECRETS)
    assert SECRET.encode() in (out / "tables" / "prompts.parquet").read_bytes()


def everything(out: Path) -> bytes:
    """All bytes that W&B has written for the run."""
    read_log(out)
    kept = [path for path in (out / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert kept
    return b"".join(path.read_bytes() for path in kept)


def test_words_are_told_when_asked_for(tmp_path):
    settings = WandbSettings(mode="offline", upload_text=True)
    record_everything(tmp_path, settings, Config("tiny", system=SYSTEM))
    assert all(word.encode() in everything(tmp_path) for word in SECRETS)


def test_the_command_line_and_the_error_keep_their_words(tmp_path):
    code = (
        "from pathlib import Path; from mechlens.settings import WandbSettings\n"
        "from mechlens.models.checkpoint import Checkpoint; from mechlens.runs.writer import open_run\n"
        f"with open_run(verb='v', config=Checkpoint('a', 'b'), out=Path({str(tmp_path)!r}),"
        " wandb=WandbSettings(mode='offline')): raise ValueError(__import__('sys').argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--text", SECRET], capture_output=True, check=False)
    assert read_run(tmp_path).error == f"ValueError: {SECRET}"
    assert SECRET.encode() not in everything(tmp_path)
    summary = updates(read_log(tmp_path), "summary", "update")
    assert (summary["status"], summary["error"]) == ("error", "ValueError")
    assert b"wandb" not in done.stdout + done.stderr.split(b"Traceback")[0]


def test_nothing_is_left_in_the_home_folder(tmp_path):
    with open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="offline")) as run:
        run.table("t", pd.DataFrame({"a": [1]}))
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and "artifacts" in path.parts]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_failure_of_wandb_is_one_warning(broken, tmp_path, monkeypatch):
    import wandb

    def fail(*args, **kwargs):
        raise TypeError("W&B changed again")

    monkeypatch.setattr(*((wandb, "init", fail) if broken == "init" else (wandb, "Table", fail)))
    with (
        warnings.catch_warnings(record=True) as seen,
        open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="offline")) as run,
    ):
        warnings.simplefilter("always")
        run.table("t", pd.DataFrame({"a": [1]}))
        run.table("u", pd.DataFrame({"a": [1]}))
        run.metric("m", Estimate(1.0, 1.0, 1.0, 1))
    told = [str(warning.message) for warning in seen if issubclass(warning.category, RuntimeWarning)]
    assert len(told) == 1
    assert "W&B changed again" in told[0]
    assert read_run(tmp_path).status == "success"
    assert (tmp_path / "tables" / "u.parquet").exists()


def test_going_online_falls_back_to_the_offline_log(tmp_path, monkeypatch):
    import wandb

    start = wandb.init

    def only_offline(**settings):
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return start(**settings)

    monkeypatch.setattr(wandb, "init", only_offline)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with (
        pytest.warns(RuntimeWarning, match="no route to host"),
        open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings()) as run,
    ):
        run.metric("m", Estimate(1.0, 1.0, 1.0, 1))
    assert updates(read_log(tmp_path), "summary", "update")["m"] == 1.0


def test_a_disabled_mirror_leaves_no_trace(tmp_path):
    with open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="disabled")) as run:
        run.metric("m", Estimate(1.0, 1.0, 1.0, 1))
    assert not (tmp_path / "wandb").exists()
    assert read_run(tmp_path).wandb_id is None


def test_the_mode_follows_settings_then_environment_then_login(monkeypatch):
    login = {"WANDB_API_KEY": "k" * 40}
    assert choose_mode(WandbSettings(), {}) == "offline"
    assert choose_mode(WandbSettings(), login) == "online"
    assert choose_mode(WandbSettings(), {**login, "WANDB_MODE": "dryrun"}) == "offline"
    assert choose_mode(WandbSettings(), {**login, "WANDB_MODE": "disabled"}) == "disabled"
    assert choose_mode(WandbSettings(), {"WANDB_MODE": "online"}) == "online"
    assert choose_mode(WandbSettings(mode="offline"), {**login, "WANDB_MODE": "online"}) == "offline"


@pytest.mark.parametrize("machine", ["api.wandb.ai", "somewhere.else"])
def test_a_login_is_found_in_netrc(machine, tmp_path, monkeypatch, capfd):
    (tmp_path / "no-netrc").write_text(f"machine {machine}\n  login user\n  password {'k' * 40}\n")
    assert has_login({}) == (machine == "api.wandb.ai")
    assert capfd.readouterr() == ("", "")


def test_online_without_a_login_is_offline_and_no_question(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", None)
    with (
        pytest.warns(RuntimeWarning, match="no login"),
        open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="online")),
    ):
        pass
    assert read_log(tmp_path)


def test_online_inputs_are_linked_and_unknown_ones_get_a_stub(tmp_path, monkeypatch):
    import wandb

    used: list[object] = []

    class Server:
        id = "abc"
        config = summary = type("Sink", (), {"update": lambda self, *a, **k: None})()

        def use_artifact(self, item, aliases=None):
            used.append(item if isinstance(item, str) else (item.name, item.metadata))
            if item == f"model:sha256-{'m' * 16}":
                raise wandb.errors.CommError("not found")

        def log_artifact(self, item, aliases):
            used.append(f"logged {item.name}")

        def finish(self, exit_code):
            used.append(exit_code)

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb, "init", lambda **settings: Server())
    with open_run(verb="v", config=Config("a"), out=tmp_path, wandb=WandbSettings(mode="online")) as run:
        inputs = {"model": "m" * 64, "direction": "d" * 64}
        run.artifact("result", Checkpoint("tiny", "/tiny"), inputs=inputs)
        staged = tmp_path / "wandb" / "data" / "artifacts" / "staging"
        assert staged.exists()
    assert not staged.parents[1].exists()  # all is uploaded by then
    stub = ("input-model", {"sha256": "m" * 64})
    expected = [f"model:sha256-{'m' * 16}", stub, f"direction:sha256-{'d' * 16}", "logged result", 0]
    assert used == expected
