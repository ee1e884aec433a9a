"""Another package adds a command, a judge and a direction method, and each is used like one of ours."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from saved import requests, save_model, write_prompts

from mechlens.errors import UserError
from mechlens.methods.behaviour.chosen_judge import verdicts_by
from mechlens.prompts.prompt import Prompt
from mechlens.registry import nearest
from mechlens.runs.run import read_run

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--resamples", "20", "--permutations", "10", "--random-directions", "5", "--wandb.mode", "disabled")
BROKEN = "[mechlens.studies]\nbroken = no_such_module:STUDY\n[mechlens.judges]\nbent = no_such_module:JUDGE\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example package is installed in, beside the environment and without a network."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(ROOT / "tests" / "plugin", tmp_path_factory.mktemp("source") / "plugin")
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-chat"))


def mechlens(folder: Path, *words: object, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own that finds the packages in the folder."""
    path = os.pathsep.join((str(ROOT), str(folder)))
    command = [sys.executable, *python, "-m", "mechlens", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines on stderr other than the signs of life of a slow machine, such as "loading tiny-chat ..."."""
    return [line for line in done.stderr.splitlines() if not line.endswith(" ...")]


def test_help_lists_what_was_added_without_torch(installed: Path) -> None:
    assert "loudness" in mechlens(installed, "--help").stdout
    began = time.monotonic()
    said = mechlens(installed, "loudness", "--help", python=("-X", "importtime"))
    assert time.monotonic() - began < (1.0 if os.getloadavg()[0] < 1 else 5.0)
    assert "How loud are a model's answers?" in said.stdout
    assert {"--prompts", "--model", "--out"} <= set(re.findall(r"--\w+", said.stdout))
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in said.stderr.splitlines()}
    assert "tyro" in modules
    assert not modules & {"torch", "transformers", "pandas"}
    assert "quiet: from mechlens_loudness" in " ".join(mechlens(installed, "separate", "--help").stdout.split())
    assert "medians" in mechlens(installed, "direction", "--help").stdout


def test_its_command_is_recorded_and_made_again(installed: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "loud"
    said = mechlens(installed, "loudness", "--model", model, "--out", out, "--n", 4, "--wandb.mode", "disabled")
    assert (said.returncode, errors(said)) == (0, [])
    run = read_run(out)
    assert (run.verb, run.status) == ("loudness", "success")
    assert 0 <= run.metrics["loudness"].value <= 1
    assert "of the letters are capitals" in (out / "report.html").read_text()
    again = mechlens(installed, "runs", "rerun", out)
    assert (again.returncode, errors(again)) == (0, [])
    assert again.stdout == "the numbers are identical\n"


def test_its_judge_places_the_quadrants(installed: Path, model: str, tmp_path: Path) -> None:
    size = ("--n", 40, "--max-new-tokens", 4)
    said = mechlens(installed, "separate", "--model", model, "--judge", "quiet", "--out", tmp_path, *size, *QUICK)
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path / "run.json").read_text())["config"]["judge"] == "quiet"
    counts = read_table(tmp_path, "quadrant_counts")
    assert list(dict.fromkeys(counts["judge"])) == ["quiet", "arditi", "zhao", "log-odds"]
    answers = read_table(tmp_path, "answers")
    told = answers[answers["answer"].str.strip() != ""]
    assert ((told["answer"] == told["answer"].str.lower()) == (told["verdict_quiet"] == "refused")).all()


def test_its_method_finds_the_direction(installed: Path, model: str, tmp_path: Path) -> None:
    files = [
        f"--{side}={write_prompts(tmp_path / f'{side}.jsonl', requests(24, word))}"
        for side, word in (("positive", "make"), ("negative", "break"))
    ]
    words = ("direction", "--model", model, *files, "--method", "medians", "--out", tmp_path / "out")
    said = mechlens(installed, *words, *QUICK)
    assert said.returncode == 0, said.stderr
    assert "Held-out AUROC of the median difference" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("separate", "--judge", "quit"), "no judge 'quit' (did you mean 'quiet'?); choose from phrases, arditi, zhao"),
        (
            ("guard", "fit", "--rule", "svm"),
            "no guard rule 'svm'; choose from faithful, augmented, centred, lda, logistic",
        ),
        (("finetune", "--recipe", "refuse"), "no recipe 'refuse' (did you mean 'refuser'?)"),
        (("separate", "--judge", "bent"), "the judge 'bent' (no_such_module:JUDGE) can't be imported"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(
    installed: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    said = mechlens(_with_broken(installed, tmp_path), *words, "--out", tmp_path / "out")
    assert (said.returncode, said.stdout) == (1 if "imported" in sentence else 2, "")
    warning, error = said.stderr.splitlines()
    assert warning.startswith("mechlens: warning: the command 'broken' can't be used: ")
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_a_broken_entry_point_is_one_warning_and_nothing_else(installed: Path, tmp_path: Path) -> None:
    said = mechlens(_with_broken(installed, tmp_path), "env", "--json")
    assert (said.returncode, len(said.stderr.splitlines())) == (0, 1)
    assert "warning: the command 'broken' can't be used" in said.stderr
    assert "judge bent (no_such_module)" in json.loads(said.stdout)["from other packages"]


def _with_broken(installed: Path, folder: Path, entries: str = BROKEN, **modules: str) -> Path:
    """The same, with a package of which nothing can be imported, or with other entries and their modules."""
    site = shutil.copytree(installed, folder / "site")
    info = site / "bent-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    for name, code in modules.items():
        (site / f"{name}.py").write_text(code)
    return site


ODD = """
import sys
from dataclasses import dataclass
from mechlens.settings import RunChoice
from mechlens.studies.registry import Study
print("loud")
def config(*bases, **hints):
    made = type("Config", bases, {"__annotations__": hints, **dict.fromkeys(hints, 1), "__doc__": "A study."})
    return dataclass(frozen=True, kw_only=True)(made)
def study(name, kind=None):
    return Study(name, config(RunChoice) if kind is None else kind, "odd:prepare", "odd:prepare")
def prepare(config):
    return 5
NUMBER, BARE, PLAIN = 3, study("bare", config()), study("plain", int)
UNREAD = study("unread", config(RunChoice, x="No"))
TAKEN, GROUP, BELOW, FINE = study("guard_fit"), study("runs"), study("separate more"), study("fine")
LOST = Study("lost", config(RunChoice), "odd:nowhere", "odd:prepare")
"""
UNUSABLE = {
    "number": ("odd:NUMBER", "it is an int, not a Study or a Command"),
    "bare": ("odd:BARE", "its configuration has no 'out'"),
    "plain": ("odd:PLAIN", "its configuration is no dataclass"),
    "unread": ("odd:UNREAD", "its configuration Config can't be read: name 'No' is not defined"),
    "guard_fit": ("odd:TAKEN", "there is a command 'guard fit'; choose another name"),
    "runs": ("odd:GROUP", "there is a command 'runs list'; choose another name"),
    "separate more": ("odd:BELOW", "there is a command 'separate'; choose another name"),
    "leaves": ("leaves:STUDY", "can't be imported: get out"),
}


def test_commands_that_cannot_be_used_are_one_warning_each_and_stop_nothing(installed: Path, tmp_path: Path) -> None:
    entries = "[mechlens.studies]\n" + "".join(f"{name} = {place}\n" for name, (place, _) in UNUSABLE.items())
    entries += "fine = odd:FINE\nlost = odd:LOST\n"
    site = _with_broken(installed, tmp_path, entries, odd=ODD, leaves="raise SystemExit('get out')")
    said = mechlens(site, "env", "--json")
    assert said.returncode == 0
    json.loads(said.stdout)  # what the module printed is elsewhere
    told = [line for line in said.stderr.splitlines() if line != "loud"]
    assert len(told) == len(UNUSABLE)
    for name, (_, reason) in UNUSABLE.items():
        line = next(line for line in told if f"the command {name!r} can't be used: " in line)
        assert reason in line
    for name, reason in (("fine", "prepared an int, not a Preparation"), ("lost", "has no attribute 'nowhere'")):
        said = mechlens(site, name, "--out", tmp_path / "out")
        assert said.returncode == 1
        assert reason in said.stderr.splitlines()[-1]
        assert "Traceback" not in said.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (("refused",), "gave 1 verdicts on 2 answers"),
        (("refused", "maybe"), "gave the verdict 'maybe'"),
        (None, "gave a NoneType, not a verdict on each answer"),
    ],
)
def test_a_judge_owes_a_verdict_on_each_answer(made: Any, sentence: str) -> None:
    class Bad:
        name = "bad"

        def __call__(self, prompts: Any, answers: Any) -> Any:
            return made

    with pytest.raises(UserError, match=sentence):
        verdicts_by(Bad(), [Prompt("a", "x"), Prompt("b", "y")], ["a", "b"])


@pytest.mark.parametrize(("given", "near"), [("smolm2", "smollm2"), ("SMOLLM2", "smollm2"), ("thing", "")])
def test_the_nearest_name_is_asked_for_in_any_capitals(given: str, near: str) -> None:
    assert nearest(given, ("smollm2", "gemma3-270m")) == (f"did you mean {near!r}?" if near else "")


def test_env_lists_what_was_added(installed: Path) -> None:
    found = json.loads(mechlens(installed, "env", "--json").stdout)["from other packages"]
    assert found == [
        "command loudness (mechlens_loudness)",
        "direction method medians (mechlens_loudness)",
        "judge quiet (mechlens_loudness)",
    ]


def read_table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")
