"""A series of checkpoints of one model: found, put in order, and looked over before anything is computed.

The base is step 0. A checkpoint that can't belong to the series is named with its reason: refused, or left out.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mechlens.errors import UserError, warn
from mechlens.files import AnyPath, short_name, user_path
from mechlens.models.checkpoint import computing_settings
from mechlens.models.checkpoints.adapter_base import Base
from mechlens.models.checkpoints.adapter_record import RECORD, read_record, require_whole
from mechlens.models.checkpoints.folders import (
    CONFIG,
    adapters_inside,
    json_problem,
    model_problem,
    other_format,
    own_tokenizer,
    weights_problem,
)
from mechlens.models.checkpoints.found import Found, passed_over, sources, told_step
from mechlens.models.checkpoints.lora import WEIGHTS
from mechlens.models.load import load_config, load_tokenizer
from mechlens.models.quantise import quantisation

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


@dataclass(frozen=True, repr=False)
class CheckpointSeries:
    """The base at step 0, then its checkpoints by step.

    >>> series = ml.checkpoint_series("smollm2", ["runs/tuned"])  # a Trainer's output folder
    >>> [member.step for member in series.members]
    [0, 10]
    """

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

    def __repr__(self) -> str:
        steps = [member.step for member in self.members]
        more = f", {len(self.left_out)} left out" if self.left_out else ""
        ends = f"steps {steps[0]} to {steps[-1]} from {self.steps_from}"
        return f"CheckpointSeries({self.base.name} and {len(steps) - 1} checkpoints, {self.kind}, {ends}{more})"


def checkpoint_series(
    base: AnyPath, checkpoints: AnyPath | Sequence[AnyPath], *, revision: str | None = None, skip_broken: bool = False
) -> CheckpointSeries:
    """The series that these sources hold, by step.

    A source is a Trainer's output folder (its `checkpoint-*`), a folder of PEFT adapters or of models, one such
    adapter or model, a hub id, or `hub/id@revision`. UserError where one is broken, unless `skip_broken`, and
    where none is left.

    >>> series = ml.checkpoint_series("smollm2", ["runs/tuned"])  # a Trainer's output folder
    >>> [member.step for member in series.members]
    [0, 10]
    """
    base = os.fspath(base)
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    found = [one for source in given for one in sources(os.fspath(source))]
    if not found:
        raise UserError("there are no checkpoints; give a training run's output folder, adapters, or id@revision")
    for folder in (folder for source in given for folder in passed_over(os.fspath(source))):
        warn(f"{folder} is passed over: a Trainer's checkpoints are called checkpoint-NUMBER; rename it, or "
                      "give it by itself")  # fmt: skip
    for one in (one for one in found if one.folder is None):
        load_config(one.path, revision=one.revision)  # a name that stands for nothing is mistyped, not broken
    judge = _Judge(base, revision, own_records=any(one.folder and (one.folder / RECORD).exists() for one in found))
    template = judge.agree_on_template(found)
    told = [told_step(one) for one in found]
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
        self._base = Base(base, self._config)
        self._tokenizer = load_tokenizer(base, revision=revision)
        self._own_records = own_records
        self._template = self._tokenizer.chat_template
        self._doubted = False

    def agree_on_template(self, found: Sequence[Found]) -> str | None:
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

    def problem(self, one: Found) -> str | None:
        """Why it can't be used; None if it can."""
        try:
            return self._damage(one) or self._tokenizer_problem(one)
        except UserError as error:
            return str(error)

    def _damage(self, one: Found) -> str | None:
        """What is wrong with its weights or configuration."""
        if one.folder is None:
            return self._config_problem(one)
        if (one.folder / CONFIG).exists():
            found = weights_problem(one.folder / WEIGHTS) or json_problem(one.folder / CONFIG)
            if not found and (record := read_record(one.folder)) is not None:
                require_whole(one.folder, record, WEIGHTS)
            if not found and self._own_records and not (one.folder / RECORD).exists():
                found = f"it has no {RECORD}, which is written last, so it is half-written"
            found = found or self._base.problem(one.folder)
            if not found and not self._doubted and (doubt := self._base.doubt(one.folder)):
                self._doubted = True  # once for all of a series
                warn(doubt)
            return found
        if (one.folder / "config.json").exists():
            return model_problem(one.folder) or self._config_problem(one)
        return self._unknown(one.folder)

    def _unknown(self, folder: Path) -> str:
        named = [f"{folder.name}/{path.name}" for path in adapters_inside(folder)]
        if named:
            return f"it holds {len(named)} adapters; name the one that is meant ({', '.join(named)})"
        return other_format(folder) or f"it has neither {CONFIG} nor config.json, so it is half-written"

    def member(self, one: Found, step: int) -> Member:
        """What was found to be whole."""
        adapter = one.folder is not None and (one.folder / CONFIG).exists()
        record = read_record(one.folder) if one.folder and adapter else None
        known = record.base_fingerprint if record else None
        return Member(one.name, one.path, "adapter" if adapter else "full", step, one.revision, known)

    def _config_problem(self, one: Found) -> str | None:
        config = load_config(one.path, revision=one.revision)
        if found := quantisation(config):
            return f"its weights are quantised ({found}), and those of a series are written into one model in turn"
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

    def _own_tokenizer(self, one: Found) -> Any:
        """None where it was saved without one."""
        if one.folder is None:
            return load_tokenizer(one.path, revision=one.revision)
        return own_tokenizer(one.folder, self._tokenizer, load_tokenizer)

    def _tokenizer_problem(self, one: Found) -> str | None:
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
