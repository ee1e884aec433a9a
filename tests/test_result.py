"""A run as an object: opened and just made are one, it gives what lies on the disk, and shows words as words."""

import base64
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.directions.direction import require_contrast
from mechlens.methods.guard.fitted import GuardSettings, Place
from mechlens.methods.guard.rules import LinearScore
from mechlens.methods.statistics.calibration import Calibration
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.runs.lock import FolderLock
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.report.still import still
from mechlens.runs.results.saved import KINDS
from mechlens.runs.run import Inputs
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings

OFF = WandbSettings(mode="disabled")
EVIL = '<script>alert("x")</script> & <b>bold</b>'
CHECKPOINT = Checkpoint(name="tiny", path="/models/tiny", fingerprint="ab" * 32)
LABELS = ("harmful", "harmless")
WORDS = {"title": EVIL, "xlabel": EVIL, "ylabel": "AUROC"}


@dataclass(frozen=True)
class Config:
    model: str = "org/tiny"
    seed: int = 0


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    wide = pd.DataFrame({"level": [*range(6)] * 2, "auroc": rng.random(12), "curve": [EVIL] * 6 + ["b"] * 6})
    wide.loc[3, "auroc"] = math.nan
    return wide.assign(low=wide["auroc"] - 0.1, high=wide["auroc"] + 0.1, cell=[f"post[{k}]" for k in range(6)] * 2)


def drawn() -> dict[str, Any]:
    """A figure of every kind, by name."""
    table, curves = frame(), {"x": "level", "y": "auroc", "group": "curve"}
    band = {"low": "low", "high": "high", "hline": 0.5}
    return {
        "points": figures.scatter(table, **curves, hover=["curve"], hline=0.0, vline=0.0, **WORDS),
        "lines": figures.lines(table, **curves, **band, **WORDS),
        "bars": figures.bars(table, **curves, **band, **WORDS),
        "grid": figures.heatmap(table, x="curve", y="cell", value="auroc", center=0.5, **WORDS),
        "histogram": figures.histogram(table, value="auroc", group="curve", title=EVIL, xlabel="x"),
    }


def direction() -> ml.Direction:
    return ml.Direction(torch.randn(4), 2, "inst", "resid", "mean difference", LABELS, CHECKPOINT, "t" * 64, ("a",))


def grid() -> ml.DirectionGrid:
    vectors = torch.randn(3, 1, 4).to(torch.bfloat16)
    return ml.DirectionGrid(
        vectors, (0, 1, 2), ("inst",), "resid", "mean difference", LABELS, CHECKPOINT, "t", ("a",), "inst"
    )


def guard() -> ml.FittedGuard:
    settings = GuardSettings("logistic", ("inst",), "best", None, 5, 0, "harmful", "harmless")
    place = Place(2, "inst", LinearScore(torch.randn(4, dtype=torch.float64), 0.25), 0.9)
    calibration = Calibration(0.0, 1.0, 0.0, 20, 20)
    return ml.FittedGuard(settings, (place,), calibration, "resid", CHECKPOINT, "t", ("a", "b"), ())


def activations() -> ml.Activations:
    values = torch.randn(2, 3, 1, 4)
    values[1, 0, 0, 0] = torch.finfo(torch.float32).tiny
    return ml.Activations(values, (0, 1, 2), ("inst",), ("a", "b"), LABELS, ("a", "b"), "resid", CHECKPOINT, "t")


def patching() -> ml.PatchResult:
    return ml.PatchResult(
        torch.randn(1, 2, 1, 1), torch.ones(1), -torch.ones(1), ("p",), ("p",), (0, 1), ("inst",), (), (EVIL,),
        "resid_pre", "log-odds", "denoising", "plain",
    )  # fmt: skip


def answers() -> ml.Answers:
    return ml.Answers(("a",), (EVIL,), ((1, 2),), 8, CHECKPOINT, "t", "fast")


THINGS: dict[str, Callable[[], Any]] = {
    "Direction": direction, "DirectionGrid": grid, "FittedGuard": guard, "Activations": activations,
    "PatchResult": patching, "Answers": answers, "Checkpoint": lambda: CHECKPOINT,
    "Split": lambda: ml.Split((0,), (1,), (2,), (0.5, 0.2, 0.3), 0),
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return same(list(vars(one).items()), list(vars(other).items())) if hasattr(one, "__dict__") else one == other


def record(folder: Path) -> Path:
    with open_run(verb="separate", config=Config(), out=folder, wandb=OFF, argv=["mechlens", "separate"]) as run:
        run.prompts([Prompt("a", EVIL, "harmful")])
        deciding = {"lost": Estimate.missing(3), "auroc": Estimate(0.9, 0.8, 0.95, 40)}
        run.metrics({"n.prompts": Estimate.exact(3, 5), **deciding})
        run.table("auroc_by_level", frame())
        names = [run.figure(name, figure) for name, figure in drawn().items()]
        run.artifact("direction", direction(), inputs={})
        run.artifact("directions", grid(), inputs={})
        run.artifact("guard", guard(), inputs={})
        words = {"auroc": EVIL}
        section = Section("Where", figures=tuple(names[1:2]))
        run.report(Report("T", "Q?", f"Two {EVIL}. More.", numbers=deciding, words=words, sections=(section,)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "first")


def test_a_run_that_was_just_made_and_one_that_is_opened_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechlens.studies import driver
    from mechlens.studies.registry import Study

    @dataclass(frozen=True)
    class Small:
        out: Path
        wandb: WandbSettings = OFF

    def execute(config: Small, content: None, writer: Any) -> None:
        writer.metrics({"a": Estimate(0.5, 0.4, 0.6, 9), "lost": Estimate.missing(2)})
        writer.table("t", pd.DataFrame({"x": [1]}))

    study = Study("small", Small, lambda config: driver.Preparation(None, Inputs()), execute)
    monkeypatch.setattr(driver, "study_of", lambda config: study)
    run = ml.run(Small(tmp_path / "out"))
    opened = ml.open(tmp_path / "out")
    assert isinstance(run, ml.RunResult)
    assert opened == run
    assert repr(opened) == repr(run)
    assert ml.open(str(tmp_path / "out")) == ml.open(tmp_path / "out" / "run.json") == run
    # It goes wherever a path does.
    assert ml.read_run(run) == run.record
    assert Path(run) == Path(os.fspath(run)) == run.folder
    folder, kept = run
    assert (folder, kept) == (run.folder, run.record)


def test_it_has_the_record_in_frames_and_words(made: Path) -> None:
    run = ml.open(made)
    assert run.sentence == run.record.sentence
    assert run.verdict == f"Two {EVIL}. More."
    metrics = run.metrics
    assert list(metrics.columns) == ["name", "words", "value", "low", "high", "n"]
    assert metrics["name"].tolist() == ["lost", "auroc", "n.prompts"]  # those that decide come first
    assert metrics["words"].tolist() == ["lost", EVIL, "number of prompts"]
    assert metrics["low"].isna().tolist() == [True, False, True]  # a count has no interval
    on_disk = json.loads((made / "run.json").read_text())["metrics"]
    for row in metrics.to_dict("records"):
        for part, value in on_disk[row["name"]].items():
            assert row[part] == value or math.isnan(row[part])
            assert part in ("low", "high") or row[part] == value or value is None
    assert set(run.tables) == {"prompts", "auroc_by_level"}
    for name in run.tables:
        pd.testing.assert_frame_equal(run.tables[name], pd.read_parquet(made / "tables" / f"{name}.parquet"))
    pd.testing.assert_frame_equal(run.tables["auroc_by_level"], frame())
    assert list(run.figures) == ["lines", "points", "bars", "grid", "histogram"]  # the report's come first
    for name, figure in drawn().items():
        assert json.loads(run.figures[name].to_json()) == json.loads(figure.to_json())
    assert set(run.directions) == {"direction", "directions"}
    assert set(run.artifacts) == {"direction", "directions", "guard"}
    assert isinstance(run.directions["directions"].at(1, "inst"), ml.Direction)
    assert run.report == made / "report.html"
    assert repr(run.tables) == "2 tables: prompts, auroc_by_level"
    assert repr(run).endswith("2 in .tables, 5 in .figures, 2 in .directions")


def test_a_name_that_is_not_there_is_a_key_error_that_names_the_nearest(made: Path) -> None:
    run = ml.open(made)
    with pytest.raises(KeyError) as missing:
        run.tables["auroc_by_levels"]
    assert isinstance(missing.value, UserError)
    assert str(missing.value).startswith("there is no table 'auroc_by_levels' (did you mean 'auroc_by_level'?); choose")
    assert run.figures.get("absent") is None
    assert "lines" in run.figures


def test_it_shows_words_as_words_and_no_script(made: Path) -> None:
    run = ml.open(made)
    page = run._repr_html_()
    assert len(page) < 30_000
    for shown in (page, ml.list_runs(made.parent)._repr_html_()):
        assert "<script" not in shown
        assert "<b>bold" not in shown
        assert "&lt;script&gt;" in shown
    assert "Not measurable: lost (n = 3)." in page
    assert "[0.800, 0.950], n = 40" in page
    picture = base64.b64decode(page.split("data:image/svg+xml;base64,")[1].split('"')[0]).decode()
    assert picture == still(run.figures["lines"])


@pytest.mark.parametrize("name", ["points", "lines", "bars", "grid", "histogram"])
def test_a_still_figure_is_small_and_whole_and_holds_no_markup(name: str, made: Path) -> None:
    from xml.etree import ElementTree

    bundle = ml.open(made).figures[name]._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
    config = bundle["application/vnd.plotly.v1+json"]["config"]
    assert (config["showSendToCloud"], config["plotlyServerURL"]) == (False, "")
    nbformat.validate(  # as a notebook keeps it
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", bundle)])]
        )
    )
    picture = bundle["image/svg+xml"]
    assert len(picture) < 20_000
    root = ElementTree.fromstring(picture)
    assert {part.tag.rpartition("}")[2] for part in root.iter()} <= {"svg", "rect", "path", "text"}
    assert EVIL in [part.text for part in root.iter()]
    assert not {"nan", "inf"} & {
        word.lower() for part in root.iter() for value in part.attrib.values() for word in value.split()
    }


def test_a_figure_of_another_kind_is_named_and_nothing_in_it_is_markup() -> None:
    import plotly.graph_objects as go

    evil = '"/><script>alert(1)</script>'
    odd = {
        "box": go.Figure(go.Box(y=[1, 2])),
        "lying": go.Figure(go.Bar(x=[1, 2], y=["a", "b"], orientation="h")),
        "no values": go.Figure(go.Scatter(x=["2026-01-01"])),
        "colours": go.Figure(
            [{"type": "scatter", "x": [0, 1], "y": [1, 2], "fill": "tozeroy", "fillcolor": evil, "name": evil}],
            skip_invalid=True,
        ),
        "nothing": go.Figure(),
    }
    for name, figure in odd.items():
        picture = still(figure.update_layout(title=evil))
        assert "<script" not in picture
        assert ("only shown by plotly" in picture) == (name in ("box", "lying"))
        assert "&lt;script&gt;" in picture


def test_no_name_in_a_record_leads_out_of_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes((folder / "direction.safetensors").read_bytes())
    run = ml.open(folder)
    outside = replace(run.record.artefacts["direction"], file="../secret.safetensors")
    led = replace(run, record=replace(run.record, artefacts={"x": outside}, tables={"../../x": "0"}))
    for read in (lambda: led.artifacts["x"], lambda: led.tables["../../x"]):
        with pytest.raises(UserError, match="can't be the name of a file"):
            read()
    assert not led.directions


def test_a_run_that_did_not_end_well_says_so(folder: Path) -> None:
    run = ml.open(folder)
    killed = replace(run, record=replace(run.record, status="started"))
    failed = replace(run, record=replace(run.record, status="error", error=f"MemoryError: {EVIL}"))
    assert f"interrupted: the same command goes on: {run.record.command}" in repr(killed)
    assert "interrupted: the same command goes on: " in killed._repr_html_()
    lock = FolderLock(folder)
    assert (killed.status, killed.state) == ("running", "running")
    lock.release()
    assert f"failed (MemoryError: {EVIL})" in repr(failed)
    assert "failed (MemoryError: &lt;script&gt;" in failed._repr_html_()
    (folder / "report.html").unlink()
    with pytest.raises(UserError, match=r"there is no .*report\.html"):
        _ = ml.open(folder).report
    assert "no report yet" in ml.open(folder)._repr_html_()


@pytest.mark.parametrize("how", ["truncated", "gone", "another"])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("run.json", lambda run: run),
        ("tables/auroc_by_level.parquet", lambda run: run.tables["auroc_by_level"]),
        ("figures/lines.json", lambda run: run.figures["lines"]),
        ("direction.safetensors", lambda run: run.artifacts["direction"]),
    ],
)
def test_damage_is_one_sentence_and_never_another_number(how: str, file: str, read: Any, folder: Path) -> None:
    path = folder / file
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if how == "truncated" else b"{}")
    with pytest.raises(UserError) as error:
        read(ml.open(folder))
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    if file != "run.json":
        ml.open(folder)._repr_html_()  # shows what is left
        repr(ml.open(folder))


def test_a_folder_of_an_earlier_version_is_opened(made: Path) -> None:
    for old in ml.list_runs(Path(__file__).parent / "old_runs"):
        assert old.metrics["value"].notna().any()
        assert all(isinstance(old.tables[name], pd.DataFrame) for name in old.tables)
        assert [type(old.artifacts[name]).__name__ for name in old.artifacts]
        assert "<table>" in old._repr_html_()


def test_every_kind_that_can_be_saved_is_tried_here_or_by_name() -> None:
    assert set(KINDS) - set(THINGS) == {"Centroids", "Controller", "Detection", "TokenBatch"}


@pytest.mark.parametrize("kind", list(THINGS))
def test_what_is_saved_is_opened_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    thing = THINGS[kind]()
    path = ml.save(thing, str(tmp_path / "it.safetensors"))
    again = ml.open(path)
    assert same(again, thing)
    assert again == thing
    assert hash(again) == hash(thing)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]
    assert b"pickle" not in path.read_bytes()


def test_results_with_tensors_compare_by_their_numbers() -> None:
    one = direction()
    assert one == replace(one, vector=one.vector.clone())
    assert one != replace(one, vector=one.vector + 1)
    assert one != replace(one, vector=one.vector.double())
    assert one != replace(one, level=one.level + 1)
    assert one != "a direction"
    assert len({one, replace(one, vector=one.vector.clone())}) == 1


@pytest.mark.parametrize("contrast", ["formal", ("a", "b", "c"), (1, 2), ["a", "b"]])
def test_a_direction_has_the_names_of_two_sides(contrast: Any) -> None:
    with pytest.raises(UserError, match=r"contrast is .*; give a tuple of the names of the two sides"):
        require_contrast(contrast)


def test_activations_of_prompts_without_a_position_are_saved_and_an_infinite_one_is_not(tmp_path: Path) -> None:
    acts = THINGS["Activations"]()
    lacking = replace(acts, values=acts.values.clone())
    lacking.values[0, :, 0] = math.nan
    assert ml.open(ml.save(lacking, tmp_path / "acts.safetensors")) == lacking
    lacking.values[0, :, 0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        ml.save(lacking, tmp_path / "x.safetensors")


def test_what_could_not_be_opened_is_not_saved(tmp_path: Path) -> None:
    odd = direction()
    object.__setattr__(odd, "site", 3)
    with pytest.raises(UserError, match="`open` would refuse, is not a complete Direction"):
        ml.save(odd, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_or_opened_is_said_in_a_sentence(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a list can't be saved; save one of Direction, "):
        ml.save([1], tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a guard that isn't fitted can't be saved"):
        ml.save(ml.LatentGuard(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"name it harm\.safetensors"):
        ml.save(direction(), tmp_path / "harm")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"there is no .*absent"):
        ml.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"is no run folder .*it holds the runs first"):
        ml.open(made.parent)
    with pytest.raises(UserError, match="is nothing that can be opened; give a run folder"):
        ml.open(made / "report.html")


def test_a_saved_direction_steers_as_before(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    prompts = [Prompt(str(i), f"Say {word}.", label) for i, (word, label) in enumerate(zip("ab", LABELS, strict=True))]
    harm = ml.mean_difference(ml.collect(model, prompts, positions=["inst"]), *LABELS, 1, "inst")
    again = ml.open(ml.save(harm, tmp_path / "harm.safetensors"))

    def steered(one: ml.Direction) -> Any:
        push = ml.Add(one, strength=4.0, unit="unit", layers=(1,), positions=ml.ALL, phase="prompt")
        return ml.answer_under(model, prompts, [push], max_new_tokens=4).tokens

    assert steered(again) == steered(harm)


def test_a_name_with_a_quote_is_cut_between_letters() -> None:
    from mechlens.runs.report import figures

    names = [f"{k}: ' a long token' that is too long" for k in range(5)]
    table = pd.DataFrame({"x": names, "y": [0] * 5, "value": [0.0] * 5})
    picture = still(figures.heatmap(table, x="x", y="y", value="value", title="", xlabel="", ylabel="", label=""))
    assert "&amp;" not in picture
    assert "a long token&#x27; that is too …" in picture
