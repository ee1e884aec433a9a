"""Tracking inside a training run reads the plain model truly, and training doesn't notice it."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved import requests
from test_wandb_log import read_log
from tiny import tiny_hf, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from mechlens.callbacks.edge import EdgeCallback, edge_of_batch
from mechlens.callbacks.tracking import REFERENCE_FILE, MechlensCallback
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.directions.direction import cosine, direction_grid
from mechlens.methods.numerics.edge import numerical_edge
from mechlens.methods.probing.auroc_grid import contrast_part, held_out_auroc
from mechlens.methods.statistics.resample import one_thread
from mechlens.models import native_pass as looking
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.native import blocks_of
from mechlens.models.native_pass import plain_pass, undisturbed
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.artifacts import load, save
from mechlens.settings import DetectionPlan
from mechlens.studies.track import live
from mechlens.studies.track.live import NEGATIVE, POSITIVE, LiveReference, live_numbers
from mechlens.studies.track.measures.home import FLOORS

PLAN = DetectionPlan(seed=0, resamples=40, permutations=10)
UP = [Prompt(f"up-{i}", text, family=f"f{i}") for i, text in enumerate(requests(24, "make"))]
# Another last word, so that even a random model tells the classes apart at `inst`.
DOWN = [Prompt(f"down-{i}", p.text.replace("for me", "for you"), family=p.family) for i, p in enumerate(UP)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def callback(**more: Any) -> MechlensCallback:
    return MechlensCallback(UP, DOWN, tiny_tokenizer(), name="mood", plan=PLAN, refusal_tokens=(40, 41), **more)


# Reading


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "mixtral", "bloom"])
def test_the_plain_pass_reads_what_collect_reads(architecture: str, tiny_model: Any) -> None:
    batch = tokenize([*UP[:5], *DOWN[:4], Prompt("long", "the " * 30 + "end")], ChatTemplate(tiny_tokenizer()))
    module = tiny_hf(architecture)
    found = plain_pass(module, batch, ("inst", "post[2]"), (0, 1, 3), rows=4)
    acts = collect(tiny_model(architecture), batch, positions=("inst", "post[2]"), levels=(0, 1, 3))
    torch.testing.assert_close(found.residuals, acts.values, rtol=1e-4, atol=1e-4)
    for i in range(len(batch.prompts)):
        alone = module(torch.tensor([batch.row(i)])).logits[0, -1].detach()
        torch.testing.assert_close(found.logits[i], alone, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_read_with_its_change() -> None:
    batch = tokenize(UP[:3], ChatTemplate(tiny_tokenizer()))
    plain = plain_pass(tiny_hf(), batch, ("last",), (3,)).residuals
    wrapped = get_peft_model(tiny_hf(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(plain_pass(wrapped, batch, ("last",), (3,)).residuals, plain)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    merged = plain_pass(wrapped, batch, ("last",), (3,)).residuals
    assert not torch.allclose(merged, plain, atol=1e-2)
    torch.testing.assert_close(
        merged, plain_pass(wrapped.merge_and_unload(), batch, ("last",), (3,)).residuals, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(UserError, match="no level"):
        plain_pass(tiny_hf(), batch, ("last",), (4,))


def test_modes_and_random_states_come_back_also_after_an_error() -> None:
    module = tiny_hf("gpt2").train()
    blocks_of(module)[1].eval()  # somebody froze a block
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with contextlib.suppress(RuntimeError), undisturbed(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.is_grad_enabled()


# Training


def lessons(n: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(5, 200, (n, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(out: Path, callbacks: list[Any], *, steps: int = 4, **more: Any) -> Trainer:
    """Four steps on a tiny GPT-2 with dropout, evaluated at every other step."""
    module = tiny_hf("gpt2")
    settings = {"seed": 0, "report_to": "none", **more}
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    made = Trainer(
        model=module, args=arguments, train_dataset=lessons(32), eval_dataset=lessons(8), callbacks=callbacks
    )
    assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, MechlensCallback]:
    """A training run that was watched."""
    watching = callback(log=lambda step, values: None)
    with one_thread():
        run = trainer(tmp_path_factory.mktemp("watched"), [watching])
        run.train()
    return run, watching


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_ends_in_the_same_weights_to_the_bit(
    trained: tuple[Trainer, MechlensCallback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trainer(tmp_path / "alone", [])
    alone.train()
    assert same(weights(trained[0]), weights(alone))

    @contextlib.contextmanager
    def careless(module: Any) -> Iterator[None]:
        with torch.no_grad():
            module.train()
            yield

    # A reading in training mode, as the model is between steps, draws dropout masks and would have been noticed.
    monkeypatch.setattr(looking, "undisturbed", careless)
    disturbed = trainer(tmp_path / "disturbed", [callback(log=lambda step, values: None)])
    disturbed.train()
    assert not same(weights(disturbed), weights(alone))


def test_the_numbers_are_those_of_the_saved_checkpoints(trained: tuple[Trainer, MechlensCallback]) -> None:
    run, watching = trained
    table = watching.table().set_index(["step", "number"])
    assert sorted(set(table.index.get_level_values("step"))) == [0, 2, 4]
    reference = load(Path(run.args.output_dir) / REFERENCE_FILE, LiveReference)
    assert watching.reference is not None
    for kept, ours in zip(reference.directions, watching.reference.directions, strict=True):
        assert torch.equal(kept.vector, ours.vector)
    split, batch = watching.watched.split, watching.watched.batch
    hf_model = tiny_hf("gpt2")
    hf_model.load_state_dict(run.model.state_dict())
    model = bridge(hf_model, tiny_tokenizer(), Checkpoint("x", "x"))
    for asked, direction in zip(("inst", "last"), reference.directions, strict=True):
        acts = collect(model, batch, positions=(asked,), levels=(direction.level,))
        train = contrast_part(acts, split.train, (POSITIVE, NEGATIVE))
        test = contrast_part(acts, split.test, (POSITIVE, NEGATIVE))
        refitted = direction_grid(train, POSITIVE, NEGATIVE)
        frozen = replace(refitted, vectors=direction.vector[None, None], train_ids=())
        for name, grid in (("frozen", frozen), ("refitted", refitted)):
            offline = held_out_auroc(grid, test, (POSITIVE, NEGATIVE))
            live = table.loc[(4, f"mood.auroc.{asked}.{name}")]
            wanted = offline.at(direction.level, offline.positions[0])
            assert live[["value", "low", "high", "n"]].tolist() == pytest.approx(list(wanted.row().values()), abs=1e-3)
        offline_cosine = float(cosine(refitted.vectors[0, 0], direction.vector))
        assert table.loc[(4, f"mood.cosine.{asked}")]["value"] == pytest.approx(offline_cosine, abs=1e-3)


def test_at_the_start_the_refitted_direction_is_the_reference(trained: tuple[Trainer, MechlensCallback]) -> None:
    table = trained[1].table()
    values = table[table["step"] == 0].set_index("number")["value"]
    for asked in ("inst", "last"):
        assert values[f"mood.cosine.{asked}"] == pytest.approx(1.0)
        assert values[f"mood.auroc.{asked}.frozen"] == values[f"mood.auroc.{asked}.refitted"]
    assert values["mood.auroc.inst.frozen"] == values["mood.accuracy.inst"] == 1
    assert values["mood.gap.inst"] > 0
    later = table[table["step"] == 4].set_index("number")["value"]
    assert later["mood.cosine.inst"] < 1 - 1e-5
    assert {"mood.logodds.positive", "mood.logodds.negative"} <= set(values.index)


def test_what_is_read_stands_beside_the_words_and_an_untrained_network(
    trained: tuple[Trainer, MechlensCallback],
) -> None:
    """The classes differ in their last word: everything reads it at `inst`, and no training is ahead of that."""
    run, watching = trained
    table = watching.table().set_index(["step", "number"])
    for step in (0, 2, 4):
        values = table.loc[step]["value"]
        for asked in ("inst", "last"):
            assert {f"mood.auroc.{asked}.{name}" for name in ("probe", *FLOORS)} <= set(values.index)
            gains = [values[f"mood.auroc.{asked}.probe"] - values[f"mood.auroc.{asked}.{name}"] for name in FLOORS]
            assert any(values[f"mood.gain.{asked}"] == pytest.approx(gain) for gain in gains)
        for name in FLOORS:
            assert values[f"mood.auroc.inst.{name}"] == 1.0
            assert values[f"mood.auroc.inst.{name}"] == table.loc[(0, f"mood.auroc.inst.{name}")]["value"]
        assert table.loc[(step, "mood.gain.inst")]["low"] <= 0
    reference = load(Path(run.args.output_dir) / REFERENCE_FILE, LiveReference)
    assert len(reference.floors) == 2
    assert reference.floors[0].of("tfidf").shape == (6, 48)


def test_a_reference_of_an_earlier_version_has_no_floor(
    trained: tuple[Trainer, MechlensCallback], tmp_path: Path
) -> None:
    run, watching = trained
    assert watching.reference is not None
    three = [replace(floor, names=floor.names[::2], scores=floor.scores[::2]) for floor in watching.reference.floors]
    for floors in ((), tuple(three)):  # none, or of three divisions into folds, where pairs of one fold are of several
        save(replace(watching.reference, floors=floors), tmp_path / REFERENCE_FILE)
        found = live_numbers(run.model, watching.watched, load(tmp_path / REFERENCE_FILE, LiveReference), 4)
        assert "auroc.inst.frozen" in found
        assert "gain.inst" not in found


def test_blocks_that_can_t_be_drawn_leave_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_hf("gpt2")
    watched = callback().watched

    def quantised(module: Any, seed: int) -> Any:
        raise UserError("the model's blocks are quantised")

    monkeypatch.setattr(live, "random_blocks", quantised)
    with pytest.warns(UserWarning, match="no floor of an untrained network: the model's blocks are quantised"):
        reference = live.live_reference(module, watched, 0)
    found = live_numbers(module, watched, reference, 0)
    assert found["auroc.inst.tfidf"].value == 1.0
    assert not found["auroc.inst.random_blocks"].measurable
    assert not found["gain.inst"].measurable  # what isn't measured can't be beaten


def test_a_run_that_goes_on_keeps_its_reference(trained: tuple[Trainer, MechlensCallback], tmp_path: Path) -> None:
    first = trainer(tmp_path, [callback(log=lambda step, values: None)], steps=2)
    first.train()
    told: list[int] = []
    watching = callback(log=lambda step, values: told.append(step))
    run = trainer(tmp_path, [watching])
    run.train(resume_from_checkpoint=True)
    assert told == [2, 4]
    ours, theirs = watching.reference, trained[1].reference
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(ours.directions, theirs.directions, strict=True))
    history = [entry for entry in run.state.log_history if "mechlens/mood.auroc.inst.frozen" in entry]
    assert [entry["step"] for entry in history] == [0, 2, 2, 4]
    other = MechlensCallback(UP[:20], DOWN[:20], tiny_tokenizer(), plan=PLAN)
    with pytest.raises(UserError, match="other prompts"):
        trainer(tmp_path, [other]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / REFERENCE_FILE).unlink()
    with pytest.raises(UserError, match="goes on from step 2"):
        trainer(tmp_path, [callback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_numbers_land_in_the_trainer_s_own_w_and_b_run(tmp_path: Path) -> None:
    import wandb

    wandb.init(project="test", mode="offline", dir=str(tmp_path))
    trainer(tmp_path / "out", [callback()], report_to="wandb").train()
    wandb.finish()
    rows = [
        {".".join([item.key, *item.nested_key]).strip("."): item.value_json for item in record.history.item}
        for record in read_log(tmp_path)
        if record.WhichOneof("record_type") == "history"
    ]
    tracked = [row for row in rows if "mechlens/mood.auroc.inst.frozen" in row]
    assert [int(row["train/global_step"]) for row in tracked] == [0, 2, 4]
    assert any("eval/loss" in row for row in rows)  # one run holds both
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert UP[0].text.encode() not in everything


def test_prompts_that_can_t_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match="two prompts to watch have the id 'up-0'"):
        MechlensCallback(UP, [*DOWN, UP[0]], tiny_tokenizer())
    with pytest.raises(UserError, match="no position"):
        MechlensCallback(UP, DOWN, tiny_tokenizer(), positions=("first",))


# The numerical edge


def watched_edge(folder: Path, scale: float) -> tuple[Trainer, EdgeCallback]:
    """A run whose logits are `scale` times as large, and who watched its numerical edge."""
    watching = EdgeCallback(log=lambda step, values: None)
    run = trainer(folder, [watching])
    run.args.logging_steps = 1
    with torch.no_grad():
        run.model.get_output_embeddings().weight *= scale
    run.train()
    return run, watching


def test_the_edge_is_seen_where_it_was_planted_and_changes_nothing(
    trained: tuple[Trainer, MechlensCallback], tmp_path: Path
) -> None:
    with one_thread():
        run, plain = watched_edge(tmp_path / "plain", 1.0)
        _, wild = watched_edge(tmp_path / "wild", 1e6)
    assert same(weights(trained[0]), weights(run))
    assert not run.model._forward_hooks
    table = plain.table()
    assert len(table) == run.state.global_step
    assert table["collapsed"].eq(0).all()
    assert wild.table()["collapsed"].iloc[0] > 0.9
    assert wild.table()["scale"].iloc[0] > 1e4 * table["scale"].iloc[0]
    assert table["alignment"].between(-1, 1).all()
    logged = [line for line in run.state.log_history if "mechlens/edge.collapsed" in line]
    assert [line["step"] for line in logged] == list(table["step"])


def test_only_learnt_positions_count_each_before_its_label() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 1, -100], [2, 4, -100, -100, 6]])
    seen = edge_of_batch(logits, labels)
    assert seen == numerical_edge(
        torch.stack([logits[0, 1], logits[0, 2], logits[1, 0], logits[1, 3]]), torch.tensor([3, 1, 4, 6])
    )
    assert edge_of_batch(logits, torch.full((2, 5), -100)) is None
