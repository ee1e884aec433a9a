"""Errors come before work: whatever can be known before weights are read is said before, in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
from saved import save_model

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.directions.token_view import require_same_model
from mechlens.methods.steering.interventions import require_direction
from mechlens.models import load as loading
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import require_same_weights
from mechlens.prompts.prompt import Prompt
from mechlens.runs import artifacts
from mechlens.runs.vectors.direction_files import read_direction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, and a direction that was made in it loaded in bfloat16."""
    here = tmp_path_factory.mktemp("before")
    save_model(here / "model")
    model = loading.load(str(here / "model"), dtype="bfloat16")
    acts = collect(model, [Prompt(f"p{i}", f"the {i}", label="ab"[i % 2]) for i in range(4)])
    artifacts.save(mean_difference(acts, "a", "b", level=1, position="inst"), here / "one.safetensors")
    return here


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models' weights were begun to be read."""
    found: list[str] = []

    def refuse(name: str, *args: object, **options: object) -> None:
        found.append(str(name))
        raise AssertionError(f"the weights of {name} were read")

    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    return found


def said(command: list[object], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert stop.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mechlens: ")]
    return [line for line in lines if "warning" not in line][-1]


def steered(folder: Path, *more: object) -> list[object]:
    given = ["steer", "--model", folder / "model", "--direction", folder / "one.safetensors", "--prompt", "the thing"]
    return [*given, *more]


def test_another_type_is_named_and_never_two_hashes(
    folder: Path, unread: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    found = said(steered(folder), capfd)
    assert found == (
        "mechlens: the direction was made in bfloat16, the model is loaded in float32: pass --dtype bfloat16 "
        "(dtype='bfloat16' in Python), or make it anew, or pass --force (force=True in Python)"
    )
    assert not unread


def test_the_same_is_said_of_a_loaded_model(folder: Path) -> None:
    one, model = read_direction(folder / "one.safetensors"), loading.load(str(folder / "model"))
    assert one.checkpoint.dtype == "bfloat16"
    for require in (require_same_model, lambda m, d: require_direction(m, d, force=False)):
        with pytest.raises(UserError, match="was made in bfloat16, the model is loaded in float32: pass --dtype bf"):
            require(model, one)
    old = replace(one, checkpoint=replace(one.checkpoint, dtype=""))  # of an earlier version
    with pytest.raises(UserError, match=r"was made with other weights of model .*its fingerprint was"):
        require_direction(model, old, force=False)


MADE = Checkpoint("m", "org/m", fingerprint="v2-1", config="c", dtype="float32")
OTHERS: dict[str, tuple[Checkpoint, str]] = {
    "model": (
        replace(MADE, name="n", path="org/n"),
        r"with org/m, the model is org/n: pass --model org/m \(model='org/m' in Python\), or stop",
    ),
    "adapter": (
        replace(MADE, adapter="a/b", dtype="bfloat16"),
        "without an adapter, in float32, the model is with the adapter a/b, loaded in bfloat16: pass no --adapter --dt",
    ),
    "revision": (replace(MADE, revision="v1"), "at no named revision, the model is at revision v1"),
    "regime": (replace(MADE, regime="int8", dtype="bfloat16"), "with raw weights, the model is one with int8 ones"),
    "configuration": (replace(MADE, fingerprint="v2-1", config="d"), "with another configuration"),
    "weights": (MADE, r"with other weights of m than this model, m, has \(its fingerprint was 1 and is 2\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_differs_is_named(kind: str) -> None:
    now, sentence = OTHERS[kind]
    if kind != "configuration":
        now = replace(now, fingerprint="v2-2")
    with pytest.raises(UserError, match=f"^the direction was made {sentence}"):
        require_same_weights("direction", MADE, now, "stop")


def test_a_type_that_changes_nothing_is_no_mistake() -> None:
    made = Checkpoint("m", "m", fingerprint="v2-1", dtype="bfloat16")
    require_same_weights("direction", made, replace(made, dtype="float32"), "stop")
