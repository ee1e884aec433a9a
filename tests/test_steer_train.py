"""`mechlens steer train`: rivals are what they say, the best strength is taken, and the verdict errs as written."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from planted_steering import LAYERS, WORLDS, planted
from refusing import requests, save_refusing_model
from sentence import require_one_sentence
from test_steering import batch_of, made

import mechlens as ml
from mechlens.cli import main
from mechlens.methods.steering.steering import logits_under
from mechlens.models.attention.outputs import head_matrices
from mechlens.models.sites import site_hook
from mechlens.studies.controllers.head_shifts import head_shifts
from mechlens.studies.controllers.measured import chosen_strengths
from mechlens.studies.controllers.verdict import (
    DO_NOT,
    HELPS,
    MATTER,
    NEITHER,
    NO_BETTER,
    NOT_MEASURABLE,
    OVER_CONSTANT,
    WORSE,
)
from mechlens.studies.shared.sources import wrapped

DRAWS = 40


@pytest.mark.parametrize(
    ("world", "most", "least"),
    [
        ("deciding helps", {WORSE: 0.0, NO_BETTER: 0.0}, {HELPS: 0.95}),
        ("both alike", {HELPS: 0.1, WORSE: 0.1, NEITHER: 0.0}, {}),
        ("both alike, prompt by prompt apart", {HELPS: 0.1, WORSE: 0.1}, {}),
        ("the controller is the constant", {}, {NO_BETTER: 1.0}),
        ("all three are one", {}, {NO_BETTER: 1.0}),
        ("nearly all is right", {HELPS: 0.1, WORSE: 0.1}, {}),
        ("neither refuses anything", {HELPS: 0.0, WORSE: 0.0}, {NEITHER: 0.5}),
        ("refusal by chance", {HELPS: 0.1, WORSE: 0.1}, {}),
        ("a constant breaks what was there", {HELPS: 0.15, WORSE: 0.0}, {OVER_CONSTANT: 0.8}),
        ("a constant does better", {HELPS: 0.0}, {WORSE: 0.8}),
    ],
)
def test_the_verdict_on_planted_refusals(world: str, most: dict[str, float], least: dict[str, float]) -> None:
    words = [planted(WORLDS[world], LAYERS["all orders alike"], seed, 40).word for seed in range(DRAWS)]
    for word, share in most.items():
        assert words.count(word) / DRAWS <= share, word
    for word, share in least.items():
        assert words.count(word) / DRAWS >= share, word


def test_the_verdict_on_planted_layer_weights() -> None:
    def share(name: str, word: str) -> float:
        told = [planted(WORLDS["deciding helps"], LAYERS[name], seed, 40).layers for seed in range(DRAWS)]
        return told.count(word) / DRAWS

    assert share("a few layers carry it", MATTER) >= 0.95
    assert share("all orders alike", MATTER) <= 0.1
    assert share("own weights are one more order", MATTER) <= 0.15
    assert share("all orders alike", DO_NOT) >= 0.9


def test_too_few_prompts_have_no_verdict() -> None:
    few = replace(WORLDS["deciding helps"], family=5)
    for world, n in ((WORLDS["deciding helps"], 19), (few, 45)):  # of 9 families
        told = planted(world, LAYERS["all orders alike"], 0, n)
        said = f"Not measurable: there are {2 * n} test prompts; give 20 of each class, of 10 families."
        assert str(told.headline) == said
    assert planted(few, LAYERS["all orders alike"], 0, 50).word != NOT_MEASURABLE


def test_of_equal_strengths_the_weakest_is_taken() -> None:
    rows = [("a", 0.1, 0.5), ("a", 0.2, 0.7), ("a", 0.4, 0.7), ("b", 0.1, 0.0), ("b", 0.2, -0.1)]
    choice = pd.DataFrame(rows, columns=["rival", "strength", "difference"])
    assert chosen_strengths(choice) == {"a": 0.2, "b": 0.1}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_shifts_of_heads_are_shifts_of_heads(architecture: str) -> None:
    """What is added at `attn_out` is what comes of adding to the heads' own outputs, at every token."""
    model, batch = made(architecture), batch_of(architecture)
    harmful = torch.tensor([True, False, True, False])
    shifts = head_shifts(model, batch, [0, 1, 2, 3], [0, 1, 2, 3], harmful, 0.3)
    assert 0 < len(shifts) <= 3
    by_layer = {one.layers[0]: one.direction.vector for one in shifts}
    matrices = head_matrices(model, range(3))

    def shifted(layer: int) -> Any:
        flat = matrices[layer].reshape(-1, matrices[layer].shape[-1])
        # A shift of z that comes to this vector; of several the shortest.
        found = torch.linalg.lstsq(flat.T, by_layer[layer].unsqueeze(1)).solution[:, 0]

        def edit(z: Any, hook: Any) -> Any:
            return z + found.reshape(z.shape[2:]).to(z)

        return (site_hook("z", layer), edit)

    for i in range(len(batch.prompts)):
        tokens = torch.tensor([batch.row(i)])
        with torch.inference_mode():
            by_heads = model.run_with_hooks(tokens, fwd_hooks=[shifted(layer) for layer in by_layer])[0, -1]
        added = logits_under(model, batch.select([i]), list(shifts))[0]
        assert float((by_heads - added).abs().max()) < 1e-3 * float(added.abs().max())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steer_train")
    save_refusing_model(folder / "model")
    for name, harmful in (("harmful", True), ("harmless", False)):
        texts = requests(60, harmful)
        (folder / f"{name}.txt").write_text("\n".join(texts[:36]), encoding="utf-8")
        (folder / f"other_{name}.txt").write_text("\n".join(texts[36:]), encoding="utf-8")
    (folder / "templates.txt").write_text("Please: [INSERT PROMPT HERE]\n", encoding="utf-8")
    main([str(word) for word in command(folder)])
    return folder


def command(folder: Path, *more: object) -> list[object]:
    files = [f"--{name.replace('_', '-')}" for name in ("harmful", "harmless", "test_harmful", "test_harmless")]
    paths = [folder / f"{name}.txt" for name in ("harmful", "harmless", "other_harmful", "other_harmless")]
    given = [word for pair in zip(files, paths, strict=True) for word in pair]
    quick = ["--resamples", 40, "--max-new-tokens", 3, "--epochs", 2, "--draws", 2, "--n", 24, "--strengths", 0.05, 0.3]
    rest = ["--punctuation", "keep", "--wandb.mode", "disabled", "--templates", folder / "templates.txt"]
    return ["steer", "train", "--model", folder / "model", "--out", folder / "out", *given, *quick, *rest, *more]


def test_the_verb_writes_controllers_tables_and_a_report(recorded: Path) -> None:
    run = require_one_sentence(recorded / "out")
    assert run.status == "success"
    opened = ml.open(recorded / "out")
    refusals = opened.tables["refusals"]
    assert set(refusals["prompts"]) == {"held out", "another source", "in jailbreak templates"}
    assert len(set(refusals["rival"])) == 9
    totals = opened.tables["totals"].set_index("rival")
    # Nothing is damaged where nothing is done, and a gate that is shut for harmless prompts does less than a constant.
    assert totals.loc["no steering", "kl"] == 0
    assert totals.loc["no steering", "plain_kl"] == 0
    for name in ("gap", "kl", "plain_kl", "plain_loss", "tokens", "repetition"):
        assert ((totals[f"{name}_low"] <= totals[name] + 1e-9) & (totals[name] <= totals[f"{name}_high"] + 1e-9)).all()
    page = (recorded / "out" / "report.html").read_text(encoding="utf-8")
    loss = totals.loc["constant"]
    assert f"{loss['plain_loss']:.2f} [{loss['plain_loss_low']:.2f}, {loss['plain_loss_high']:.2f}]" in page
    for name, row in totals.iterrows():
        given = opened.tables["answers"]
        own = given[given["rival"] == name]
        shares = own.groupby("label")["refused"].mean()
        assert row["gap"] == pytest.approx(shares["harmful"] - shares["harmless"])
    model = ml.load(str(recorded / "model"))
    controller = ml.open(recorded / "out" / "controller.safetensors")
    strength = float(totals.loc["controller", "strength"])
    held_out = opened.tables["answers"]
    own = held_out[(held_out["rival"] == "controller") & (held_out["prompts"] == "another source")]
    said = ml.answer_under(model, list(own["prompt"]), [ml.Controlled(controller, strength=strength)], max_new_tokens=3)
    assert list(said.texts) == list(own["answer"])


def test_a_controller_steers_one_prompt_at_the_command_line(recorded: Path, capsys: Any) -> None:
    asked = "Make tea zzzzzzzz number 9"
    given = ["steer", "--model", recorded / "model", "--prompt", asked, "--max-new-tokens", 3]
    main([str(word) for word in (*given, "--controller", recorded / "out")])
    said = capsys.readouterr().out
    controller = ml.open(recorded / "out" / "controller.safetensors")
    model = ml.load(str(recorded / "model"))
    by = ml.Controlled(controller, strength=controller.evidence["strength"])
    for done, name in (((), "unsteered"), ((by,), "steered")):
        (text,) = ml.answer_under(model, [asked], done, max_new_tokens=3).texts
        assert text in said.partition(f"{name} (" if done else f"{name}:")[2]
    assert re.search(r"gate \d\.\d\d at strength", said)
    main([str(word) for word in (*given, "--controller", recorded / "out", "--strength", "0.5")])
    assert "at strength 0.5 of the residual norm" in capsys.readouterr().out  # as it was typed
    wrong = {
        ("--controller", recorded / "out", "--unit", "raw"): "--unit is of a direction",
        ("--controller", recorded / "out", "--direction", recorded / "out"): "one of them",
        (): "give --direction or --controller",
        ("--controller", recorded / "nowhere"): "there is no file",
    }
    for more, sentence in wrong.items():
        with pytest.raises(SystemExit):
            main([str(word) for word in (*given, *more)])
        assert sentence in capsys.readouterr().err


def test_what_can_not_be_is_said_before_the_model_is_read(
    recorded: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechlens.studies.shared.inputs.kept_or_loaded", None)
    with pytest.raises(SystemExit):
        main(
            [
                str(word)
                for word in command(
                    recorded, "--test-harmless", recorded / "other_harmful.txt", "--out", recorded / "b"
                )
            ]
        )
    assert "a prompt can be of one class only" in capsys.readouterr().err
    (recorded / "none.txt").write_text("Do it.\n", encoding="utf-8")
    (recorded / "long.txt").write_text("\n".join(f"{i} {'a ' * 900}" for i in range(24)), encoding="utf-8")
    wrong = {
        ("--layers", "1", "--reads", "4"): "level 4 is to be read and layer 1 steered",
        ("--reads", "99"): "levels 0 to 6 and layers 0 to 5, and 99 was asked for",
        ("--layers", "2", "2"): "layer 2 is named twice",
        ("--templates", recorded / "none.txt"): "has no [INSERT PROMPT HERE] for the prompt",
        ("--test-harmful", recorded / "long.txt"): "tokens and the model takes",
    }
    for more, sentence in wrong.items():
        with pytest.raises(SystemExit):
            main([str(word) for word in command(recorded, *more, "--out", recorded / "c")])
        assert sentence in capsys.readouterr().err


def test_templates_are_in_the_column_that_has_places_for_prompts(tmp_path: Path) -> None:
    file = tmp_path / "templates.csv"
    file.write_text('name,jailbreak\na,"Please: [INSERT PROMPT HERE]"\n', encoding="utf-8")
    (one,) = wrapped([ml.Prompt("p", "Bake a cake.")], str(file), 0)
    assert one.text == "Please: Bake a cake."
