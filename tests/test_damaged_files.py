"""Damage of every kind to every kind of file of ours: the right value comes back, or one sentence, and nothing else."""

import json
import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from artefacts import CHECKPOINT, SIZE, activations, grid, guard
from safetensors.torch import load_file, save_file

from mechlens.checked_json import parse_json, sealed
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import DirectionGrid
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.rules import LinearScore
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.adapter_record import FORMAT, RECORD, read_record, require_whole, write_record
from mechlens.models.checkpoints.folders import Index
from mechlens.models.checkpoints.found import Found, told_step
from mechlens.models.checkpoints.lora import read_lora
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import load, read_header, save
from mechlens.runs.folder import FolderCache, read_prompts
from mechlens.runs.results.result import list_runs
from mechlens.runs.run import read_run
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings
from mechlens.studies.finetune.study import LossLog

OFF = WandbSettings(mode="disabled")
DEEP = b"[" * 20_000 + b"]" * 20_000


def written(value: object) -> str:
    """Everything about a value, down to the last bit; NaN as itself."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{value.tolist()}"
    if isinstance(value, dict):
        return str([(written(key), written(inner)) for key, inner in value.items()])
    if isinstance(value, list | tuple):
        return str([written(inner) for inner in value])
    return written(vars(value)) if hasattr(value, "__dataclass_fields__") else repr(value)


@dataclass(frozen=True)
class Kind:
    """One kind of file: how it is made in a folder, and how it is read again."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    seal: bool = True
    """Every change is noticed; else only what is no longer of the right shape."""
    also: tuple[str, ...] = ()
    """How damage may read that costs no more than what it hit."""


def saved(obj: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save(obj, folder / "x.safetensors")
        return folder / "x.safetensors"

    return make


def a_run(folder: Path) -> Path:
    with open_run(verb="v", config=Prompt("a", "b"), out=folder / "run", wandb=OFF, argv=["mechlens", "v"]) as run:
        run.metrics({"auroc": Estimate(0.875, 0.8, 0.9, 40), "lost": Estimate.missing(3)})
        run.prompts([Prompt("a", "hi", "harmful", history=(("user", "x"), ("assistant", "y"))), Prompt("b", "bye")])
        run.artifact("grid", grid(), inputs={"model": "m" * 64})
    return folder / "run" / "run.json"


def a_table(folder: Path) -> Path:
    a_run(folder)
    return folder / "run" / "tables" / "prompts.parquet"


def an_adapter(folder: Path) -> Path:
    made = folder / "adapter"
    made.mkdir()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    halves = {key.format("A"): torch.ones(2, SIZE), key.format("B"): torch.ones(SIZE, 2)}
    save_file(halves, made / "adapter_model.safetensors")
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16, "bias": "none"}))
    write_record(made, {"format": FORMAT, "base_fingerprint": "ab" * 32, "step": 7, "local_only": True, "loss": 0.5})
    return made / RECORD


def a_log(folder: Path) -> Path:
    log = LossLog(folder / "losses.jsonl", lambda step, numbers: None)
    for step in (1, 2, 3):
        log(step, {"loss": 1.5 / step})
    return folder / "losses.jsonl"


def a_piece(folder: Path) -> Path:
    FolderCache(folder).put("a" * 64, {"values": torch.arange(8.0), "steps": torch.tensor([1, 2])})
    return folder / f"{'a' * 64}.safetensors"


def in_file(name: str, content: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(content))
        return folder / name

    return make


def whole_adapter(path: Path) -> object:
    record = read_record(path.parent)
    assert record is not None
    require_whole(path.parent, record)
    return record, {name: change.product() for name, change in read_lora(path.parent).items()}


def step_told(path: Path) -> object:
    step, problem = told_step(Found("checkpoint-9", str(path.parent)))
    if problem:
        raise UserError(problem)
    return step


KINDS = {
    "guard": Kind(saved(guard()), lambda path: load(path, FittedGuard)),
    "grid": Kind(saved(grid()), lambda path: load(path, DirectionGrid)),
    "activations": Kind(saved(activations()), lambda path: load(path, Activations)),
    "checkpoint": Kind(saved(CHECKPOINT), lambda path: load(path, Checkpoint)),
    "run": Kind(a_run, lambda path: read_run(path.parent)),
    "prompts": Kind(a_table, lambda path: read_prompts(path.parents[1])),
    "record": Kind(an_adapter, whole_adapter),
    "adapter weights": Kind(lambda folder: an_adapter(folder).with_name("adapter_model.safetensors"), whole_adapter),
    "adapter config": Kind(lambda folder: an_adapter(folder).with_name("adapter_config.json"), whole_adapter),
    # A line that is cut off at the end is what a kill leaves, and its step is done again.
    "losses": Kind(a_log, lambda path: LossLog(path, print).rows, also=("[(1,", "[]")),
    "piece": Kind(a_piece, lambda path: FolderCache(path.parent).get(path.stem), also=("None",)),
    "trainer state": Kind(in_file("trainer_state.json", {"global_step": 8, "log_history": []}), step_told, seal=False),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One damage of a kind that disks, kills, editors and enemies make."""
    place = draw.randrange(max(1, len(content)))
    some = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    return draw.choice(
        (
            content[:place],
            content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
            content[:place] + some + content[place + len(some) :],
            content[:place] + some + content[place:],
            content[:place] + content[place + len(some) :],
            content[:place] + bytes(len(content) - place),
            content[place:],
            content + content[place:],
            some,
            b"",
        )
    )


def outcome(read: Callable[[], Any]) -> tuple[str, Any]:
    """The sentence of a UserError and nothing, or nothing and what was read."""
    try:
        return "", read()
    except UserError as error:
        return str(error), None


SHAPES = (
    b"null", b"[]", b"{}", b"3", b'"x"', b"[1, 2]", b'{"format": 2}', b'{"format": {}}', b'{"format": true}', DEEP,
    b'{"a": ' + DEEP + b"}", b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}', b'{"step": "7"}', b"\xff\xfe",
    b'{"format": 3, "step": [7]}', b'{"id": "\\ud83d"}', b'{"global_step": null}', b'{"global_step": {"a": 1}}',
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_the_right_value_or_in_a_sentence(kind: str, tmp_path: Path) -> None:
    one = KINDS[kind]
    path = one.make(tmp_path)
    content, right = path.read_bytes(), written(one.read(path))
    draw = random.Random(f"damage {kind}")
    refused = 0
    cases = [damaged(content, draw) for _ in range(250)] + list(SHAPES if path.suffix != ".safetensors" else ())
    for case in cases:
        path.write_bytes(case)
        said, found = outcome(lambda: written(one.read(path)))
        refused += bool(said)
        assert "\n" not in said
        if one.seal and not said:
            assert found == right or found in one.also or (kind == "losses" and right.startswith(found[:-1])), case
    assert refused > len(cases) / 2 or one.also or not one.seal
    path.write_bytes(content)
    assert written(one.read(path)) == right


def test_every_flipped_bit_of_a_guard_is_noticed(tmp_path: Path) -> None:
    path = saved(guard())(tmp_path)
    content = path.read_bytes()
    right = written(load(path, FittedGuard))
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content)):  # every number, and the sign and exponent with it
        for bit in (0, 6, 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(UserError, match="damaged"):
                load(path, FittedGuard)
    path.write_bytes(content)
    assert written(load(path, FittedGuard)) == right


# Files of version 1 have no digest


def without_digest(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Path:
    """The file as the first version of the format had it, after a change."""
    header, tensors = read_header(path), load_file(path)
    change(header["fields"], tensors)
    old = {"version": 1, "class": header["class"], "fields": header["fields"]}
    save_file(tensors, path, metadata={"mechlens": json.dumps(old)})
    return path


def test_an_old_file_is_read_and_is_checked_by_what_can_be(tmp_path: Path) -> None:
    made = saved(guard())

    def first(fields: dict[str, Any]) -> dict[str, Any]:
        place: dict[str, Any] = fields["places"]["$tuple"][0]["fields"]
        return place

    def said(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> str:
        with pytest.raises(UserError) as caught:
            load(without_digest(made(tmp_path), change), FittedGuard)
        return str(caught.value)

    assert written(load(without_digest(made(tmp_path), lambda *_: None), FittedGuard)) == written(guard())
    weight = "places[0].score.weight"
    assert weight in load_file(made(tmp_path))
    assert "not finite" in said(lambda _, tensors: tensors[weight].fill_(math.nan))
    assert "entries; fit it anew" in said(lambda _, tensors: tensors.update({weight: torch.ones(SIZE + 1).double()}))
    assert "float64" in said(lambda _, tensors: tensors.update({weight: torch.ones(SIZE)}))
    for wrong in (torch.ones(SIZE, 1).double(), torch.ones(SIZE, dtype=torch.bool), torch.ones(SIZE).long()):
        assert "not a complete FittedGuard" in said(lambda _, tensors, wrong=wrong: tensors.update({weight: wrong}))
    for value in ({"$float": "nan"}, {"$float": "inf"}, None, "0.5", [0.5]):
        said(lambda fields, _, value=value: fields["calibration"]["fields"].update(threshold=value))
        said(lambda fields, _, value=value: first(fields)["score"]["fields"].update(bias=value))
    for value in (1e308, -1e308):  # it would let everything pass, or nothing
        assert "decides nothing" in said(lambda f, _, value=value: f["calibration"]["fields"].update(threshold=value))
        assert "than a float32" in said(lambda f, _, value=value: first(f)["score"]["fields"].update(bias=value))
    for value in (1e30, -1e30):  # a float32 holds it, and no score of a residual stream comes near it
        for change in (
            lambda f, _, value=value: f["calibration"]["fields"].update(threshold=value),
            lambda f, _, value=value: first(f)["score"]["fields"].update(bias=value),
        ):
            assert "so it decides nothing" in said(change)
    assert "level 1, inst, are all zero" in said(lambda _, tensors: tensors[weight].zero_())
    centroid = "places[1].score.positive"
    longer = torch.ones(SIZE + 1).double()
    assert re.search("entries|not a complete", said(lambda _, tensors: tensors.update({centroid: longer})))
    same = "places[1].score.negative"
    assert "centroids the same" in said(lambda _, tensors: tensors.update({same: tensors[centroid].clone()}))
    for one in (centroid, same):
        assert "one of a guard's centroids is all zero" in said(lambda _, tensors, one=one: tensors[one].zero_())
    assert "at least one place" in said(lambda fields, _: fields["places"].update({"$tuple": []}))
    assert "from 0 on" in said(lambda fields, _: first(fields).update(level=-1))


@pytest.mark.parametrize("name", ["levels", "positions", "ids", "labels", "families", "axes"])
def test_activations_whose_names_are_not_those_of_their_values_are_refused(name: str, tmp_path: Path) -> None:
    """As a stranger's file may have them, with a sound seal: showing them, or reading a cell, failed later."""
    whole = activations()
    for other in ((), (*getattr(whole, name), *getattr(whole, name))):
        path = saved(replace(whole, **{name: other}))(tmp_path)
        with pytest.raises(UserError, match="the activations have values of the sizes"):
            load(path, Activations)


def test_a_guard_of_another_width_is_refused_where_it_meets_a_model() -> None:
    acts = replace(activations(), values=torch.randn(2, 1, 1, SIZE + 1))
    for other in (False, True):
        with pytest.raises(UserError, match=f"reads vectors of {SIZE} entries and the model's have {SIZE + 1}"):
            guard().scores(acts, other_weights=other)


def test_a_new_file_can_not_pass_as_an_old_one(tmp_path: Path) -> None:
    path = saved(guard())(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    assert path.read_bytes() != content
    with pytest.raises(UserError, match="something else than it should"):
        load(path, FittedGuard)


def test_what_is_not_finite_is_no_guard_and_gets_no_verdict() -> None:
    fitted = guard()
    acts = replace(activations(), values=torch.full((2, 1, 1, SIZE), math.nan))
    one = replace(fitted, places=fitted.places[:1])
    with pytest.raises(UserError, match="can't be judged"):
        one.scores(acts)
    with pytest.raises(UserError, match="prompt 2 of 2 is nan"):
        fitted.verdicts(torch.tensor([0.5, math.nan]).double())
    for threshold in (math.nan, math.inf):
        with pytest.raises(UserError, match="decides nothing"):
            replace(fitted.calibration, threshold=threshold)
    with pytest.raises(UserError, match="not finite"):
        LinearScore(torch.ones(SIZE).double(), math.nan)


# One reader for JSON


@pytest.mark.parametrize("text", SHAPES, ids=lambda text: text[:20])
def test_json_of_another_shape_is_one_sentence(text: bytes) -> None:
    for shape in (Index, tuple[tuple[str, str], ...]):
        said, found = outcome(lambda shape=shape: parse_json(text, shape, "x.json", "make it again"))
        assert (said.startswith("x.json ") and said.endswith("; make it again")) or (text, found) == (b"[]", ())


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    a_run(tmp_path / "good")
    for i, text in enumerate(SHAPES):
        (tmp_path / f"bad-{i}").mkdir()
        (tmp_path / f"bad-{i}" / "run.json").write_bytes(text)
    with pytest.warns(UserWarning, match="left out of the list"):
        assert [folder.name for folder, _ in list_runs(tmp_path)] == ["run"]


def test_a_record_from_before_seals_is_read(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    record = json.loads(path.read_text())
    old = {name: value for name, value in record.items() if name not in ("sha256", "tables")} | {"format": 1}
    path.write_text(json.dumps(old))
    assert read_run(path.parent) == replace(read_run(path.parent), tables={})
    assert read_run(path.parent).metrics["auroc"] == Estimate(0.875, 0.8, 0.9, 40)
    path.write_text(json.dumps(record | {"metrics": record["metrics"] | {"auroc": record["metrics"]["lost"]}}))
    with pytest.raises(UserError, match="was changed by hand or damaged"):
        read_run(path.parent)
    path.write_text(json.dumps(sealed({**old, "format": 2})))
    assert read_run(path.parent).metrics["auroc"].n == 40


def test_a_pipe_is_no_record(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_run(tmp_path)


# Losses


def test_a_torn_line_swallows_no_step(tmp_path: Path) -> None:
    path = a_log(tmp_path)
    whole = path.read_bytes()
    for cut in (1, 5, 20):
        path.write_bytes(whole[:-cut])
        log = LossLog(path, lambda step, numbers: None)
        assert list(log.rows) == [1, 2]
        log(3, {"loss": 0.25})
        log(4, {"loss": 0.125})
        again = LossLog(path, lambda step, numbers: None)
        assert again.table()["loss"].tolist() == [1.5, 0.75, 0.25, 0.125]
    path.write_bytes(whole[:30] + whole)
    with pytest.raises(UserError, match=r"losses\.jsonl line 1 .*put back what stood there"):
        LossLog(path, lambda step, numbers: None)


def test_a_line_taken_out_is_noticed(tmp_path: Path) -> None:
    path = a_log(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)

    def table(kept: list[bytes]) -> pd.DataFrame:
        path.write_bytes(b"".join(kept))
        return LossLog(path, lambda step, numbers: None).table(3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(table(lines)) == 3
    for out in range(3):
        with pytest.warns(UserWarning, match=f"lacks 1 steps, the first of them {out + 1}, .*start over"):
            assert len(table(lines[:out] + lines[out + 1 :])) == 2


def test_losses_without_seals_are_read(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 0.5, "grad_norm": NaN}\n{"step": 2, "loss": 1}\n')
    table = LossLog(tmp_path / "losses.jsonl", lambda step, numbers: None).table()
    assert isinstance(table, pd.DataFrame)
    assert table["loss"].tolist() == [0.5, 1.0]
