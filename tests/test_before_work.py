"""Errors come before work: whatever can be known before weights are read is said before, in one sentence."""

import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import jaxtyping
import pytest
from saved import save_model

from mechlens import hub
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.directions.token_view import require_same_model
from mechlens.methods.steering.fits import require_direction
from mechlens.models import load as loading
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import require_same_weights
from mechlens.models.checkpoints.found import sources
from mechlens.prompts.files.load import load_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.runs import artifacts
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.settings import DetectionPlan
from mechlens.studies.causal.config import Causal
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.driver import run
from mechlens.studies.registry import commands
from mechlens.studies.separate.config import Separate


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
    """The one line that a command ends with: in 2 where an option can't be, whatever there is, and else in 1."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mechlens: ")]
    last = [line for line in lines if "warning" not in line][-1]
    typed = re.search(
        r"--\S+ must be at|there is no (judge|direction method|recipe)|was given without|give a finite", last
    )
    assert stop.value.code == (2 if typed else 1)
    return last


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
        r"with org/m, the model is org/n: pass --model org/m \(ml.load\('org/m'\) in Python\), or stop",
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


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def prompts(folder: Path, name: str, n: int) -> Path:
    return file(folder, f"{name}.txt", "".join(f"{name} the thing {i}\n" for i in range(n)))


LATE: dict[str, tuple[tuple[object, ...], str]] = {
    "no such model": (("separate", "--model", "smolm2"), "did you mean 'smollm2'?"),
    "no folder": (("causal", "--model", "./nowhere"), "there is no folder './nowhere'"),
    "no adapter": (("select", "--adapter", "./nowhere"), "there is no adapter in './nowhere'"),
    "no file": (("direction", "--positive", "./no.csv", "--negative", "harmless"), "could not be read (No such file"),
    "no column": (("patch", "--pairs", "{table}"), "column"),
    "no such column": (("direction", "--positive", "{table}", "--negative", "{many}", "--column", "q"),
                       "table.csv has no column 'q'; it has 'a', 'b'"),
    "no column to find": (("separate", "--harmful", "{table}"), "has none of the usual prompt columns"),
    "no checkpoints": (("track", "--checkpoints", "nowhere"), "there is no folder 'nowhere' here"),
    "an empty file": (("separate", "--harmful", "{empty}"), "is empty; it needs at least one prompt"),
    "one class twice": (("separate", "--harmful", "{many}", "--harmless", "{many}"), "can be of one class only"),
    "too few": (("direction", "--positive", "{few}", "--negative", "{many}"), "least 15 of each side"),
    "too few families": (("separate", "--harmful", "{few}"), "the study needs"),
    "a position": (("direction", "--positive", "harmful", "--negative", "harmless", "--positions", "ints"),
                   "there is no position 'ints'"),
    "a position of a patch": (("patch", "--positions", "post[77]"), "there is no position 'post[77]'"),
    "a layer": (("patch", "--layers", 99), "there is no layer 99; model has layers 0 to 2"),
    "a layer to choose": (("causal", "--layers", 2, 99), "there is no layer 99; model has layers 0 to 2"),
    "the embedding": (("causal", "--layers", 0), "there is no layer 0 to intervene at"),
    "a level": (("track", "--levels", 99, "--checkpoints", "{model}"), "there is no level 99; model has levels 0 to 3"),
    "a place to steer": (("steer", "--layer", 99), "there is no layer 99; model has layers 0 to 3"),
    "NaN": (("steer", "--strength", "nan"), "the strength is nan; give a finite number"),
    "no tokens": (("guard fit", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, and is 0"),
    "no traces": (("cliff", "--traces", "./no.jsonl"), "could not be read (No such file"),
    "a share of heads": (("cliff", "--heads", 0.5, 2), "the share of heads is 2; give one above 0 and up to 1"),
    "too few to think about": (("cliff", "--harmful", "{few}", "--n", 4), "and the study needs 10 of each class"),
    "no folder of sources": (("jailbreaks", "--sources", "published", "--folder", "nowhere"),
                             "there is no folder 'nowhere': published needs catqa/catqa_english.json, gptfuzz/"),
    "a site": (("patch", "--site", "resid"), "there is no site 'resid'"),
    "a judge": (("separate", "--judge", "frases"), "there is no judge 'frases' (did you mean 'phrases'?)"),
    "a method": (("direction", "--positive", "harmful", "--negative", "harmless", "--method", "dla"),
                 "there is no direction method 'dla'"),
    "a device": (("select", "--device", "cuda:7"), "there is no device 'cuda:7' here"),
    "a template": (("select", "--template", "paper:none"), "paper:none"),
    "its argument": (("guard fit", "--template-arg", "effort=1"), "never reads the argument 'effort'"),
    "a folder of others": (("separate", "--out", "{others}"), "and no run of mechlens"),
    "a file for a folder": (("separate", "--out", "{few}"), "few.txt is no folder); give another --out"),
    "no guard": (("guard predict", "--guard", "{few}"), "truncated or not a safetensors file"),
    "a direction for a guard": (("guard predict", "--guard", "{direction}"), "holds a direction"),
    "no direction": (("steer", "--direction", "{few}"), "unknown ending"),
    "a long prompt": (("steer", "--prompt", "the thing " * 400), "tokens and the model takes 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_nothing_is_read_before_a_mistake_is_said(
    case: str, folder: Path, unread: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (words, sentence), places = LATE[case], {"model": folder / "model", "direction": folder / "one.safetensors"}
    places |= {"few": prompts(tmp_path, "few", 4), "many": prompts(tmp_path, "many", 40)}
    places |= {"empty": file(tmp_path, "empty.csv", ""), "table": file(tmp_path, "table.csv", "a,b\nx,y\n")}
    verb, *more = (str(word).format(**places, others=tmp_path) for word in words)
    usual: list[object] = ["--base" if verb == "track" else "--model", folder / "model"]
    usual += [] if verb in ("steer", "guard predict") else ["--out", tmp_path / "out"]
    usual += ["--prompt", "x", "--direction", folder / "one.safetensors"] if verb == "steer" else []
    usual += ["--dtype", "bfloat16"] if verb == "steer" else []
    usual = [word for i, word in enumerate(usual) if usual[i - i % 2] not in more]
    assert sentence in said([*verb.split(), *usual, *more], capfd)
    assert not unread
    assert not (tmp_path / "out").exists()


AT_ONCE = (
    "no such column", "no column to find", "no checkpoints", "a layer", "a layer to choose", "a level", "a judge",
    "a method", "no tokens",
)  # fmt: skip
"""What is said before torch is imported, and so before anything is said to be loading."""
WITHOUT_TORCH = """
import sys
from mechlens.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers", "pandas"} & set(sys.modules), "too late"
"""


@pytest.mark.parametrize("case", AT_ONCE)
def test_what_is_cheap_to_know_is_said_before_anything_heavy_is_imported(
    case: str, folder: Path, tmp_path: Path
) -> None:
    (words, sentence), table = LATE[case], file(tmp_path, "table.csv", "a,b\nx,y\n")
    places = {"model": folder / "model", "table": table, "many": prompts(tmp_path, "many", 40)}
    verb, *more = (str(word).format(**places) for word in words)
    usual = ["--base" if verb == "track" else "--model", str(folder / "model"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", WITHOUT_TORCH, *verb.split(), *usual, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("mechlens: "), done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_configuration_says_at_once_what_its_options_can_not_be(tmp_path: Path) -> None:
    for options, says in {
        "method": ({"method": "dla"}, "there is no direction method 'dla'"),
        "permutations": ({"permutations": -1}, "`permutations` must be at least 1, and is -1"),
        "resamples": ({"resamples": 10**9}, "`resamples` must be at most 100000"),
    }.values():
        with pytest.raises(UserError, match=says):
            DetectionPlan(**options)
        with pytest.raises(UserError, match=says):
            FindDirection(positive="harmful", negative="harmless", out=tmp_path, **options)
    with pytest.raises(UserError, match=r"there is no judge 'frases' \(did you mean 'phrases'"):
        Separate(judge="frases", out=tmp_path)
    with pytest.raises(UserError, match="`data` was given without `label_column`"):
        Separate(data="x.csv", out=tmp_path)


NO_COUNTS = {"seed", "layer"}
"""Whole numbers that may be anything, or are compared with the model."""


@pytest.mark.parametrize("name", commands())
def test_every_count_of_a_command_has_a_least_value_and_is_named_where_it_is_below(
    name: str, unread: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hints = get_type_hints(commands()[name].config, include_extras=True)
    whole = [field for field, hint in hints.items() if hint in (int, int | None)]  # and no `PositiveInt`
    assert set(whole) <= NO_COUNTS
    if "n" not in hints:
        return
    needed = {"positive": "harmful", "negative": "harmless", "guard": tmp_path, "checkpoints": tmp_path}
    given = [word for field, value in needed.items() if field in hints for word in (f"--{field}", value)]
    given += ["base", tmp_path] if name == "compare" else []
    assert said([*name.split(), *given, "--n", -5, "--out", tmp_path / "out"], capfd) == (
        "mechlens: --n must be at least 1, and is -5"
    )
    assert not unread
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://silent"])
def test_a_hub_out_of_reach_is_known_in_seconds(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path, unread: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    silent = endpoint == "http://silent"  # takes connections, or swallows them, and says nothing
    with socket.create_server(("127.0.0.1", 0)) as server:
        if silent:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        _require_soon(folder)
    assert not unread


def _require_soon(folder: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"did you mean 'meta-llama/Llama-3.2-1B-Instruct'\?\): .*can't be reached"):
        loading.load("meta-llama/Llama-3.2-1B-Instrct")
    with pytest.raises(UserError, match="can't be reached from here; check the network"):
        loading.load(str(folder / "model"), adapter="nobody/no-adapter")
    with pytest.raises(UserError, match="can't be reached from here; check the network"):
        loading.load_tokenizer("nobody/no-model", revision="v1")
    with pytest.raises(UserError, match=r"could not be loaded from the hub .*can't be reached from here"):
        load_prompts("nobody/no-data")
    assert time.monotonic() - began < 6.0


def test_a_name_without_an_owner_never_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "in_reach", never)
    with pytest.raises(UserError, match=r"did you mean 'smollm2'\?\): the hub's ids have an owner"):
        loading.load("smolm2")
    assert not hub.has_no_owner("gpt2")


def test_an_old_name_or_one_in_the_cache_is_a_checkpoint_without_an_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_cached", lambda: ["tiny-chat", "owner/other"])
    assert [(one.name, one.path) for name in ("gpt2", "tiny-chat", "smollm2") for one in sources(name)] == [
        ("gpt2", "gpt2"), ("tiny-chat", "tiny-chat"), ("smollm2", "smollm2"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="there is no folder 'other' here"):
        sources("other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'gpt2' is neither a local folder nor .*: the hub is switched off here"):
        loading.load("gpt2")


def test_a_value_of_another_type_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for whoever uses the package
    with pytest.raises(UserError, match=r"n is '48' \(a str\); it must be a whole number"):
        Separate(n="48", out=tmp_path / "never")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"layers is \('a',\) \(of type tuple\); it should be a valid integer"):
        run(Causal(layers="a", out=tmp_path / "never"))  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()
