"""A series of checkpoints of one model: found, put in order, and looked over before anything is computed.

The base is step 0. A checkpoint that can't belong to the series is named with its reason: refused, or left out.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from mechlens.checked_json import read_json
from mechlens.disk import plain_name
from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.adapter_record import RECORD, read_record, require_whole
from mechlens.models.load import load_config, load_tokenizer, short_name
from mechlens.models.lora import CONFIG, WEIGHTS

SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
"""Settings in which two checkpoints of one architecture agree."""


@dataclass(frozen=True)
class Member:
    """One checkpoint of a series."""

    name: str
    path: str
    """Folder of an adapter or a model, or a hub id."""
    kind: Literal["base", "adapter", "full"]
    step: int
    revision: str | None = None
    base_fingerprint: str | None = None
    """Of the base that an adapter was trained on, where mechlens trained it."""


@dataclass(frozen=True)
class LeftOut:
    """A checkpoint that can't be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class CheckpointSeries:
    """The base at step 0, then its checkpoints by step."""

    members: tuple[Member, ...]
    left_out: tuple[LeftOut, ...]
    """With `skip_broken`: what was found and not used."""
    steps_from: Literal["their records", "the order given"]

    @property
    def base(self) -> Member:
        """Step 0."""
        return self.members[0]

    @property
    def kind(self) -> str:
        """ "adapter", "full", or both."""
        return " and ".join(dict.fromkeys(member.kind for member in self.members[1:])) or "base only"


@dataclass(frozen=True)
class _Found:
    """Something that was pointed at, not yet looked into."""

    name: str
    path: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        path = user_path(self.path)
        return path if path.is_dir() else None


def checkpoint_series(
    base: str, checkpoints: Sequence[str], *, revision: str | None = None, skip_broken: bool = False
) -> CheckpointSeries:
    """The series that these sources hold, by step.

    A source is a Trainer's output folder (its `checkpoint-*`), a folder of PEFT adapters or of models, one such
    adapter or model, a hub id, or `hub/id@revision`. UserError where one is broken, unless `skip_broken`, and
    where none is left.
    """
    found = [one for source in checkpoints for one in _sources(source)]
    if not found:
        raise UserError("there are no checkpoints; give a training run's output folder, adapters, or id@revision")
    judge = _Judge(base, revision, own_records=any(one.folder and (one.folder / RECORD).exists() for one in found))
    told = [_told_step(one) for one in found]
    steps = [step for step, _ in told]
    ordered = all(step is None for step in steps)
    if ordered:
        steps = list(range(1, len(found) + 1))
    members: list[Member] = []
    broken: list[LeftOut] = []
    damaged = {one: problem for one, (_, problem) in zip(found, told, strict=True) if problem}
    for one, step in sorted(zip(found, steps, strict=True), key=lambda pair: (pair[1] is None, pair[1])):
        problem = damaged.get(one) or _step_problem(step, members) or judge.problem(one)
        if problem or step is None:
            broken.append(LeftOut(one.name, problem or ""))
        else:
            members.append(judge.member(one, step))
    if broken and not skip_broken:
        more = f" ({len(broken)} of {len(found)} checkpoints are broken)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0].name}: {broken[0].reason}{more}; mend it, or leave it out with --skip-broken")
    if not members:
        raise UserError(f"none of the {len(found)} checkpoints can be used; the first, {broken[0].name}: "
                        f"{broken[0].reason}")  # fmt: skip
    start = Member(short_name(base), base, "base", 0, revision)
    return CheckpointSeries((start, *_named(members)), tuple(broken), "the order given" if ordered else "their records")


def _named(members: Sequence[Member]) -> list[Member]:
    """The members under names that differ: two runs' checkpoint-8 get their run's name before it."""
    names = [member.name for member in members]

    def told_apart(member: Member) -> Member:
        return replace(member, name=f"{Path(member.path).parent.name}/{member.name}")

    return [told_apart(member) if names.count(member.name) > 1 else member for member in members]


def _sources(source: str) -> list[_Found]:
    path = user_path(source)
    if not path.exists():
        name, at, revision = source.rpartition("@")
        if at:
            return [_Found(f"{short_name(name)}@{revision}", name, revision)]
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"there is no folder {source!r}; check the path")
        return [_Found(short_name(source), source)]
    if not path.is_dir():
        raise UserError(f"{source!r} is a file; give a checkpoint's folder")
    inside = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    trained = [child for child in inside if re.fullmatch(r"checkpoint-\d+", child.name)]
    if not trained and not _holds_model(path):
        trained = [child for child in inside if _holds_model(child) or re.search(r"\d$", child.name)]
    if not trained and not _holds_model(path):
        raise UserError(f"{source!r} holds neither checkpoints nor adapters nor a model; check the path")
    return [_Found(child.name, str(child)) for child in trained] or [_Found(path.name, str(path))]


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).exists() or (folder / "config.json").exists()


@dataclass(frozen=True)
class _TrainerState:
    """What is read of `trainer_state.json`."""

    global_step: int | None = None


@dataclass(frozen=True)
class _Index:
    """What is read of `model.safetensors.index.json`."""

    weight_map: dict[str, str]


def _told_step(one: _Found) -> tuple[int | None, str]:
    """The step, and why it can't be told where a record is damaged."""
    try:
        return _step(one), ""
    except UserError as error:
        return None, str(error)


def _step(one: _Found) -> int | None:
    """From mechlens' or the Trainer's record, else the number that ends the name or revision."""
    if one.folder is not None:
        record = read_record(one.folder)
        state: _TrainerState | None = _json(one.folder / "trainer_state.json", _TrainerState)
        for step in (record.step if record else None, state.global_step if state else None):
            if step is not None:
                return step
    number = re.search(r"(\d{1,18})$", one.revision or one.name)
    return int(number[1]) if number else None


def _json(path: Path, shape: Any) -> Any:
    """A file of the Trainer's or the model's as what is read of it; None where there is none."""
    try:
        return read_json(path, shape, "save the checkpoint again")
    except FileNotFoundError:
        return None


def _step_problem(step: int | None, members: Sequence[Member]) -> str | None:
    if step is None:
        return "its step can't be told from its name, and the others' can"
    if step < 1:
        return f"its step is {step}; step 0 is the base"
    same = [member.name for member in members if member.step == step]
    return f"it has step {step}, and so has {same[0]}" if same else None


class _Judge:
    """Says whether something belongs to a series, against what the base is."""

    def __init__(self, base: str, revision: str | None, own_records: bool) -> None:
        self._config = load_config(base, revision=revision)
        self._tokenizer = load_tokenizer(base, revision=revision)
        self._own_records = own_records

    def problem(self, one: _Found) -> str | None:
        """Why it can't be used; None if it can."""
        try:
            if one.folder is None:
                return self._config_problem(one) or self._tokenizer_problem(one)
            if (one.folder / CONFIG).exists():
                found = _weights_problem(one.folder / WEIGHTS) or _json_problem(one.folder / CONFIG)
                if not found and (record := read_record(one.folder)) is not None:
                    require_whole(one.folder, record, WEIGHTS)
                if not found and self._own_records and not (one.folder / RECORD).exists():
                    found = f"it has no {RECORD}, which is written last, so it is half-written"
            elif (one.folder / "config.json").exists():
                found = _model_problem(one.folder) or self._config_problem(one)
            else:
                return f"it has neither {CONFIG} nor config.json, so it is half-written"
            has_tokenizer = (one.folder / "tokenizer_config.json").exists()
            return found or (self._tokenizer_problem(one) if has_tokenizer else None)
        except UserError as error:
            return str(error)

    def member(self, one: _Found, step: int) -> Member:
        """What was found to be whole."""
        adapter = one.folder is not None and (one.folder / CONFIG).exists()
        record = read_record(one.folder) if one.folder and adapter else None
        known = record.base_fingerprint if record else None
        return Member(one.name, one.path, "adapter" if adapter else "full", step, one.revision, known)

    def _config_problem(self, one: _Found) -> str | None:
        config = load_config(one.path, revision=one.revision)
        for name in SHAPE:
            ours, theirs = getattr(self._config, name, None), getattr(config, name, None)
            if ours != theirs:
                return f"its {name} is {theirs}, and the base's is {ours}; a series has one architecture"
        return None

    def _tokenizer_problem(self, one: _Found) -> str | None:
        tokenizer = load_tokenizer(one.path, revision=one.revision)
        if tokenizer.get_vocab() != self._tokenizer.get_vocab():
            return "its tokenizer has another vocabulary than the base's, so the same prompts are other tokens"
        if tokenizer.chat_template is not None and tokenizer.chat_template != self._tokenizer.chat_template:
            return "its chat template is not the base's, so positions and answers can't be compared"
        return None


def _weights_problem(path: Path) -> str | None:
    """The header is read, and the file's length must be what it says."""
    try:
        with path.open("rb"), safe_open(path, framework="numpy") as file:
            return None if len(list(file.keys())) else f"{path.name} is empty"
    except FileNotFoundError:
        return f"it has no {path.name}, so it is half-written"
    except (OSError, SafetensorError):
        return f"its {path.name} is truncated or damaged"


def _json_problem(path: Path) -> str | None:
    try:
        return None if _json(path, dict[str, Any]) is not None else f"its {path.name} can't be read"
    except UserError as error:
        return f"its {path.name} can't be read: {error}"


def _model_problem(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _weights_problem(folder / "model.safetensors")
    shards: _Index = _json(index, _Index)
    names = sorted(set(shards.weight_map.values()))
    if not names:
        return f"its {index.name} names no weights"
    problems = [_weights_problem(folder / plain_name(name)) for name in names]
    return next((problem for problem in problems if problem), None)


def content_of(member: Member) -> str:
    """sha256 over the files that make a checkpoint what it is; for one on the hub, over its id and revision."""
    folder = user_path(member.path)
    digest = hashlib.sha256(f"{member.kind} {member.revision}".encode())
    if not folder.is_dir():
        digest.update(member.path.encode())
        return digest.hexdigest()
    names = (CONFIG, WEIGHTS) if member.kind == "adapter" else ("config.json", "*.safetensors")
    for path in sorted(path for name in names for path in folder.glob(name)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()
