"""A series of checkpoints of one model: found, put in order, and looked over before anything is computed.

The base is step 0. A checkpoint that can't belong to the series is named with its reason: refused, or left out.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from mechlens.checked_json import read_json
from mechlens.errors import UserError
from mechlens.files import plain_name, require_regular, user_path
from mechlens.models.checkpoints.adapter_record import RECORD, read_record, require_whole
from mechlens.models.checkpoints.folders import (
    CHECKPOINT,
    adapters_inside,
    other_format,
    own_tokenizer,
)
from mechlens.models.checkpoints.lora import CONFIG, WEIGHTS
from mechlens.models.fingerprint import computing_settings
from mechlens.models.load import load_config, load_tokenizer, require_inside, short_name

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
class UnusableCheckpoint:
    """A checkpoint that can't be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class CheckpointSeries:
    """The base at step 0, then its checkpoints by step."""

    members: tuple[Member, ...]
    left_out: tuple[UnusableCheckpoint, ...]
    """With `skip_broken`: what was found and not used."""
    steps_from: Literal["their records", "the order given"]
    chat_template: str | None = None
    """The one that its checkpoints were saved with, under which the base is read too; None where it is the base's."""

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
    home: Path | None = None
    """The Trainer's folder around an adapter with a name of its own; step and tokenizer may lie there."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its files may be: its own folder, then the one around it."""
        return tuple(folder for folder in (self.folder, self.home) if folder is not None)

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
    template = judge.agree_on_template(found)
    told = [_told_step(one) for one in found]
    steps = [step for step, _ in told]
    ordered = all(step is None for step in steps)
    if ordered:
        steps = list(range(1, len(found) + 1))
    members: list[Member] = []
    broken: list[UnusableCheckpoint] = []
    damaged = {one: problem for one, (_, problem) in zip(found, told, strict=True) if problem}
    for one, step in sorted(zip(found, steps, strict=True), key=lambda pair: (pair[1] is None, pair[1])):
        problem = damaged.get(one) or _step_problem(step, members) or judge.problem(one)
        if problem or step is None:
            broken.append(UnusableCheckpoint(one.name, problem or ""))
        else:
            members.append(judge.member(one, step))
    if broken and not skip_broken:
        more = f" ({len(broken)} of {len(found)} checkpoints are broken)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0].name}: {broken[0].reason}{more}; mend it, or leave it out with --skip-broken")
    if not members:
        raise UserError(f"none of the {len(found)} checkpoints can be used; the first, {broken[0].name}: "
                        f"{broken[0].reason}")  # fmt: skip
    start = Member(short_name(base), base, "base", 0, revision)
    return CheckpointSeries(
        (start, *_named(members)), tuple(broken), "the order given" if ordered else "their records", template
    )


def _named(members: Sequence[Member]) -> list[Member]:
    """The members under names that differ: two runs' checkpoint-8 get their run's name before it."""
    names = [member.name for member in members]

    def told_apart(member: Member) -> Member:
        above = [folder.name for folder in Path(member.path).parents if folder.name != member.name]
        return replace(member, name=f"{above[0]}/{member.name}")

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
    if CHECKPOINT.fullmatch(path.name) and not _holds_model(path):
        return [_checkpoint(path)]
    inside = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    trained = [child for child in inside if CHECKPOINT.fullmatch(child.name)]
    if not trained and not _holds_model(path):
        if found := other_format(path):
            raise UserError(f"{source!r} can't be used: {found}")
        trained = [child for child in inside if _holds_model(child) or re.search(r"\d$", child.name)]
    if not trained and not _holds_model(path):
        raise UserError(f"{source!r} holds neither checkpoints nor adapters nor a model; check the path")
    return [_checkpoint(child) for child in trained or [path]]


def _checkpoint(folder: Path) -> _Found:
    """One checkpoint's folder, or the one adapter with a name of its own in it."""
    if (folder / CONFIG).exists() and CHECKPOINT.fullmatch(folder.parent.name):
        return _Found(f"{folder.parent.name}/{folder.name}", str(folder), home=folder.parent)
    named = list(adapters_inside(folder))
    if _holds_model(folder) or len(named) != 1:
        return _Found(folder.name, str(folder))
    return _Found(folder.name, str(named[0]), home=folder)


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
    records = [record.step for folder in one.folders if (record := read_record(folder)) is not None]
    states: list[_TrainerState | None] = [_json(folder / "trainer_state.json", _TrainerState) for folder in one.folders]
    for step in (*records, *(state.global_step for state in states if state is not None)):
        if step is not None:
            return step
    number = re.search(r"(\d{1,18})$", one.revision or (one.home.name if one.home else one.name))
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
        self._template = self._tokenizer.chat_template

    def agree_on_template(self, found: Sequence[_Found]) -> str | None:
        """The template that all were saved with; None, and the base's, where they don't agree on another."""
        own = set()
        for one in found:
            with contextlib.suppress(UserError):  # a broken one has no say
                if not self._damage(one):
                    own.add(tokenizer.chat_template if (tokenizer := self._own_tokenizer(one)) else None)
        if len(own) > 1 or own <= {None, self._tokenizer.chat_template}:
            return None
        self._template = own.pop()
        return str(self._template)

    def problem(self, one: _Found) -> str | None:
        """Why it can't be used; None if it can."""
        try:
            return self._damage(one) or self._tokenizer_problem(one)
        except UserError as error:
            return str(error)

    def _damage(self, one: _Found) -> str | None:
        """What is wrong with its weights or configuration."""
        if one.folder is None:
            return self._config_problem(one)
        if (one.folder / CONFIG).exists():
            found = _weights_problem(one.folder / WEIGHTS) or _json_problem(one.folder / CONFIG)
            if not found and (record := read_record(one.folder)) is not None:
                require_whole(one.folder, record, WEIGHTS)
            if not found and self._own_records and not (one.folder / RECORD).exists():
                found = f"it has no {RECORD}, which is written last, so it is half-written"
            return found
        if (one.folder / "config.json").exists():
            return _model_problem(one.folder) or self._config_problem(one)
        return self._unknown(one.folder)

    def _unknown(self, folder: Path) -> str:
        named = [f"{folder.name}/{path.name}" for path in adapters_inside(folder)]
        if named:
            return f"it holds {len(named)} adapters; name the one that is meant ({', '.join(named)})"
        return other_format(folder) or f"it has neither {CONFIG} nor config.json, so it is half-written"

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
        ours, theirs = computing_settings(self._config), computing_settings(config)
        for name in sorted({**ours, **theirs}):
            values = [settings.get(name, "the default") for settings in (theirs, ours)]
            if values[0] != values[1]:
                return f"its {name} is {values[0]} and the base's {values[1]}, so its weights mean other numbers there"
        return None

    def _own_tokenizer(self, one: _Found) -> Any:
        """None where it was saved without one."""
        if one.folder is None:
            return load_tokenizer(one.path, revision=one.revision)
        return own_tokenizer(one.folder, self._tokenizer, load_tokenizer)

    def _tokenizer_problem(self, one: _Found) -> str | None:
        tokenizer = self._own_tokenizer(one)
        if tokenizer is None:
            return None
        if tokenizer.get_vocab() != self._tokenizer.get_vocab():
            return "its tokenizer has another vocabulary than the base's, so the same prompts are other tokens"
        if tokenizer.chat_template is not None and tokenizer.chat_template != self._template:
            return (
                "its chat template is neither the base's nor that of all the others, so positions and answers can't "
                "be compared"
            )
        return None


def _weights_problem(path: Path) -> str | None:
    """The header is read, and the file's length must be what it says."""
    try:
        require_regular(path)
        with path.open("rb"), safe_open(path, framework="numpy") as file:
            return None if len(list(file.keys())) else f"{path.name} is empty"
    except FileNotFoundError:
        return other_format(path.parent) or f"it has no {path.name}, so it is half-written"
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
    require_inside(folder)
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
