"""The command line as people use it: every verb end to end on a tiny model, and every mistake in one sentence."""

import datetime
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pandas as pd
import pytest
import torch
import tyro
from annotated_types import Ge
from safetensors.torch import load_file, save_file
from saved import requests, save_model, write_prompts
from sentence import require_one_sentence
from tiny import tiny_tokenizer

from mechlens.cli import main
from mechlens.methods.directions.direction import Direction
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoints.outline import Outline
from mechlens.registry import Registry
from mechlens.runs import artifacts
from mechlens.runs.folder import FolderCache
from mechlens.runs.results.paired import rows_by_number
from mechlens.runs.results.result import open_run_folder
from mechlens.runs.run import read_run, write_run
from mechlens.studies.driver import summary
from mechlens.studies.registry import commands
from mechlens.studies.steer.study import _sides

QUICK = ["--resamples", "40", "--permutations", "20", "--wandb.mode", "disabled"]
QUADRANTS = ("refused_harmful", "accepted_harmful", "refused_harmless", "accepted_harmless")
# Issue 2 section 6, then issue 3 section 2.
METRICS = (
    "harmful_auroc.inst", "harmful_auroc.last", "token_identity_auroc.inst", "tfidf_auroc",
    *(f"n.{name}" for name in QUADRANTS),
    "refused_auroc.inst", "refused_auroc.last", "harmful_auroc.inst.accepted", "refused_auroc.last.harmful",
    "cos_harm_refusal", *(f"belief_harm.{name}" for name in QUADRANTS),
    *(f"belief_refusal.{name}" for name in QUADRANTS),
    "refusal_rate.full_template", "refusal_rate.no_post_tokens",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, so that numbers don't hang on the machine; and the way warnings are shown comes back."""
    with one_thread(), warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-chat"))


class Said(NamedTuple):
    """What a command printed and how it ended."""

    code: Any
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines on stderr other than warnings."""
        return [line for line in self.err.splitlines() if not line.startswith("mechlens: warning: ")]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process."""

    def call(*argv: object) -> Said:
        capfd.readouterr()
        code: Any = 0
        try:
            main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return call


def separate(model: str, out: Path, *more: object) -> list[object]:
    return ["separate", "--model", model, "--n", 48, "--max-new-tokens", 4, "--out", out, *QUICK, *more]


def direction(model: str, folder: Path, *more: object) -> list[object]:
    """The command on two files in the folder, which are written where they aren't there yet."""
    for name, word in (("up", "make"), ("down", "break")):
        if not (folder / f"{name}.jsonl").exists():
            write_prompts(folder / f"{name}.jsonl", requests(24, word))
    files = ["--positive", folder / "up.jsonl", "--negative", folder / "down.jsonl"]
    return ["direction", "--model", model, *files, "--out", folder / "out", *QUICK, *more]


@pytest.fixture(scope="module")
def separated(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished separation study, looked at by several tests."""
    out = tmp_path_factory.mktemp("runs") / "separate"
    with one_thread(), warnings.catch_warnings():
        main([str(word) for word in separate(model, out, "--keep-cache")])
    return out


@pytest.fixture
def found(model: str, tmp_path: Path, run: Any) -> Path:
    """A finished run of `direction` on files that a test may change; the folder that holds everything."""
    own = shutil.copytree(model, tmp_path / "model")
    assert run(*direction(str(own), tmp_path)).code == 0
    return tmp_path


def numbers(out: Path) -> dict[str, dict[str, float | None]]:
    """The metrics as they stand in run.json."""
    found: dict[str, dict[str, float | None]] = json.loads((out / "run.json").read_text())["metrics"]
    return found


# What is mistyped


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("select --model m --out x --n forty", "mechlens: --n is 'forty'; it must be a whole number or None"),
        ("select --model m --out x --seed=b", "mechlens: --seed is 'b'; it must be a whole number"),
        ("selct --n 3", "mechlens: there is no command 'selct' (did you mean 'select'?); choose from positions, "),
        ("behavior --out x", "mechlens: there is no command 'behavior' (did you mean 'behaviours'?); choose from "),
        (
            "direction --postive harmful --out x",
            "mechlens: direction has no option --postive (did you mean --positive?);",
        ),
        ("direction --positive harmful --out x", "mechlens: direction needs --negative; see mechlens direction --help"),
        (
            "positions smollm2 hi",
            "mechlens: 'smollm2' and 'hi' stand alone, and every value follows its option; positions",
        ),
        (
            "separate --out x --n 3 4",
            "mechlens: '4' stands alone, and every value follows its option; mechlens separate",
        ),
        (
            "separate --out x --dtype flat32",
            "mechlens: --dtype is 'flat32' (did you mean float32?); choose from auto, fl",
        ),
        ("separate --model=m --out", "mechlens: --out stands without a value; give one after it"),
        ("compare a --base x --out o", "mechlens: compare needs SECOND; see mechlens compare --help"),
        ("runs rerun", "mechlens: runs rerun needs FOLDER; see mechlens runs rerun --help"),
        ("runs show --folder x", "mechlens: runs show needs FOLDER without --folder before it; see mechlens runs show"),
        ("causal --layers 1 2.5 --out x", "mechlens: --layers is '2.5'; it must be a whole number"),
        ("guard", "mechlens: guard needs a command after it; choose from fit, eval, predict"),
        ("-x", "mechlens: mechlens has no option -x; see mechlens --help"),
        ("runs lst", "mechlens: there is no command of `runs` 'lst' (did you mean 'list'?); choose from list, "),
    ],
)
def test_what_is_mistyped_is_one_sentence(typed: str, said: str, run: Any) -> None:
    ended = run(*typed.split())
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert ended.err.startswith(said)


def test_a_misspelt_option_is_looked_for_in_its_own_command(run: Any) -> None:
    said = run("select", "--model", "m", "--out", "x", "--seeed", 3).err
    assert "(did you mean --seed?)" in said
    assert "behaviours" not in said
    assert "compare" not in said


# Positions


def test_positions_are_shown_as_a_table(model: str, run: Any) -> None:
    said = run("positions", "--model", model, "--text", "Is the sky blue?")
    assert said.code == 0
    assert said.errors == []
    rows = [line.split("│") for line in said.out.splitlines() if "│" in line]
    roles = [cells[-2].strip() for cells in rows]
    assert roles.count("inst") == 1
    assert next(role for role in roles if role.startswith("post")) == "post[0]"
    inst = next(cells for cells in rows if cells[-2].strip() == "inst")
    assert inst[-3].strip() == "?"


def test_positions_speak_json_and_need_only_a_tokenizer(tmp_path: Path, run: Any) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    said = run("positions", "--model", tmp_path, "--text", "Is [bold]it[/bold] 🙂?", "--json", "--system", "Be brief.")
    record = json.loads(said.out)
    tokens = record["tokens"]
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    assert all(set(token) == {"index", "id", "token", "role"} for token in tokens)
    roles = [token["role"] for token in tokens]
    assert roles.count("inst") == 1
    assert roles[-1] == f"post[{sum(role.startswith('post') for role in roles) - 1}]"
    ids = [token["id"] for token in tokens]
    text = tiny_tokenizer().decode(ids)
    assert "Be brief." in text
    assert "Is [bold]it[/bold] 🙂?" in text
    assert said.errors == []


# Separate


def test_separate_records_every_number_with_its_interval(separated: Path) -> None:
    record = json.loads((separated / "run.json").read_text())
    assert record["status"] == "success"
    assert record["error"] is None
    missing = [name for name in METRICS if name not in record["metrics"]]
    assert missing == []
    for name, estimate in record["metrics"].items():
        assert set(estimate) - {"is_auroc"} == {"value", "low", "high", "n"}, name
        assert estimate.get("is_auroc", True), name  # said only of those that are
        value, low, high = estimate["value"], estimate["low"], estimate["high"]
        assert (value is None) == (low is None) == (high is None), name
        assert value is None or low - 1e-9 <= value <= high + 1e-9, (name, estimate)
        assert isinstance(estimate["n"], int), name
    counts = {name: record["metrics"][f"n.{name}"]["value"] for name in QUADRANTS}
    assert sum(counts.values()) == 3 * 48
    assert min(counts.values()) >= 10  # all four quadrants are measured here
    assert all(record["metrics"][name]["value"] is not None for name in METRICS if name != "cos_harm_refusal")


def test_aurocs_come_out_again_of_what_was_kept_by_prompt(separated: Path) -> None:
    made_of = rows_by_number(open_run_folder(separated))
    assert len(made_of) == 8
    assert {"harmful_auroc.inst", "harmful_auroc.inst.accepted", "refused_auroc.last.harmful"} <= set(made_of)


def test_separate_keeps_tables_that_agree_with_each_other(separated: Path) -> None:
    tables = {path.stem: pd.read_parquet(path) for path in (separated / "tables").glob("*.parquet")}
    assert tables.keys() >= {
        "prompts", "answers", "quadrant_counts", "agreement", "auroc_by_level", "auroc_chosen", "baselines",
        "cosines", "effect_norms", "beliefs", "scores_by_level", "folds", "dissociation",
    }  # fmt: skip
    assert len(tables["prompts"]) == len(tables["answers"]) == 144
    for _, folds in tables["folds"].groupby("seed"):
        fold = folds.set_index("id")["fold"]
        assert sorted(fold.index) == sorted(tables["prompts"]["id"])  # each is held out once
        families = tables["prompts"].assign(fold=fold[tables["prompts"]["id"]].to_numpy())
        families = families[families["family"] != ""]
        assert (families.groupby("family")["fold"].nunique() == 1).all()
    assert len(tables["folds"]) == 5 * 144
    if len(tables["beliefs"]):
        assert sorted(tables["beliefs"]["id"]) == sorted(tables["prompts"]["id"])
    answers = tables["answers"]
    said = answers["answer"].str.contains("I cannot")
    assert (said == answers["quadrant"].str.startswith("refused")).all()
    levels = tables["auroc_by_level"]
    chosen = tables["auroc_chosen"]
    merged = chosen.merge(levels, on=["contrast", "position", "level"], suffixes=("", "_there"))
    assert len(merged) == len(chosen)
    # The level may differ from fold to fold, so the two agree but for that.
    assert (merged["auroc"] - merged["auroc_there"]).abs().max() < 0.2
    assert not list(separated.rglob("*.partial"))


def test_the_report_is_one_page_that_asks_the_network_for_nothing(separated: Path) -> None:
    page = (separated / "report.html").read_text(encoding="utf-8")
    tags = re.findall(r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*>", page)
    assert [tag for tag in tags if re.search(r"\b(src|href|data)\s*=\s*[\"']?(https?:)?//", tag)] == []
    assert "@import" not in page
    assert "One variable suffices:" in page  # the rule stands in it
    for figure in (separated / "figures").glob("*.json"):
        assert f'id="figure-{figure.stem}"' in page
    assert 'class="status success"' in page
    assert "mechlens " in page


def test_runs_are_listed_and_shown(separated: Path, model: str, run: Any) -> None:
    assert require_one_sentence(separated).verb == "separate"
    listed = run("runs", "list", separated.parent)
    assert listed.code == 0
    assert f"{separated}  separate  {Path(model).name}  success  " in listed.out  # the folder is never split
    (found,) = map(json.loads, run("runs", "list", separated, "--json").out.splitlines())
    assert (found["folder"], found["sentence"]) == (str(separated), read_run(separated).sentence)
    assert found["model"] == model
    shown = run("runs", "show", separated)
    record = read_run(separated)
    assert f"{record.id}: separate, success" in shown.out
    for name in ("harmful_auroc.inst", "max_new_tokens", "directions_harmful"):
        assert name in shown.out


def test_a_rerun_gives_the_same_numbers(separated: Path, tmp_path: Path, run: Any) -> None:
    said = run("runs", "rerun", separated, "--out", tmp_path / "again")
    assert said.code == 0
    difference = re.match(r"the numbers are identical|largest difference: (\S+) in (\S+)", said.out)
    assert difference is not None
    assert float(difference[1] or 0) <= 1e-6
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["id"] != read_run(separated).id
    for name, estimate in numbers(separated).items():
        for part, value in estimate.items():
            other = again["metrics"][name][part]
            assert (value is None and other is None) or value == pytest.approx(other, abs=1e-6), (name, part)


def test_the_same_command_gives_a_finished_run_back_and_else_goes_on_from_its_cache(
    model: str, separated: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, record = numbers(separated), read_run(separated)
    put: list[str] = []
    original = FolderCache.put
    monkeypatch.setattr(FolderCache, "put", lambda self, key, value: (put.append(key), original(self, key, value)))
    for more in ((), ("--keep-cache",)):
        said = run(*separate(model, separated, *more))
        assert said.code == 0
        assert "is finished; this is it" in said.err
        assert record.sentence in said.out
    assert read_run(separated) == record  # and was never another in between
    # What is no longer as it was written is made again, from the cache.
    lost = separated / "figures" / f"{next(iter(record.figures))}.json"
    lost.unlink()
    assert run(*separate(model, separated, "--keep-cache")).code == 0
    assert lost.exists()
    assert put == []  # nothing was computed again
    assert numbers(separated) == before
    assert read_run(separated).id == record.id


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", 1], "--seed was 0 and is now 1"),
        (["--system", "Be kind."], '--system was left out and is now "Be kind."'),
    ],
)
def test_another_question_does_not_go_into_the_same_folder(
    more: list[object], named: str, model: str, separated: Path, run: Any
) -> None:
    before = (separated / "run.json").read_bytes()
    said = run(*separate(model, separated, *more))
    assert said.code == 1
    assert len(said.errors) == 1
    assert named in said.errors[0]
    assert "choose another --out" in said.errors[0]
    assert (separated / "run.json").read_bytes() == before


def test_a_model_that_never_refuses_is_told_so(model: str, tmp_path: Path, run: Any) -> None:
    # One answer token is too short for the phrase lists to find a refusal in most answers.
    tiny = save_model(tmp_path / "quiet")
    state = load_file(tiny / "model.safetensors")
    state["lm_head.weight"][-3:] = 0.0
    save_file(state, tiny / "model.safetensors", metadata={"format": "pt"})
    words = [*separate(str(tiny), tmp_path / "out"), "--extra-harmless", "None"]
    words[words.index("--n") + 1] = 24
    assert run(*words).code == 0
    metrics = numbers(tmp_path / "out")
    assert metrics["n.refused_harmful"]["value"] == 0
    assert metrics["refused_auroc.last.harmful"] == {"value": None, "low": None, "high": None, "n": 0}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not measurable" in page.lower()
    assert not math.isnan(metrics["harmful_auroc.inst"]["value"] or 0.0)


# Direction


def test_direction_finds_a_concept_given_as_two_files(found: Path, run: Any) -> None:
    out = found / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "success"
    metrics = record["metrics"]
    assert {"auroc.inst", "auroc.strongest", "permutation_p", "random_maximum", "reliability", "tfidf_auroc"} <= set(
        metrics
    )
    assert metrics["tfidf_auroc"]["value"] == 1.0  # one word differs
    assert {path.stem for path in (out / "tables").glob("*")} >= {"auroc_by_level", "auroc_chosen", "baselines"}
    # So no direction is best, and the strongest is kept under that name.
    assert set(record["artefacts"]) == {"strongest", "directions"}
    assert "auroc.best" not in metrics
    assert f"--direction {out / 'strongest.safetensors'} --prompt" in summary(out)  # ready to be pasted
    sides = _sides(out, artifacts.load(out / "strongest.safetensors", Direction))
    assert sides == tuple(Path(record["config"][side]).name for side in ("positive", "negative"))
    assert require_one_sentence(out).headline.startswith("No more than the surface: ")
    at_ceiling = (
        r"but the words \(TF-IDF\) alone already tells? the sides apart \(1\.00 \[.*\]\), so this set can't show more"
    )
    assert re.search(at_ceiling + r"; sides alike in that would settle it\.$", record["headline"])
    assert "the words (TF-IDF) (1.00" in record["verdict"]
    for artefact in record["artefacts"].values():
        assert (out / artefact["file"]).is_file()
        assert len(artefact["inputs"]) == 3  # both files and the model
    assert "up.jsonl" in (out / "report.html").read_text()


def edit_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are kind.", "You are curt."))


def test_a_run_that_did_not_end_is_not_made_again(separated: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Of the few numbers that it has none would differ."""
    from mechlens.studies import driver

    monkeypatch.setattr(driver, "read_run", lambda folder: replace(read_run(folder), status="error"))
    said = run("runs", "rerun", separated)
    assert (said.code, len(said.err.splitlines())) == (1, 1)
    assert "did not end, so there are no numbers to make again; give its own command once more" in said.err


def test_a_rerun_names_what_has_changed_since(found: Path, model: str, run: Any) -> None:
    out, own = found / "out", found / "model"
    assert run("runs", "rerun", out).code == 0
    lines = (found / "up.jsonl").read_text()
    changes = {
        "data positive": lambda: (found / "up.jsonl").write_text(lines.replace("number 0", "number zero")),
        "model": lambda: edit_weights(own),
        "template": lambda: edit_template(own),
    }
    for what, change in changes.items():
        change()
        said = run("runs", "rerun", out, "--out", found / "again")
        assert said.code == 1, what
        assert len(said.errors) == 1
        assert "can't be made again" in said.errors[0]
        assert re.findall(r"(data \w+|model|template)[^;]*? \(was", said.errors[0]) == [what]
        assert not (found / "again").exists()  # nothing is begun
        (found / "up.jsonl").write_text(lines)
        shutil.copytree(model, own, dirs_exist_ok=True)
    assert run("runs", "rerun", out).code == 0


def test_a_template_that_prints_the_date(
    found: Path, model: str, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mechlens.prompts.templates.template as templates

    def on(day: str) -> None:
        monkeypatch.setattr(templates.date, "today", lambda: datetime.date.fromisoformat(day))

    class Day(datetime.date):
        """A day that a test can set."""

    monkeypatch.setattr(templates, "date", Day)
    path = found / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are kind.", "It is {{ strftime_now('%d %b %Y') }}."))
    given = [found / "model", found]
    on("2024-07-26")
    assert run(*direction(*given, "--out", tmp_path / "first")).code == 0
    assert read_run(tmp_path / "first").inputs.today == "2024-07-26"
    assert "2024-07-26" in run("runs", "show", tmp_path / "first").out
    on("2024-07-27")
    # Made again, it's made on its own day.
    said = run("runs", "rerun", tmp_path / "first", "--out", tmp_path / "again")
    assert said.code == 0
    assert "the numbers are identical" in said.out
    assert run("runs", "rerun", tmp_path / "again").code == 0
    # The same folder on another day: the cause is named, and what helps.
    said = run(*direction(*given, "--out", tmp_path / "first"))
    assert (said.code, len(said.errors)) == (1, 1)
    assert "the day that the chat template prints (was 2024-07-26, is 2024-07-27); give --today 2024-07-26" in said.err
    assert read_run(tmp_path / "first").status == "success"  # and what was there stays
    # A run that was killed keeps its day, and goes on with it.
    half = read_run(tmp_path / "first")
    write_run(replace(half, status="started", metrics={}), tmp_path / "first")
    said = run(*direction(*given, "--out", tmp_path / "first"))
    assert (said.code, len(said.errors)) == (1, 1)
    assert "prints 2024-07-26, and now it would print 2024-07-27; give --today 2024-07-26 to go on" in said.err
    assert run(*direction(*given, "--today", "2024-07-26", "--out", tmp_path / "first")).code == 0
    assert read_run(tmp_path / "first").metrics == half.metrics
    # And it matters: the numbers are others.
    assert run(*direction(*given, "--out", tmp_path / "second")).code == 0
    first, second = (read_run(tmp_path / name) for name in ("first", "second"))
    assert first.metrics != second.metrics
    said = run("positions", "--model", found / "model", "--text", "Hi", "--today", "2021-03-04", "--json")
    assert "It is 04 Mar 2021." in "".join(token["token"] for token in json.loads(said.out)["tokens"])


def test_arguments_of_the_template_are_recorded_and_made_again_with(
    found: Path, model: str, run: Any, tmp_path: Path
) -> None:
    path = found / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if enable_thinking is false %}<nothing to think>{% endif %}")
    given = direction(found / "model", found)
    quiet = ("--template-arg", "enable_thinking=false")
    assert run(*given, "--out", tmp_path / "plain").code == 0
    assert run(*given, *quiet, "--out", tmp_path / "quiet").code == 0
    plain, told = (read_run(tmp_path / name) for name in ("plain", "quiet"))
    assert told.config["template_arg"] == ["enable_thinking=false"]
    assert plain.config["template_arg"] == []
    assert plain.inputs.template != told.inputs.template
    assert plain.metrics != told.metrics
    assert "the numbers are identical" in run("runs", "rerun", tmp_path / "quiet").out
    # The folder goes on with the same arguments only.
    said = run(*given, "--out", tmp_path / "quiet")
    assert (said.code, len(said.errors)) == (1, 1)
    assert "--template-arg was" in said.err
    said = run(*given, *quiet, "--template-arg", "effort=high", "--out", tmp_path / "new")
    assert (said.code, len(said.errors)) == (1, 1)
    assert "the chat template never reads the argument 'effort'; it reads enable_thinking" in said.err
    assert not (tmp_path / "new").exists()
    said = run("positions", "--model", found / "model", "--text", "Hi", *quiet, "--json")
    assert "<nothing to think>" in "".join(token["token"] for token in json.loads(said.out)["tokens"])


def test_a_rerun_without_its_data_says_which_file_is_gone(found: Path, run: Any) -> None:
    (found / "down.jsonl").unlink()
    said = run("runs", "rerun", found / "out")
    assert (said.code, len(said.errors)) == (1, 1)
    assert "down.jsonl could not be read (No such file" in said.errors[0]


# What can go wrong


class World(NamedTuple):
    """Files and folders that bad commands name."""

    folder: Path
    model: str
    good: str
    other: str

    def file(self, name: str, texts: list[str]) -> str:
        return write_prompts(self.folder / name, texts)


@pytest.fixture
def world(tmp_path: Path, model: str) -> World:
    good = write_prompts(tmp_path / "good.jsonl", requests(20, "make"))
    other = write_prompts(tmp_path / "other.jsonl", requests(20, "break"))
    return World(tmp_path, model, good, other)


def bad(**options: object) -> Any:
    """A `separate` command with some words replaced by what a test makes of its world."""

    def words(world: World) -> list[object]:
        named: dict[str, object] = {
            "model": world.model, "harmful": world.good, "harmless": world.other, "extra-harmless": "None",
            "max-new-tokens": 2, "out": world.folder / "out",
        }  # fmt: skip
        named |= {key.replace("_", "-"): value(world) if callable(value) else value for key, value in options.items()}
        flat = [word for key, value in named.items() for word in (f"--{key}", value)]
        return ["separate", *QUICK, *flat]

    return words


def without_template(world: World) -> Path:
    return save_model(world.folder / "base", template=False)


def with_giant_template(world: World) -> Path:
    folder = save_model(world.folder / "giant")
    (folder / "chat_template.jinja").write_text("{{ ('a' * 10 ** 11)[:1] }}{{ messages[-1]['content'] }}!")
    return folder


def only_a_tokenizer(world: World) -> Path:
    tiny_tokenizer().save_pretrained(world.folder / "tokenizer")
    return world.folder / "tokenizer"


def concept(**options: object) -> Any:
    def words(world: World) -> list[object]:
        named = {"positive": world.good, "negative": world.other} | {
            key.replace("_", "-"): value(world) if callable(value) else value for key, value in options.items()
        }
        flat = [word for key, value in named.items() for word in (f"--{key}", value)]
        return ["direction", *QUICK, "--model", world.model, "--out", world.folder / "out", *flat]

    return words


LONG = "x" * 20_000
MISTAKES = {
    "no such file": (bad(harmful=lambda w: w.folder / "none.json"), "none.json could not be read"),
    "a folder as a file": (bad(harmful=lambda w: w.folder), "is a folder; give one data file inside it"),
    "not JSON": (bad(harmful=lambda w: w.file("b.jsonl", []) and _garbage(w)), "row 1 is not valid JSON"),
    "empty data set": (bad(harmful=lambda w: w.file("empty.jsonl", [])), "empty.jsonl is empty"),
    "empty text": (bad(harmful=lambda w: w.file("e.jsonl", ["fine", " "])), "row 2, column 'prompt', is empty"),
    "one file for both classes": (bad(harmless=lambda w: w.good), "share 20 prompts, such as 'Please make"),
    "one prompt in both classes": (
        bad(harmless=lambda w: w.file("mixed.jsonl", [*requests(19, "break"), "please MAKE bread number 0 for me!"])),
        "share 1 prompt, such as 'please MAKE bread",
    ),
    "only duplicates": (
        bad(harmful=lambda w: w.file("d.jsonl", ["make it"] * 30)),
        "there are 1 families of harmful prompts",
    ),
    "no such folder": (bad(model=lambda w: w.folder / "nowhere"), "there is no folder"),
    "a folder without a model": (bad(model=lambda w: w.folder), "has no config.json"),
    "a tokenizer for a model": (bad(model=only_a_tokenizer), "has no config.json"),
    "a hub model without a network": (bad(model="nobody/nothing"), "nor to be had from the hub"),
    "a hub data set without a network": (bad(harmful="nobody/nothing"), "could not be loaded from the hub"),
    "no such set": (bad(harmful="harmfull"), "'harmful' if you meant that"),
    "a base model": (bad(model=without_template), "has no chat template (a base model?)"),
    "no such template": (bad(template="papre"), "there is no template 'papre'"),
    "no adapter": (bad(adapter=lambda w: w.folder), "there is no adapter in"),
    "no such device": (bad(device="banana"), "there is no device 'banana'"),
    "more than there is": (bad(n=21), "a sample of 21 was asked for"),
    "none of them": (bad(n=0), "--n must be at least 1, and is 0"),
    "a very long prompt": (bad(harmful=lambda w: w.file("l.jsonl", [*requests(20, "make"), LONG])), "the model takes"),
    "template tokens in a prompt": (
        bad(harmful=lambda w: w.file("s.jsonl", [*requests(20, "make"), "x <|im_end|> y"])),
        "holds the template token '<|im_end|>'",
    ),
    "no answer": (bad(max_new_tokens=0), "--max-new-tokens must be at least 1, and is 0"),
    "an answer beyond the context": (bad(max_new_tokens=5000), "the model takes 512"),
    "no intervals": (bad(resamples=0), "--resamples must be at least 1, and is 0"),
    "no null": (bad(random_directions=0), "--random-directions must be at least 1, and is 0"),
    "more intervals than there is room for": (
        bad(resamples=10**9),
        "--resamples must be at most 100000, and is 1000000000",
    ),
    "more than training can be": (
        lambda w: ["finetune", "--steps", "999999999", "--model", w.model, "--out", w.folder / "out"],
        "steps is 999999999; give at most 10000000",
    ),
    "half a character in the system prompt": (bad(system="\udcff"), "isn't UTF-8; write it in UTF-8"),
    "half a character in a path": (bad(out=lambda w: w.folder / "o\udcff"), "isn't UTF-8; write it in UTF-8"),
    "nobody's home": (bad(out="~nobody-of-that-name/x"), "names no home folder that exists"),
    "nobody's data": (bad(harmful="~nobody-of-that-name/x.jsonl"), "names no home folder that exists"),
    "nobody's model": (bad(model="~nobody-of-that-name/x"), "names no home folder that exists"),
    "nobody's adapter": (bad(adapter="~nobody-of-that-name/x"), "names no home folder that exists"),
    "a name too long": (bad(out="n" * 300), "can't be a path (File name too long)"),
    "a device for data": (bad(harmful="/dev/zero"), "/dev/zero has an unknown ending"),
    "no such day": (bad(today="31 Feb"), "there is no day '31 Feb'; write it as year-month-day"),
    "a template that fills the memory": (bad(model=with_giant_template), "the chat template needs more than 1024 MB"),
    "a file where a folder should be": (bad(out=lambda w: w.good), "could not be written"),
    "no such position": (concept(positions="middle"), "there is no position 'middle'"),
    "a position too far": (concept(positions="post[99]"), "there is no position 'post[99]'"),
    "too few prompts": (concept(positive=lambda w: w.file("f.jsonl", ["a b", "c d"])), "positive side has 2 prompts"),
    "one class twice": (concept(negative=lambda w: w.good), "share 20 prompts"),
    "no permutations": (concept(permutations=0), "--permutations must be at least 1, and is 0"),
    "positions of nothing": (lambda w: ["positions", "--model", w.model, "--text", " "], "has no text"),
    "positions of no model": (lambda w: ["positions", "--model", w.folder / "x", "--text", "a"], "there is no folder"),
    "positions of a base model": (
        lambda w: ["positions", "--model", without_template(w), "--text", "a"],
        "has no chat template",
    ),
    "no run to show": (lambda w: ["runs", "show", w.folder], "there is no run.json in"),
    "no run to make again": (lambda w: ["runs", "rerun", w.folder], "there is no run.json in"),
    "no runs to list": (lambda w: ["runs", "list", w.folder / "x"], "there is no folder"),
}


def _garbage(world: World) -> str:
    path = world.folder / "b.jsonl"
    path.write_text("{prompt: no\n{")
    return str(path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_line(mistake: str, world: World, run: Any) -> None:
    words, sentence = MISTAKES[mistake]
    said = run(*words(world))
    assert said.code == (2 if re.match(r"--\S+ must be at (least|most)|isn't UTF-8", sentence) else 1)
    assert said.out == ""
    assert len(said.errors) == 1, said.err
    assert said.errors[0].startswith("mechlens: ")
    assert sentence in said.errors[0]
    assert "Traceback" not in said.err
    record = world.folder / "out" / "run.json"
    # What fails once the run has begun is on record, and the corrected command may go on in the same folder.
    assert not record.exists() or json.loads(record.read_text())["status"] == "error"


@pytest.mark.parametrize("name", commands())
def test_what_is_mistyped_exits_with_2_at_every_command(name: str, run: Any, tmp_path: Path) -> None:
    words, config = name.split(), commands()[name].config
    needed = [field for field in fields(config) if field.default is MISSING is field.default_factory]
    hints = get_type_hints(config, include_extras=True)
    positional = {name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())}
    whole = [*words]
    for field in needed:
        named = [] if field.name in positional else [f"--{field.name.replace('_', '-')}"]
        whole += [*named, str(tmp_path / field.name)]
    mistyped = [[*whole, "--no-such-option", "x"], [*words[:-1], f"{words[-1]}x"]]
    mistyped += [words] if [field for field in needed if "tuple" not in str(field.type)] else []
    for option, hint in hints.items():
        chosen = any(isinstance(one, Registry) for one in getattr(hint, "__metadata__", ()))
        if chosen or Ge(1) in getattr(hint, "__metadata__", ()):
            mistyped.append([*whole, f"--{option.replace('_', '-')}", "nonesuch" if chosen else "-1"])
    for command in mistyped:
        said = run(*command)
        assert (said.code, said.out) == (2, ""), command
        assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_corrected_file_goes_on_in_the_same_folder(world: World, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As for a model whose files don't say how much it takes: the mistake shows once the run has begun.
    monkeypatch.setattr(Outline, "require_room", lambda *given: None)
    texts = requests(20, "make")
    words = bad(harmful=lambda w: w.file("p.jsonl", [*texts, LONG]))(world)
    assert run(*words).code == 1
    assert read_run(world.folder / "out").status == "error"
    words = bad(harmful=lambda w: w.file("p.jsonl", texts))(world)
    assert run(*words).code == 0
    assert read_run(world.folder / "out").status == "success"
    assert read_run(world.folder / "out").error is None


def test_prompts_given_twice_are_dropped_with_a_warning(world: World, run: Any) -> None:
    texts = requests(20, "make")
    said = run(*bad(harmful=lambda w: w.file("twice.jsonl", texts + [text.upper() for text in texts]))(world))
    assert said.code == 0
    assert said.errors == []
    assert "twice.jsonl: dropped 20 prompts equal to an earlier one" in said.err
    assert len(pd.read_parquet(world.folder / "out" / "tables" / "prompts.parquet")) == 40


def test_extra_prompts_that_are_there_already_do_not_count_twice(world: World, run: Any) -> None:
    more = world.file("more.jsonl", [*requests(20, "break"), *requests(10, "find")])
    said = run(*bad(extra_harmless=more)(world))
    assert said.code == 0
    assert "left out 20 extra prompts" in said.err
    assert len(pd.read_parquet(world.folder / "out" / "tables" / "prompts.parquet")) == 50


def test_files_that_both_count_from_one_do_not_clash(world: World, run: Any) -> None:
    for name, word in (("one", "make"), ("two", "break")):
        rows = [{"id": i, "prompt": text} for i, text in enumerate(requests(20, word))]
        (world.folder / f"{name}.json").write_text(json.dumps(rows))
    said = run(*concept(positive=lambda w: w.folder / "one.json", negative=lambda w: w.folder / "two.json")(world))
    assert said.code == 0
    ids = pd.read_parquet(world.folder / "out" / "tables" / "prompts.parquet")["id"]
    assert ids.is_unique
    assert {"positive:0", "negative:0"} <= set(ids)


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    world: World, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = bad()(world)
    writes = {"left": 0}
    sync = os.fsync

    def full(handle: int) -> None:
        writes["left"] -= 1
        if writes["left"] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    # In the first record, in the cache, in the tables and figures.
    for allowed in (0, 9, 40):
        writes["left"] = allowed
        said = run(*words)
        assert said.code == 1
        assert len(said.errors) == 1
        assert said.errors[0].startswith("mechlens: the disk is full: ")
        assert not list((world.folder / "out").rglob("*.partial"))
    monkeypatch.undo()
    assert run(*words).code == 0
    assert read_run(world.folder / "out").status == "success"


def test_a_really_full_disk(world: World, run: Any) -> None:
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        said = run(*bad(out=disk / "out")(world))
        assert said.code == 1
        assert len(said.errors) == 1
        assert "the disk is full" in said.errors[0]
        assert json.loads((disk / "out" / "run.json").read_text())["status"] in ("started", "error")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written_to(world: World, run: Any) -> None:
    locked = world.folder / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    # Nobody may make files in /proc, not even root, whom permissions don't stop.
    out = Path("/proc/mechlens") if os.access(locked, os.W_OK) else locked / "out"
    said = run(*bad(out=out)(world))
    assert said.code == 1
    assert len(said.errors) == 1
    assert "could not be written" in said.errors[0]


def process(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, on a machine with no login, no network and nobody at the keyboard."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_", "NETRC"))}
    environ |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mechlens.cli", *map(str, words)],
        capture_output=True, text=True, check=False, env=environ, stdin=subprocess.DEVNULL, cwd=home,
    )  # fmt: skip


def test_without_a_wandb_login_the_log_is_offline(world: World) -> None:
    words = [word for word in concept()(world) if word not in ("--wandb.mode", "disabled")]
    done = process(world.folder, *words)
    assert done.returncode == 0, done.stderr
    assert not re.search("wandb|Loading weights|Traceback|Warning", done.stderr), done.stderr
    assert "report: " in done.stdout
    assert read_run(world.folder / "out").status == "success"
    assert list((world.folder / "out" / "wandb").rglob("run-*.wandb"))


def test_a_prompt_that_is_too_long_is_one_line_for_a_pipe_too(world: World) -> None:
    done = process(world.folder, *bad(harmful=lambda w: w.file("l.jsonl", [*requests(20, "make"), LONG]))(world))
    assert done.returncode == 1
    assert done.stdout == ""
    # A machine so slow that loading lasts says so first.
    said = r"(?:loading .* \.\.\.\n)?mechlens: prompt 'l-0021' has 20\d+ tokens and the model takes 512.*\n"
    assert re.fullmatch(said, done.stderr)


@pytest.mark.parametrize(
    ("factor", "sentence"),
    [
        (1e5, "logits are not finite"),
        (1e7, "proj.weight of the model 'hot1e+07' holds NaN or inf"),
    ],
)
def test_fp16_overflow_is_named(world: World, run: Any, factor: float, sentence: str) -> None:
    own = Path(shutil.copytree(world.model, world.folder / f"hot{factor:g}"))
    state = load_file(own / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] *= torch.tensor(factor)
    save_file(state, own / "model.safetensors", metadata={"format": "pt"})
    said = run(*bad(model=own, dtype="float16")(world))
    assert said.code == 1
    assert len(said.errors) == 1
    assert sentence in said.errors[0]
    assert "bfloat16 or float32" in said.errors[0]


# How it ends


def command(*words: object, stdout: Any = subprocess.PIPE, shell: str = "", at: str = "") -> tuple[int, str]:
    """Exit code and stderr of `mechlens` in a process of its own; Ctrl-C comes as the module `at` is imported."""
    code = f"""
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == {at!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
sys.meta_path.insert(0, Interrupt())
sys.argv = ["mechlens", *{[str(word) for word in words]!r}]
from mechlens.__main__ import main
main()
"""
    call: list[str] = [sys.executable, "-c", code]
    if shell:
        call = ["sh", "-c", f'exec "$0" "$@" {shell}', *call]
    done = subprocess.run(call, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mechlens.prompts.prompt import Prompt
    from mechlens.runs.writer import open_run
    from mechlens.settings import WandbSettings

    folder = tmp_path_factory.mktemp("one") / "a[/b]"  # which rich would take for markup
    with open_run(verb="v", config=Prompt("a", "b"), out=folder, wandb=WandbSettings(mode="disabled")):
        pass
    return folder


@pytest.mark.parametrize("at", ["mechlens.cli", "tyro", "mechlens.settings", "mechlens.runs.run", "pydantic"])
def test_an_early_ctrl_c_is_one_line(at: str, one_run: Path) -> None:
    exit_code, said = command("runs", "show", one_run, at=at)
    assert exit_code == 130
    assert said.splitlines() == [line for line in said.splitlines() if line.startswith("mechlens: stopped")]
    assert len(said.splitlines()) == 1


def test_ctrl_c_at_any_moment_of_the_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "g.safetensors").write_text("no guard")
    code = "import os; from mechlens.__main__ import main; os.write(1, b'.'); main()"
    call = [sys.executable, "-c", code, "guard", "predict", "--guard", "g.safetensors", "--input", "g.safetensors"]
    chance = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            time.sleep(chance.uniform(0.1, 1.5))
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=120)[1]
        fast = process.returncode == 1 and "not a safetensors file" in said  # it had come to its end
        assert fast or (process.returncode == 130 and said.startswith("mechlens: stopped")), said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("at", ["numpy", "numpy.exceptions", "numpy.dtypes", "torch", "scipy.sparse"])
def test_ctrl_c_in_what_a_verb_imports_is_one_line(at: str, one_run: Path) -> None:
    exit_code, said = command("guard", "predict", "--guard", one_run / "run.json", at=at)
    assert (exit_code, said) == (130, "mechlens: stopped\n")


def test_what_a_library_makes_of_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import mechlens.cli as cli

    monkeypatch.setattr(cli, "_interruptions", [])

    def imported(command: object, config: object) -> None:
        try:
            cli.interrupted(2, sys._getframe())
        except KeyboardInterrupt as error:
            raise SystemError("an extension could not be initialised") from error

    monkeypatch.setattr(cli, "_dispatch", imported)
    with pytest.raises(SystemExit) as ended:
        main(["runs", "list"])
    assert ended.value.code == 130
    assert capfd.readouterr().err == "mechlens: stopped; the same command goes on from what is on disk\n"


@pytest.mark.parametrize("words", [["--help"], ["runs", "--help"], ["runs", "list"], ["runs", "show"]], ids=" ".join)
def test_output_that_has_no_room_is_one_sentence(words: list[str], one_run: Path) -> None:
    folder = {"list": [one_run.parent], "show": [one_run]}.get(words[-1], [])
    with open("/dev/full", "w") as full:
        exit_code, said = command(*words, *folder, stdout=full)
    assert exit_code == 1
    assert said.startswith("mechlens: the output could not be written (No space left on device);")
    assert len(said.splitlines()) == 1
    reader, writer = os.pipe()
    os.close(reader)
    exit_code, said = command(*words, *folder, stdout=writer)
    os.close(writer)
    assert (exit_code, said) == (0, "")
    assert command(*words, *folder, shell=">&-") == (0, "")
    assert command(*words, *folder) == (0, "")


def test_a_sentence_that_nobody_can_hear_is_no_traceback(tmp_path: Path) -> None:
    for shell in ("2>/dev/full", "2>&-", ">&- 2>&-"):
        assert command("runs", "show", tmp_path, shell=shell)[0] == 1
    exit_code, said = command("runs", "show", tmp_path, shell="<&-")
    assert (exit_code, len(said.splitlines())) == (1, 1)


def test_every_character_can_be_printed(one_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = one_run.with_name("blå 🙂")
    shutil.copytree(one_run, folder)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert command("runs", "list", one_run.parent) == (0, "")
    exit_code, said = command("runs", "show", folder / "nö")
    assert (exit_code, "n\\xf6" in said) == (1, True)
