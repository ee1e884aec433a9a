"""kill -9 at any moment: the next run goes on from what is on disk and ends with the numbers of an unbroken one."""

import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
import warm
from saved import requests, save_model
from torch import Tensor

from mechlens.cli import main
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.load import load
from mechlens.prompts.prompt import Prompt
from mechlens.runs.folder import FolderCache
from mechlens.runs.run import read_run

# The process dies by itself, without a chance to tidy up, just before or in the middle of its k-th write.
DYING = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, k):
    calls = []
    def counted(*arguments, **options):
        result = function(*arguments, **options)
        calls.append(1)
        if len(calls) == k:
            die()
        return result
    return counted
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-chat"))


def killed(code: str) -> None:
    """Runs the code in a process that must end by SIGKILL."""
    done = warm.python(DYING + code)
    assert done.returncode == -signal.SIGKILL, done.stderr


def half_files(folder: Path) -> list[Path]:
    """What a killed writer leaves behind: hidden temporary names."""
    return [path for path in folder.rglob(".*") if path.is_file() and path.name != ".lock"]


@dataclass
class Counting:
    """A cache that counts what is found and what is made."""

    inner: FolderCache
    found: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def get(self, key: str) -> dict[str, Tensor] | None:
        piece = self.inner.get(key)
        if piece is not None:
            self.found.append(key)
        return piece

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        self.made.append(key)
        self.inner.put(key, value)


PROMPTS = [Prompt(f"p{i}", text, "harmful") for i, text in enumerate(requests(24, "make"))]
COLLECT = """
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.models.load import load
from mechlens.prompts.prompt import Prompt
from mechlens.runs.folder import FolderCache
sys.path.insert(0, {tests!r})
from saved import requests
FolderCache.put = after(FolderCache.put, 3)
prompts = [Prompt(f"p{{i}}", text, "harmful") for i, text in enumerate(requests(24, "make"))]
{work}(load({model!r}), prompts, cache=FolderCache(Path({cache!r})), max_tokens=150{more})
"""


def work(kind: str, model: str, cache: Counting | None) -> Activations | Answers:
    if kind == "collect":
        return collect(load(model), PROMPTS, cache=cache, max_tokens=150)
    return answer(load(model), PROMPTS, cache=cache, max_tokens=150, max_new_tokens=4)


@pytest.mark.parametrize("kind", ["collect", "answer"])
def test_what_was_put_before_the_kill_is_not_computed_again(kind: str, model: str, tmp_path: Path) -> None:
    whole = work(kind, model, None)
    fresh = Counting(FolderCache(tmp_path / "fresh"))
    work(kind, model, fresh)
    pieces = len(fresh.made)
    assert pieces > 4
    more = ", max_new_tokens=4" if kind == "answer" else ""
    tests = str(Path(__file__).parent)
    killed(COLLECT.format(tests=tests, work=kind, model=model, cache=str(tmp_path / "cache"), more=more))
    on_disk = sorted(path.stem for path in (tmp_path / "cache").glob("*.safetensors"))
    assert len(on_disk) == 3
    assert half_files(tmp_path / "cache") == []
    cache = Counting(FolderCache(tmp_path / "cache"))
    again = work(kind, model, cache)
    assert sorted(cache.found) == on_disk
    assert len(cache.made) == pieces - 3
    if isinstance(again, Activations) and isinstance(whole, Activations):
        assert torch.allclose(again.values, whole.values, rtol=0, atol=1e-9)
        assert again.ids == whole.ids
    else:
        assert again == whole
    # And once more: everything is there.
    third = Counting(FolderCache(tmp_path / "cache"))
    work(kind, model, third)
    assert third.made == []


def separate(model: str, out: Path) -> list[str]:
    words = ["separate", "--model", model, "--out", out, "--n", 40, "--max-new-tokens", 4]
    return [str(word) for word in [*words, "--resamples", 40, "--permutations", 20, "--wandb.mode", "disabled"]]


class Moment(NamedTuple):
    """When a study dies, and what must then be on disk."""

    code: str
    all_made: bool = False
    """Every answer and activation is on the cache."""
    half: bool = True
    """A half-written file lies about, under a hidden name."""


def replacing(condition: str, left: str = "") -> str:
    """Dies in the middle of a write: the file is written, maybe not wholly, and not yet in its place."""
    return f"""
real = os.replace
def replace(source, target):
    source, target = Path(source), Path(target)
    if {condition}:
        {left or "pass"}
        die()
    real(source, target)
os.replace = replace
"""


MOMENTS = {
    "between two pieces": Moment(
        "from mechlens.runs.folder import FolderCache\nFolderCache.put = after(FolderCache.put, 4)\n", half=False
    ),
    "inside a piece": Moment(
        replacing("target.suffix == '.safetensors' and len(list(target.parent.glob('*'))) > 5"),
    ),
    "inside a table": Moment(
        replacing("target.name == 'cosines.parquet'", "source.write_bytes(b'half')"), all_made=True
    ),
    "inside run.json": Moment(
        replacing(
            "target.name == 'run.json' and b'harmful_auroc' in source.read_bytes()",
            "source.write_bytes(source.read_bytes()[:100])",
        ),
        all_made=True,
    ),
}


@pytest.fixture(scope="module")
def unbroken(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    with one_thread(), warnings.catch_warnings():
        main([*separate(model, out), "--keep-cache"])
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(
    moment: str, model: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code, all_made, half = MOMENTS[moment]
    killed(code + f"from mechlens.cli import main\nmain({separate(model, out)!r})\n")
    left = read_run(out)  # whole, whenever the process died
    assert (left.status, left.finished) == ("started", None)
    on_disk = {path.stem for path in (out / "cache").glob("*.safetensors")}
    whole = {path.stem for path in (unbroken / "cache").glob("*.safetensors")}
    assert on_disk <= whole
    assert (on_disk == whole) == all_made
    assert bool(half_files(out)) == half
    made: list[str] = []
    put = FolderCache.put
    monkeypatch.setattr(FolderCache, "put", lambda self, key, value: (made.append(key), put(self, key, value)))
    main([*separate(model, out), "--keep-cache"])
    assert set(made) == whole - on_disk  # nothing twice, nothing left out
    assert len(made) == len(set(made))
    assert half_files(out) == []
    after = read_run(out)
    assert (after.status, after.error, after.id) == ("success", None, left.id)
    expected = json.loads((unbroken / "run.json").read_text())["metrics"]
    found = json.loads((out / "run.json").read_text())["metrics"]
    assert found.keys() == expected.keys()
    for name, estimate in expected.items():
        for part, value in estimate.items():
            assert found[name][part] == (value if value is None else pytest.approx(value, abs=1e-9)), (name, part)
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == sorted(
        p.name for p in unbroken.rglob("*") if p.is_file()
    )
    for table in (unbroken / "tables").glob("*.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(out / "tables" / table.name), pd.read_parquet(table))


def test_a_damaged_piece_costs_only_itself(model: str, tmp_path: Path) -> None:
    whole = work("collect", model, Counting(FolderCache(tmp_path)))
    damaged = sorted(tmp_path.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    cache = Counting(FolderCache(tmp_path))
    with pytest.warns(UserWarning, match=f"{damaged.name} is damaged, so that piece of the work is done again"):
        again = work("collect", model, cache)
    assert cache.made == [damaged.stem]
    assert isinstance(again, Activations)
    assert isinstance(whole, Activations)
    assert torch.equal(again.values, whole.values)


def test_a_folder_in_use_is_left_alone(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mechlens.runs.writer import open_run
    from mechlens.settings import WandbSettings

    with open_run(verb="separate", config=Prompt("a", "b"), out=tmp_path, wandb=WandbSettings(mode="disabled")):
        with pytest.raises(SystemExit):
            main(separate(model, tmp_path))
        assert "another mechlens process is writing to" in capfd.readouterr().err
