"""Fine-tuning is reproducible, survives being killed, learns answers only, and never trains on a study set."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.load import load, load_hf, merge_adapter
from mechlens.models.offline import keep_here
from mechlens.models.packaged import ADAPTERS, adapter_folder
from mechlens.prompts.builtin import builtin_names, builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.finetune.response_loss import IGNORED, collate, encode, end_of_turn
from mechlens.studies.finetune.training import STAGING, finetune
from mechlens.studies.shared import training_data
from mechlens.studies.shared.training_data import text_sha256, trained_on, training_prompts, unseen

HARMFUL, BENIGN = training_prompts("harmful"), training_prompts("benign")
ADAPTER = adapter_folder("smollm2-refuser")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny chat model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_hf().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(base: Path) -> FinetuneConfig:
    """Six steps on the tiny model."""
    return FinetuneConfig(
        model=str(base), harmful=12, benign=12, answer_tokens=6, rank=2, batch_size=4, learning_rate=1e-2,
        resume_every=2, checkpoints=(1, 3), epochs=1, plain=2, plain_tokens=8, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight")
    finetune(config, out)
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _same(a: Path, b: Path) -> bool:
    ours, theirs = _weights(a), _weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Training


def test_one_seed_gives_one_set_of_weights(config: FinetuneConfig, straight: Path, tmp_path: Path) -> None:
    again = finetune(config, tmp_path / "again")
    other = finetune(replace(config, seed=1), tmp_path / "other")
    assert _same(straight / "adapter", again.adapter)
    assert not _same(straight / "adapter", other.adapter)
    assert [path.name for path in again.checkpoints] == ["checkpoint-1", "checkpoint-3"]
    assert _same(straight / "checkpoint-1", again.checkpoints[0])


def test_training_changes_the_model_and_merges(config: FinetuneConfig, straight: Path) -> None:
    trained, plain = load(config.model, adapter=str(straight / "adapter")), load(config.model)
    tokens = torch.arange(5, 25).unsqueeze(0)
    assert not torch.allclose(trained(tokens), plain(tokens), atol=1e-3)
    early = load(config.model, adapter=str(straight / "checkpoint-1"))
    assert early.mechlens.checkpoint.fingerprint != trained.mechlens.checkpoint.fingerprint


def test_every_step_is_logged_with_its_loss(config: FinetuneConfig, tmp_path: Path) -> None:
    steps: list[int] = []
    losses: list[float] = []

    def log(step: int, numbers: dict[str, float]) -> None:
        steps.append(step)
        losses.append(numbers["loss"])

    done = finetune(config, tmp_path, log=log)
    assert steps == list(range(1, done.steps + 1))
    assert losses[-1] < losses[0]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.training import finetune

settings = json.loads(sys.argv[1])
settings["checkpoints"] = tuple(settings["checkpoints"])

def log(step, numbers):
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

finetune(FinetuneConfig(**settings), Path(sys.argv[2]), log=log)
"""


@pytest.mark.parametrize("step", [1, 5])
def test_killed_and_resumed_equals_undisturbed(
    config: FinetuneConfig, straight: Path, tmp_path: Path, step: int
) -> None:
    settings = json.dumps(vars(config))
    done = warm.python(KILLED, settings, str(tmp_path), str(step))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "adapter").exists()
    half = tmp_path / STAGING / "checkpoint-6"  # where the Trainer writes it
    half.mkdir(parents=True, exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    logged: list[int] = []
    resumed = finetune(config, tmp_path, log=lambda number, _: logged.append(number))
    assert logged[0] == (5 if step == 5 else 1)
    assert [path.name for path in resumed.checkpoints] == ["checkpoint-1", "checkpoint-3"]
    ours, theirs = _weights(resumed.adapter), _weights(straight / "adapter")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-2)


def test_a_finished_run_is_only_read(config: FinetuneConfig, straight: Path) -> None:
    before = (straight / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    logged: list[int] = []
    finetune(config, straight, log=lambda number, _: logged.append(number))
    assert not logged
    assert (straight / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused(config: FinetuneConfig, straight: Path) -> None:
    with pytest.raises(UserError, match="another learning_rate, seed"):
        finetune(replace(config, seed=7, learning_rate=1.0), straight)


def test_an_adapter_of_another_base_is_refused(straight: Path) -> None:
    with pytest.raises(UserError, match="trained on another base"):
        merge_adapter(tiny_hf(seed=5), str(straight / "checkpoint-1"))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"rank": -1},
        {"learning_rate": float("nan")},
        {"warmup": 1.0},
        {"harmful": 5000},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(config: FinetuneConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        finetune(replace(config, **change), tmp_path)


def test_the_record_says_what_was_trained_on(config: FinetuneConfig, straight: Path) -> None:
    record = json.loads((straight / "adapter" / "mechlens.json").read_text())
    assert record["base_fingerprint"] == weight_fingerprint(load_hf(config.model)[0].state_dict())
    texts = {prompt.id: prompt.text for prompt in [*HARMFUL, *BENIGN]}
    assert len(record["training"]["ids"]) == 24 - len(record["training"]["left_out"])
    assert set(record["training"]["text_sha256"]) == {text_sha256(texts[name]) for name in record["training"]["ids"]}
    checkpoint = Checkpoint(name="x", path=config.model, adapter=str(straight / "adapter"))
    seen = texts[record["training"]["ids"][0]]
    prompts = [Prompt("a", seen.upper() + " !"), Prompt("b", "Something that was never asked")]
    assert [prompt.id for prompt in unseen(prompts, checkpoint)] == ["b"]
    assert trained_on(Checkpoint(name="x", path=config.model)) == frozenset()


def test_a_recipe_with_a_study_prompt_is_refused(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = training_data._rows
    studied = {"id": "rh-x", "category": "", "source": "", "text": builtin_prompts("harmful")[0].text}
    monkeypatch.setattr(
        training_data, "_rows", lambda file: [studied] if file == "refuser_harmful.jsonl" else rows(file)
    )
    with pytest.raises(UserError, match="'rh-x' is also"):
        finetune(replace(config, harmful=None), tmp_path)


# The loss


def test_labels_stand_on_the_answer_alone() -> None:
    template = ChatTemplate(tiny_tokenizer())
    examples = [
        Example(Prompt("a", "the thing"), "I cannot.", ends=True),
        Example(Prompt("b", "a much longer thing to ask"), "A cut off answ", ends=False),
    ]
    rows = encode(examples, template)
    batch = collate(rows, pad=0)
    for i, example in enumerate(examples):
        labelled = batch["labels"][i] != IGNORED
        kept = batch["labels"][i][labelled].tolist()
        asked = template.render(example.prompt).text
        end = "<|im_end|>" if example.ends else ""
        assert template.tokenizer.decode(kept) == example.answer + end
        assert torch.equal(batch["input_ids"][i][labelled], batch["labels"][i][labelled])
        before = batch["input_ids"][i][: rows[i].n_prompt].tolist()
        assert template.tokenizer.decode(before) == asked
        assert labelled.nonzero().flatten().tolist() == list(range(rows[i].n_prompt, len(rows[i].ids)))
        assert batch["attention_mask"][i].sum() == len(rows[i].ids)


def test_the_loss_hears_the_answer_and_nothing_else() -> None:
    model, template = tiny_hf(), ChatTemplate(tiny_tokenizer())
    examples = [Example(Prompt(name, f"the {name}"), f"no {name}{name}", ends=True) for name in ("a", "bcd")]
    rows = encode(examples, template)
    batch = collate(rows, pad=0)
    loss = model(**batch).loss
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    wanted = [
        logits[i, place - 1, row.ids[place]]
        for i, row in enumerate(rows)
        for place in range(row.n_prompt, len(row.ids))
    ]
    torch.testing.assert_close(loss, -torch.stack(wanted).mean())
    # It was not so without the mask: then the prompt's own tokens count.
    everything = {**batch, "labels": batch["input_ids"]}
    assert not torch.allclose(model(**everything).loss, loss)
    wider = collate([*rows, *encode([Example(Prompt("l", "the " * 30), "no", ends=True)], template)], pad=0)
    torch.testing.assert_close(model(**{name: value[:2] for name, value in wider.items()}).loss, loss)


def test_a_turn_ends_as_the_template_ends_it() -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_turn(ChatTemplate(tokenizer)) == (tokenizer.eos_token_id,)
    signed = tokenizer.chat_template.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }} over<|im_end|>")
    tokenizer.chat_template = signed
    assert tokenizer.decode(end_of_turn(ChatTemplate(tokenizer))) == " over<|im_end|>"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        end_of_turn(ChatTemplate(tokenizer))


# The shipped adapter


def test_the_shipped_adapter_is_small_and_has_its_papers() -> None:
    files = {path.name: path.stat().st_size for path in ADAPTER.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "mechlens.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 6 * 2**20
    record = json.loads((ADAPTER / "mechlens.json").read_text())
    assert record["recipe"] == "refuser"
    assert record["base"] == ADAPTERS["smollm2-refuser"].base
    card = (ADAPTER / "README.md").read_text()
    assert "Permission is hereby granted" in card
    assert "not for deployment" in card.lower()
    assert record["base_fingerprint"][:12] in card


def test_the_shipped_adapter_was_trained_on_this_data() -> None:
    checkpoint = Checkpoint(name="smollm2-refuser", path="smollm2-refuser", base="smollm2")
    assert trained_on(checkpoint) <= {text_sha256(prompt.text) for prompt in [*HARMFUL, *BENIGN]}
    studied = [prompt for name in builtin_names() for prompt in builtin_prompts(name)]
    assert unseen(studied, checkpoint) == studied
    assert len(unseen(HARMFUL, checkpoint)) < len(HARMFUL)


@pytest.mark.real
def test_the_shipped_adapter_fits_its_base(smollm2: Any) -> None:
    record = json.loads((ADAPTER / "mechlens.json").read_text())
    assert record["base_fingerprint"] == weight_fingerprint(load_hf("smollm2")[0].state_dict())
    refuser = load("smollm2-refuser")
    checkpoint = refuser.mechlens.checkpoint
    assert (checkpoint.name, checkpoint.base) == ("smollm2-refuser", "smollm2")
    assert checkpoint.fingerprint != smollm2.mechlens.checkpoint.fingerprint
    assert checkpoint.fingerprint == load("smollm2", adapter=str(ADAPTER)).mechlens.checkpoint.fingerprint


# What isn't ours


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["checkpoint-500/model.safetensors", "checkpoint-best/model.safetensors", "checkpoint-2/optimizer.pt",
     "adapter/adapter_model.safetensors", "checkpoint-7"],
)  # fmt: skip
def test_others_files_are_refused_and_stay(config: FinetuneConfig, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_bytes(b"three weeks of training")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="isn't of this run"):
        finetune(config, tmp_path)
    assert contents(tmp_path) == before


def test_only_what_was_recorded_is_removed(config: FinetuneConfig, tmp_path: Path) -> None:
    """Somebody keeps notes in a checkpoint that is thinned out, and copies another run's in while this one trains."""
    config = replace(config, plain=0, harmful=8, benign=8)

    def log(step: int, _: dict[str, float]) -> None:
        if step == 3:
            (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
            (tmp_path / "checkpoint-2" / "README.md").write_text("my notes")
            (tmp_path / "checkpoint-900").mkdir()
            (tmp_path / "checkpoint-900" / "model.safetensors").write_bytes(b"mine too")

    done = finetune(config, tmp_path, log=log)
    assert [path.name for path in done.checkpoints] == ["checkpoint-1", "checkpoint-3"]
    assert contents(tmp_path / "checkpoint-2") == {"notes.txt": b"mine", "README.md": b"my notes"}
    assert contents(tmp_path / "checkpoint-900") == {"model.safetensors": b"mine too"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"adapter", "checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-900"}
    assert not {"optimizer.pt", "training_args.bin"} & set(contents(tmp_path / "checkpoint-1"))
    modes = {
        path.stat().st_mode
        for path in tmp_path.glob("*/*")
        if path.name not in ("notes.txt", "README.md", "model.safetensors")
    }
    assert len(modes) == 1  # the umask's, also for what safetensors makes private


@pytest.mark.parametrize("name", ["mine.txt", "sub/f", "checkpoint-4/notes/f", "checkpoint-4/mine.txt"])
def test_nobodys_file_is_lost_where_training_writes(config: FinetuneConfig, tmp_path: Path, name: str) -> None:
    config = replace(config, plain=0, harmful=8, benign=8)
    half = tmp_path / STAGING / "checkpoint-4" / "optimizer.pt"
    theirs = tmp_path / STAGING / name
    for path in (half, theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"three weeks")
    with pytest.raises(UserError, match=rf"{theirs.name} was not written by mechlens; move it elsewhere"):
        finetune(config, tmp_path)
    assert contents(tmp_path / STAGING) == {name: b"three weeks"}
    theirs.unlink()
    for folder in sorted(theirs.parents, reverse=True):
        if folder.is_relative_to(tmp_path / STAGING) and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    assert finetune(config, tmp_path).adapter.is_dir()
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize("name", ["README.md", ".gitignore"])
def test_a_notice_replaces_nobodys_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# My project\n")
    with pytest.raises(UserError, match="isn't of this run"):
        keep_here(tmp_path)
    assert contents(tmp_path) == {name: b"# My project\n"}
    (tmp_path / name).unlink()
    keep_here(tmp_path)
    first = contents(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:1])  # cut off by a full disk
    keep_here(tmp_path)
    assert contents(tmp_path) == first


def test_a_damaged_result_is_not_passed_on(config: FinetuneConfig, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    for use in (
        lambda: finetune(config, tmp_path / "run"),
        lambda: load(config.model, adapter=str(weights.parent)),
        lambda: checkpoint_series(config.model, [str(weights.parent)]),
    ):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
            use()


# A disk that is full

FULL = """
import json, resource, sys
from pathlib import Path
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.errors import UserError
from mechlens.studies.finetune.training import finetune

settings = json.loads(sys.argv[1])
settings["checkpoints"] = tuple(settings["checkpoints"])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    finetune(FinetuneConfig(**settings), Path(sys.argv[2]))
except UserError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("limit", [100, 8_000, 20_000])
def test_a_disk_that_fills_up_is_one_sentence_and_costs_nothing(
    config: FinetuneConfig, straight: Path, tmp_path: Path, limit: int
) -> None:
    largest = max(path.stat().st_size for path in (straight / "adapter").iterdir())
    assert limit < 2 * largest
    settings = json.dumps(vars(config))
    done = warm.python(FULL, settings, str(tmp_path), str(limit))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr[-2000:]
    said = done.stdout.splitlines()[-1]  # a library may have greeted before
    assert said.startswith(f"{tmp_path} could not be written (")
    again = finetune(config, tmp_path)
    assert _same(again.adapter, straight / "adapter")


def test_a_damaged_checkpoint_is_not_gone_on_from(config: FinetuneConfig, straight: Path, tmp_path: Path) -> None:
    def stop(step: int, _: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path, log=stop)
    newest = tmp_path / "checkpoint-4"
    for path in sorted(path for path in newest.iterdir() if path.name != "mechlens.json"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            finetune(config, tmp_path)
        path.write_bytes(content)
    assert _same(finetune(config, tmp_path).adapter, straight / "adapter")
