"""Paths as people give them, as text, as a Path and with ~: wherever a public function takes one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import requests, save_model, write_prompts

import mechlens as ml
from mechlens.methods.activations.activations import Activations


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a model, two files of prompts, a run and its direction."""
    folder = tmp_path_factory.mktemp("home")
    save_model(folder / "model")
    for word in ("make", "burn"):
        write_prompts(folder / f"{word}.jsonl", requests(15, word))
    return folder


@pytest.fixture(scope="module")
def run_folder(home: Path) -> Path:
    """Done with a text as `out`, a Path as all else."""
    config = ml.FindDirection(
        positive=str(home / "make.jsonl"), negative=str(home / "burn.jsonl"), model=str(home / "model"),
        out=str(home / "runs/one"), positions=("last",), permutations=2, random_directions=1, resamples=2,
    )  # fmt: skip
    object.__setattr__(config, "positive", home / "make.jsonl")  # past the test run's own check of types
    done = ml.run(config)
    assert done.record.config["positive"] == str(home / "make.jsonl")
    return home / "runs/one"


@pytest.fixture(params=["text", "path", "tilde"])
def given(request: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A path below home in one of the ways that people write it."""
    monkeypatch.setenv("HOME", str(home))
    ways = {"text": str, "path": Path, "tilde": lambda path: f"~/{Path(path).relative_to(home)}"}
    return ways[request.param]


def test_models_prompts_and_checkpoints(home: Path, given: Any) -> None:
    assert ml.load_tokenizer(given(home / "model")).bos_token == "<bos>"
    assert len(ml.load_prompts(given(home / "make.jsonl"))) == 15
    series = ml.checkpoint_series(given(home / "model"), given(home / "model"))
    assert len(series.members) == 2
    source = ml.Source("x", "make.jsonl", label="harmful")
    assert len(ml.load_source(source, given(home), 0).prompts) == 15


def test_runs_caches_and_guards(home: Path, run_folder: Path, given: Any) -> None:
    assert ml.read_run(given(run_folder)).verb == "direction"
    assert len(ml.list_runs(given(home / "runs"))) == 1
    assert ml.open(given(run_folder)).record.verb == "direction"
    cache = ml.FolderCache(given(home / "cache"))
    cache.put("0" * 64, {"x": torch.ones(1)})
    assert (home / "cache" / f"{'0' * 64}.safetensors").exists()
    values = torch.randn(40, 1, 1, 8) + torch.tensor([1.0] * 20 + [-1.0] * 20)[:, None, None, None]
    acts = Activations(
        values, (1,), ("last",), tuple(map(str, range(40))), ("harmful",) * 20 + ("harmless",) * 20,
        tuple(map(str, range(40))), "resid", ml.Checkpoint("x", "x"), "t", last="last",
    )  # fmt: skip
    guard = ml.LatentGuard(positions=("last",)).fit(acts)
    ml.save(guard, given(home / "guard.safetensors"))
    assert ml.LatentGuard.of(ml.open(given(home / "guard.safetensors"))).fitted_.positions == ("last",)


def test_a_list_of_sources(home: Path, given: Any) -> None:
    (home / "sources.json").write_text('[{"name": "x", "data": "make.jsonl", "label": "harmful"}]')
    assert ml.read_sources(given(home / "sources.json"))[0].name == "x"


def test_the_same_folder_whoever_writes_it(home: Path, run_folder: Path) -> None:
    class Somewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(run_folder)

    assert ml.read_run(Somewhere()) == ml.read_run(run_folder)
