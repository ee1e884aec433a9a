"""Everything public has an example in its docstring, which runs as it stands and prints what it says.

In examples `ml.load("smollm2")`, and `model="smollm2"` in a study, is a tiny random model that refuses half of
everything, so that an example may print shapes, names and laws, never a number that the real model would give.
"""

import doctest
import inspect
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from refusing import make_half_refuse
from tiny import tiny_hf, tiny_tokenizer

import mechlens
import mechlens.views


def public() -> dict[str, Any]:
    """Every public function and class by name; constants and type aliases have no docstring of their own."""
    views = {f"views.{name}": thing for name, thing in vars(mechlens.views).items() if name.startswith("show_")}
    named = {name: getattr(mechlens, name) for name in mechlens.__all__} | views
    return {name: thing for name, thing in named.items() if inspect.isfunction(thing) or inspect.isclass(thing)}


PUBLIC = public()


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with a checkpoint and a run; the packaged model is a tiny one there, loaded once."""
    from mechlens.models import packaged

    root = tmp_path_factory.mktemp("cache")
    folder = root / "models" / "smollm2"
    model, tokenizer = tiny_hf("llama"), tiny_tokenizer()
    make_half_refuse(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    packaged._mark(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHLENS_CACHE", str(root))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setitem(vars(mechlens), "load", cache(mechlens.load))
        patch.setattr("plotly.graph_objects.Figure.show", lambda figure, config: None)  # it would open a browser
        place = tmp_path_factory.mktemp("work")
        patch.chdir(place)
        shutil.copytree(folder, place / "runs" / "tuned" / "checkpoint-10")
        few = {"n": 20, "positions": ("last",), "resamples": 50, "permutations": 10, "random_directions": 2}
        mechlens.run(
            mechlens.FindDirection(positive="harmful", negative="harmless", out=place / "runs" / "first", **few)
        )
        yield place


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Examples that ran: a function's and its result's may be the same."""
    return set()


@pytest.mark.parametrize("name", PUBLIC)
def test_has_an_example_that_runs(
    name: str, small_world: Path, seen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_world)
    thing = PUBLIC[name]
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(thing, name, globs={"ml": mechlens, "views": mechlens.views})
    assert found.examples, f"the docstring of {name} has no example"
    source = "".join(example.source + example.want for example in found.examples)
    if source in seen:
        return
    seen.add(source)
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(found, out=said.append)
    assert result.failed == 0, "".join(said)
