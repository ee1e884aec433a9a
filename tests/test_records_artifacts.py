"""Artefact files: whole or absent, equal after a round trip, trouble said in one sentence."""

import errno
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechlens.checked_json import sealed
from mechlens.errors import UserError
from mechlens.files import writing_to
from mechlens.methods.activations.activations import Activations
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import load, read_header, save, sha256, tensor_digest
from mechlens.runs.folder import FolderCache

CHECKPOINT = Checkpoint(name="tiny", path="/models/tiny", step=3, fingerprint="ab" * 32)


@dataclass(frozen=True)
class Inner:
    weight: Tensor
    note: str | None = None


@dataclass(frozen=True)
class Everything:
    vector: Tensor
    nested: Inner
    several: tuple[Inner, ...]
    names: tuple[str, ...]
    rows: list[tuple[int, float]]
    table: dict[str, Tensor]
    by_level: dict[int, tuple[str, ...]]
    flag: bool
    number: float
    nothing: None
    optional: Inner | None = None
    added_later: int = field(default=7)


def same(a: object, b: object) -> bool:
    """Equal in value, type, dtype and shape, all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if hasattr(a, "__dataclass_fields__") else a == b


def everything() -> Everything:
    base = torch.arange(12.0).reshape(3, 4)
    return Everything(
        vector=base[:, 1],
        nested=Inner(base.to(torch.bfloat16), note='quotes " and </script> and 🙂'),
        several=(Inner(base[0]), Inner(torch.tensor(3), None)),
        names=("a", "b"),
        rows=[(1, math.nan), (2, -math.inf)],
        table={"x": torch.tensor([True, False]), "y": torch.zeros(0, 3), "z": torch.zeros(0)},
        by_level={3: ("inst",), 1: ()},
        flag=True,
        number=1.0,
        nothing=None,
    )


def activations() -> Activations:
    return Activations(
        values=torch.randn(2, 3, 1, 4),
        levels=(0, 1, 2),
        positions=("inst",),
        ids=("p1", "p2"),
        labels=("harmful", "harmless"),
        families=("f", "f"),
        site="resid",
        checkpoint=CHECKPOINT,
        template="cd" * 32,
    )


@pytest.mark.parametrize(
    "make",
    [everything, activations, lambda: CHECKPOINT, lambda: Prompt("a", "hi", history=(("user", "x"),))],
    ids=["everything", "activations", "checkpoint", "prompt"],
)
def test_a_round_trip_gives_an_equal_object(make, tmp_path):
    before = make()
    save(before, tmp_path / "x.safetensors")
    assert same(load(tmp_path / "x.safetensors", type(before)), before)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_unequal_objects_are_told_apart():
    a = everything()
    assert same(a, everything())
    assert not same(a, replace(a, rows=[(1, math.nan), (2.0, -math.inf)]))


def test_a_field_that_came_later_takes_its_default(tmp_path):
    path = tmp_path / "x.safetensors"
    save(everything(), path)
    change_header(path, lambda fields: fields.pop("added_later"))
    assert load(path, Everything).added_later == 7


def test_a_field_from_the_future_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save(CHECKPOINT, path)
    change_header(path, lambda fields: fields.update(quantum=1))
    with pytest.raises(UserError, match=r"x\.safetensors has the field 'quantum'"):
        load(path, Checkpoint)


def change_header(path: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    header = read_header(path)
    change(header["fields"])
    save_file(load_file(path), path, metadata={"mechlens": json.dumps(sealed(header))})


def test_only_classes_that_the_field_types_name_are_built(tmp_path):
    path = tmp_path / "x.safetensors"
    save(activations(), path)
    change_header(path, lambda fields: fields["checkpoint"].update({"$class": "Prompt"}))
    with pytest.raises(UserError, match="not a complete Activations"):
        load(path, Activations)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"field 'nested\.note' holds a set"):
        save(replace(everything(), nested=Inner(torch.zeros(1), note={1})), tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_the_wrong_class_is_named(tmp_path):
    save(CHECKPOINT, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors holds a Checkpoint, not a Prompt"):
        load(tmp_path / "x.safetensors", Prompt)


def test_an_unknown_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mechlens.runs.artifacts.VERSION", 99)
    save(CHECKPOINT, tmp_path / "x.safetensors")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"x\.safetensors has format version 99"):
        load(tmp_path / "x.safetensors", Checkpoint)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_named(length, tmp_path):
    path = tmp_path / "x.safetensors"
    save(activations(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"x\.safetensors is truncated"):
        load(path, Activations)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*x\.safetensors"):
        load(tmp_path / "x.safetensors", Checkpoint)
    with pytest.raises(UserError, match="there is no file"):
        sha256(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not written by mechlens"):
        load(tmp_path / "x.safetensors", Checkpoint)


def test_sha256_follows_the_bytes(tmp_path):
    save(everything(), tmp_path / "a")
    save(everything(), tmp_path / "b")
    save(replace(everything(), number=2.0), tmp_path / "c")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(where, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(CHECKPOINT, path)
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(UserError, match=r"the disk is full: .*x\.safetensors"):
        save(replace(CHECKPOINT, step=4), path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert load(path, Checkpoint) == CHECKPOINT


def test_one_number_of_a_repeated_row_is_kept_as_any_other(tmp_path):
    """Torch calls it contiguous and can't view its bytes: what a patch of one layer at one position comes to."""
    number = torch.tensor([0.25, 0.5], dtype=torch.float64)[:1].expand(3)[:1].reshape(1, 1)
    assert number.is_contiguous()
    assert tensor_digest({"x": number}) == tensor_digest({"x": torch.tensor([[0.25]], dtype=torch.float64)})
    cache = FolderCache(tmp_path)
    cache.put("0" * 64, {"x": number})
    assert cache.get("0" * 64)["x"].equal(number)


def test_a_full_disk_while_writing_tensors_is_said_so(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mechlens.runs.artifacts.save_file", fail)
    with pytest.raises(UserError, match="the disk is full"):
        save(CHECKPOINT, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_what_torch_says_of_a_full_disk_ends_with_what_to_do(tmp_path):
    sentence = r"could not be written \(torch wrote less .*\); free some space there"
    with pytest.raises(UserError, match=sentence), writing_to(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.safetensors could not be written"):
        save(CHECKPOINT, tmp_path / "file" / "x.safetensors")
