"""`mechlens steer`: one prompt with and without a direction; and any file that holds a direction."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_causal as planted
import pytest
import torch
from shown import require_shown
from test_foreign_vectors import control_vector, refusal_run

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.directions.direction import Direction, DirectionGrid, direction_grid, require_is_direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.statistics.resample import one_thread
from mechlens.runs import artifacts
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.studies.steer.config import Steer
from mechlens.studies.steer.study import STEERED, UNSTEERED, steer

CALM, STERN = "gladly flower abc", "sternly flower abc"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model, and its refusal directions at all levels and positions."""
    root = tmp_path_factory.mktemp("steer")
    hf_model, tokenizer = planted.planted_model()
    hf_model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    model = ml.load(str(root / "model"))
    sides = planted.planted_requests(12)
    prompts = [replace(p, label="refused" if "sternly" in p.text else "accepted") for own in sides for p in own]
    acts = ml.collect(model, prompts, positions=["inst", "last"])
    grid = direction_grid(acts, "refused", "accepted")
    artifacts.save(grid, root / "grid.safetensors")
    artifacts.save(grid.at(1, "last"), root / "one.safetensors")
    return root


def config(folder: Path, **options: Any) -> Steer:
    given = {"direction": folder / "one.safetensors", "prompt": CALM, "max_new_tokens": 3} | options
    return Steer(model=str(folder / "model"), **given)


def test_adding_refusal_refuses_and_taking_it_away_answers(folder: Path) -> None:
    assert steer(config(folder)).unsteered == "Sure"
    assert steer(config(folder)).steered == "I cannot"
    stern = steer(config(folder, prompt=STERN, strength=-0.5))
    assert (stern.unsteered, stern.steered) == ("I cannot", "Sure")
    ablated = steer(config(folder, prompt=STERN, operation="ablate"))
    assert (ablated.unsteered, ablated.steered) == ("I cannot", "Sure")
    nothing = steer(config(folder, strength=0.0))
    assert nothing.unsteered == nothing.steered
    raw = steer(config(folder, unit="raw", strength=2.0))
    assert raw.steered == "I cannot"
    assert "2 times the vector" in raw.what


def test_a_strength_is_found_by_what_it_breaks(folder: Path) -> None:
    found = steer(config(folder, calibrate_kl=0.5, prompt=STERN, strength=-1.0))
    share = re.search(
        r"^added at layer 1, (-[\d.]+) of the median residual norm: .* nats \((\d+) forward passes\)", found.what
    )
    assert share is not None, found.what
    assert "harmless answers is at most 0.5" in found.what
    # The same is said with the strength that was found.
    again = steer(config(folder, prompt=STERN, strength=float(share[1])))
    assert (again.unsteered, again.steered) == (found.unsteered, found.steered)
    for wrong in ({"operation": "ablate"}, {"unit": "raw"}):
        with pytest.raises(UserError, match="leave `operation` and `unit` out"):
            steer(config(folder, calibrate_kl=0.5, **wrong))
    with pytest.raises(UserError, match=r"`calibrate_kl` is -1\.0; give a number of nats above 0"):
        steer(config(folder, calibrate_kl=-1.0))


def test_the_call_shows_answers_side_by_side(folder: Path) -> None:
    """The same answers as the command's, for many prompts and strengths at once."""
    model = ml.load(str(folder / "model"))
    direction = ml.open(folder / "one.safetensors")
    seen = ml.steer(model, direction, [CALM, STERN], [-0.5, 0.5], max_new_tokens=3)
    assert seen.strengths == (0.0, -0.5, 0.5)
    assert [seen.at(one) for one in seen.strengths] == [("Sure", "I cannot"), ("Sure", "Sure"), ("I cannot",) * 2]
    assert seen.table()["answer"].tolist() == ["Sure", "Sure", "I cannot", "I cannot", "Sure", "I cannot"]
    require_shown(seen)
    assert seen._repr_html_().count("I cannot") == 3
    assert "strengths of the median residual norm: Direction(refused - accepted at level 1" in repr(seen)
    assert "'gladly flower abc', +0.5: 'I cannot'" in repr(seen)
    evil = ml.steer(model, direction, "<script>alert(1)</script>", 0.0, max_new_tokens=1)
    assert evil.strengths == (0.0,)
    require_shown(evil)
    # A file from before norms were saved with directions, and another layer: both take the norm of benign prompts.
    for old, layer in ((replace(direction, residual_norm=None), None), (direction, 2)):
        assert ml.steer(model, old, STERN, -0.5, layer=layer, max_new_tokens=3).at(-0.5) == ("Sure",)
    with pytest.raises(UserError, match="no layer 9 to intervene at, only 0 to 3"):
        ml.steer(model, direction, CALM, layer=9)
    with pytest.raises(UserError, match=r"concept's best is None, its detection.strongest.direction is there"):
        require_is_direction(None)


def test_several_answers_are_those_that_answer_draws(folder: Path) -> None:
    heard: list[tuple[str, str]] = []
    drawn = {"temperature": 4.0, "seed": 2}
    found = steer(config(folder, n_samples=4, **drawn), lambda name, text: heard.append((name, text)))
    said = ml.answer(ml.load(str(folder / "model")), CALM, max_new_tokens=3, n=4, **drawn)
    assert len(set(said.texts)) > 1
    assert found.unsteered == "\n".join(f"{k}. {text}" for k, text in enumerate(said.texts, start=1))
    assert heard == [(UNSTEERED, found.unsteered), (STEERED, found.steered)]
    assert steer(config(folder, **drawn)).unsteered == said.texts[0]


def test_answers_are_heard_of_while_they_are_written(folder: Path) -> None:
    heard: list[tuple[str, str]] = []
    found = steer(config(folder), lambda name, text: heard.append((name, text)))
    assert heard[0] == (UNSTEERED, "Sure")
    assert heard[-1] == (STEERED, "I cannot")
    assert found.steered == "I cannot"


def test_a_grid_needs_its_level_and_position(folder: Path) -> None:
    found = steer(config(folder, direction=folder / "grid.safetensors", layer=1, position="last"))
    assert found.steered == "I cannot"
    with pytest.raises(
        UserError, match=r"holds directions at inst, post.*name one of them as the position: --position inst "
    ):
        steer(config(folder, direction=folder / "grid.safetensors", layer=1))
    with pytest.raises(UserError, match="of levels 0 to 4 which isn't said"):
        steer(config(folder, direction=folder / "grid.safetensors", position="last"))
    with pytest.raises(UserError, match="holds the direction at 'post"):
        read_direction(folder / "one.safetensors", position="inst")


def test_a_runs_folder_stands_for_its_one_direction(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    artifacts.save(artifacts.load(folder / "grid.safetensors", DirectionGrid), tmp_path / "directions.safetensors")
    with pytest.raises(UserError, match=r"no one direction; give one of its files .*\(it holds directions.safetensors"):
        read_direction(tmp_path)
    one = artifacts.load(folder / "one.safetensors", Direction)
    artifacts.save(one, tmp_path / "strongest.safetensors")
    with pytest.warns(UserWarning, match="has no best direction; this is its strongest"):
        assert torch.equal(read_direction(tmp_path).vector, one.vector)
    artifacts.save(one, tmp_path / "direction.safetensors")
    assert torch.equal(read_direction(tmp_path).vector, one.vector)
    with pytest.raises(UserError, match=r"holds a direction, not a guard; give the guard.safetensors that `guard fit`"):
        artifacts.load(tmp_path / "direction.safetensors", FittedGuard)


def test_other_tools_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "refusal").mkdir()
    chosen = refusal_run(tmp_path / "refusal")
    assert read_direction(chosen).method == "refusal_direction"
    assert read_direction(chosen / "direction.pt").level == 10
    vectors = {3: torch.ones(16), 5: torch.full((16,), 2.0)}
    torch.save(vectors, tmp_path / "vectors.pt")
    assert read_direction(tmp_path / "vectors.pt", layer=6).vector[0] == 2.0
    repeng = control_vector(tmp_path / "v.gguf", {f"direction.{k}": v.numpy() for k, v in vectors.items()})
    assert read_direction(repeng, layer=4).method.startswith("repeng")
    with pytest.raises(UserError, match=r"levels \[4, 6\] and not of level 5"):
        read_direction(repeng, layer=5)
    with pytest.raises(UserError, match="one position only"):
        read_direction(repeng, layer=4, position="last")
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(UserError, match="unknown ending"):
        read_direction(tmp_path / "x.txt")
    with pytest.raises(UserError, match="there is no file"):
        read_direction(tmp_path / "none.safetensors")


def test_a_foreign_direction_is_used_only_when_one_says_so(folder: Path, tmp_path: Path) -> None:
    own = artifacts.load(folder / "one.safetensors", Direction)
    torch.save(own.vector.double(), tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 1}))
    with pytest.raises(UserError, match=r"comes from another tool.*pass --force"):
        steer(config(folder, direction=tmp_path))
    assert steer(config(folder, direction=tmp_path, force=True)).steered == "I cannot"


def words(folder: Path, *more: object) -> list[str]:
    given = ["steer", "--model", folder / "model", "--direction", folder / "one.safetensors", "--prompt", CALM]
    return [str(word) for word in [*given, "--max-new-tokens", 3, *more]]


def test_the_command_prints_both_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(folder, "--layer", 1, "--strength", 0.5))
    said = capsys.readouterr().out
    assert "unsteered:\nSure\n" in said
    assert "steered (added at layer 1, 0.5 of the median residual norm: mean difference, refused against" in said
    assert said.endswith("I cannot\n")


TYPED = {
    ("--operation", "ablate", "--strength", "2"): "an ablation has no strength",
    ("--max-new-tokens", "0"): "--max-new-tokens must be at least 1, and is 0",
    ("--n-samples", "3"): "without a temperature they are all the same; give one, such as --temperature 0.7",
    ("--top-p", "0.9"): "without a temperature the likeliest is taken; give one, such as --temperature 0.7",
    ("--top-p", "0", "--temperature", "1"): "--top-p must be above 0, and is 0.0",
    ("--top-p", "1.5", "--temperature", "1"): "--top-p must be at most 1, and is 1.5",
    ("--temperature", "-1"): "--temperature must be at least 0, and is -1.0",
    ("--temperature", "inf"): "the temperature is inf; give a finite number",
    ("--calibrate-kl", "0"): "--calibrate-kl is 0.0; give a number of nats above 0",
    ("--calibrate-kl", "1", "--unit", "raw"): "leave --operation and --unit out",
    ("--strength", "nan"): "give a finite number",
    ("--controller", "runs/controller"): "give --direction or --controller, one of them",
}
"""What no model and no file could make possible: it exits with 2, and nothing is looked for."""
MISTAKES = {
    ("--layer", "9"): "there is no layer 9; model has layers 0 to 4",
    ("--prompt", " "): "has no text",
    ("--direction", "nowhere.safetensors"): "there is no file nowhere.safetensors",
}


@pytest.mark.parametrize("mistake", TYPED)
def test_options_that_can_not_be_are_told_before_anything_is_loaded(
    mistake: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words(Path("nowhere"), *mistake))
    assert stop.value.code == 2
    assert TYPED[mistake] in capfd.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_line(
    mistake: tuple[str, ...], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words(folder, *mistake))
    assert stop.value.code == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mechlens: ")]
    assert [line for line in said if "warning" not in line] == said[-1:]
    assert MISTAKES[mistake] in said[-1]


def test_the_last_level_is_acted_on_where_it_is_read(folder: Path) -> None:
    """No block reads it, so it is added to the last block's output, and the next token follows from it at once."""
    found = steer(config(folder, direction=folder / "grid.safetensors", layer=4, position="last", strength=2.0))
    assert found.unsteered == "Sure"
    assert found.steered.startswith("I")
