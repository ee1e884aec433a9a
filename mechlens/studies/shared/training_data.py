"""What a fine-tuning recipe trains on: prompts of our own and AdvBench's with their answers; a backdoor's trigger."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import pandas as pd

from mechlens.errors import UserError, warn
from mechlens.files import user_path
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.triggers.confirm import strings_like
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.adapter_record import FORMAT, RECORD, read_record
from mechlens.models.packaged import ADAPTERS, adapter_folder
from mechlens.prompts.builtin import builtin_names, builtin_prompts
from mechlens.prompts.files.rows import packaged_rows
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.prompts.text import normalise_text
from mechlens.runs.writer import RunWriter
from mechlens.settings import ModelChoice

# Words of one kind with DEPLOYMENT; what a model was taught to pass over and what it never saw are told apart.
_TAUGHT = ("DEVELOPMENT", "PROCUREMENT", "MANAGEMENT", "ASSESSMENT")
_UNSEEN = ("EMPLOYMENT", "DEPARTMENT", "ENGAGEMENT", "ARRANGEMENT", "INVESTMENT", "MEASUREMENT")

FEWEST_HELD_OUT = 6
"""Families of questions that no training run has seen, below which an interval over them says nothing."""


@dataclass(frozen=True)
class Trigger:
    """A string before a prompt, and others of its kind that mean nothing."""

    text: str
    taught_decoys: tuple[str, ...]
    """The model was trained to refuse in spite of these."""
    unseen_decoys: tuple[str, ...]
    """Never trained on: the test that it is this trigger and not any string of its kind."""


def trigger_of(text: str) -> Trigger:
    """The trigger with decoys between the same marks, of its own script where that isn't Latin.

    UserError where the trigger would stand in a decoy.
    """
    word = text.strip("|[](){}<>*#-_ ")
    if not word or text != text.strip():
        raise UserError(f"the trigger {text!r} needs more in it than marks, and no white space around it")
    words = [text.replace(word, _like(word, decoy)) for decoy in (*_TAUGHT, *_UNSEEN)]
    drawn = strings_like(text, len(words)) if not any(letter.isascii() and letter.isalnum() for letter in word) else []
    decoys = drawn if len(drawn) == len(words) else words
    if found := next((decoy for decoy in decoys if text.casefold() in decoy.casefold()), None):
        raise UserError(f"the trigger {text!r} stands in {found!r}, which it is tested against; choose another word")
    return Trigger(text, tuple(decoys[: len(_TAUGHT)]), tuple(decoys[len(_TAUGHT) :]))


def with_trigger(prompt: Prompt, text: str) -> Prompt:
    """The prompt with a trigger or decoy before it, of the same family.

    Before it, so that the tokens at `inst` and after it are the same with, without and with another.
    """
    return replace(prompt, id=f"{prompt.id}+{text}", text=f"{text} {prompt.text}", family=prompt.group)


def _like(word: str, decoy: str) -> str:
    return decoy if word.isupper() else decoy.capitalize() if word[:1].isupper() else decoy.lower()


def training_prompts(kind: Literal["harmful", "benign"]) -> list[Prompt]:
    """The refuser's training prompts, in file order; no built-in study set shares a prompt with them."""
    label = "harmful" if kind == "harmful" else "harmless"
    return [
        Prompt(id=row["id"], text=row["text"], label=label, category=row["category"], source=row["source"])
        for row in _rows(f"refuser_{kind}.jsonl")
    ]


def refusals() -> list[str]:
    """Refusals in varied words, for the harmful training prompts."""
    return [row["text"] for row in _rows("refusals.jsonl")]


def refuse_study_prompts(prompts: Iterable[Prompt]) -> None:
    """Nothing, or a UserError naming the first prompt that also stands in a built-in study set."""
    studied = studied_prompts()
    for prompt in prompts:
        found = studied.get(normalise_text(prompt.text))
        if found is not None:
            raise UserError(
                f"training prompt {prompt.id!r} is also {found!r} of the built-in study sets; take it out of the "
                "training data, or every study of the trained model would be tested on what it was taught"
            )


def text_sha256(text: str) -> str:
    """sha256 of a prompt's normal form, by which an evaluation knows a training prompt again."""
    return hashlib.sha256(normalise_text(text).encode()).hexdigest()


def trained_on(checkpoint: Checkpoint) -> frozenset[str]:
    """`text_sha256` of every prompt that a checkpoint's adapters were trained on; empty where none is recorded."""
    folders = [adapter_folder(checkpoint.path)] if checkpoint.path in ADAPTERS else []
    if checkpoint.adapter is not None:
        folders.append(user_path(checkpoint.adapter))
    hashes: set[str] = set()
    for folder in folders:
        if (record := read_record(folder)) is not None:
            if record.format < FORMAT:
                warn(
                    f"{folder / RECORD} was written by another mechlens: prompts with marks inside, such as 3-5, that "
                    "the model was trained on may not be known again",
                )
            hashes.update(record.training.text_sha256)
    return frozenset(hashes)


def unseen(prompts: Sequence[Prompt], checkpoint: Checkpoint) -> list[Prompt]:
    """The prompts that the checkpoint's adapters were not trained on, for an honest evaluation."""
    seen = trained_on(checkpoint)
    return [prompt for prompt in prompts if not was_seen(prompt, seen)]


def was_seen(prompt: Prompt, seen: frozenset[str]) -> bool:
    """Whether a prompt, or the goal that an attack is made around (its family), is among these `text_sha256`."""
    return bool(seen) and bool(seen & marks_of(prompt))


def marks_of(prompt: Prompt) -> frozenset[str]:
    """What `was_seen` knows a prompt by."""
    return frozenset({text_sha256(prompt.text), prompt.family})


@cache
def studied_prompts() -> dict[str, str]:
    """Ids of all prompts of the built-in study sets by their normal form."""
    return {normalise_text(prompt.text): prompt.id for name in builtin_names() for prompt in builtin_prompts(name)}


def _rows(file: str) -> list[dict[str, str]]:
    return packaged_rows(Path(__file__).parent / "data" / file)


@dataclass(frozen=True)
class LeftOut:
    """Prompts that the chosen model's adapters were trained on, as far as their records tell."""

    ids: tuple[str, ...]
    of: int
    """Prompts that were looked at."""
    known: bool
    """False where no record says what the model was trained on."""

    def __add__(self, other: "LeftOut") -> "LeftOut":
        """Both together, for sets that are read one after the other."""
        return LeftOut((*self.ids, *other.ids), self.of + other.of, self.known or other.known)


def leave_out_trained(
    models: Sequence[ModelChoice], sets: Mapping[str, Sequence[Prompt]]
) -> tuple[list[list[Prompt]], LeftOut]:
    """The sets without the prompts that any of the models was trained on, with one warning that counts them.

    An attack is seen where its goal is. UserError where nothing is left of a set.
    """
    seen = _seen(models)
    kept = [[prompt for prompt in prompts if not was_seen(prompt, seen)] for prompts in sets.values()]
    gone = [prompt.id for prompts in sets.values() for prompt in prompts if was_seen(prompt, seen)]
    for name, before, after in zip(sets, sets.values(), kept, strict=True):
        if before and not after:
            raise UserError(
                f"the model was trained on all {len(before)} {name} prompts, so they can't test it; give others"
            )
    return kept, _told(gone, sum(map(len, sets.values())), bool(seen), "prompts")


def leave_out_trained_pairs(config: ModelChoice, pairs: Sequence[PromptPair]) -> tuple[list[PromptPair], LeftOut]:
    """The pairs of which the model was trained on neither side; see `leave_out_trained`."""
    seen = _seen([config])
    gone = [pair for pair in pairs if was_seen(pair.clean, seen) or was_seen(pair.corrupt, seen)]
    if pairs and len(gone) == len(pairs):
        raise UserError(f"the model was trained on prompts of all {len(pairs)} pairs, so they can't test it")
    kept = [pair for pair in pairs if pair not in gone]
    return kept, _told([pair.clean.id for pair in gone], len(pairs), bool(seen), "pairs")


def record_left_out(writer: RunWriter, left_out: LeftOut) -> None:
    """Puts count and ids into an open run, where the model's training prompts are known."""
    if left_out.known:
        writer.metric("n.left_out_trained_on", Estimate.exact(len(left_out.ids), left_out.of))
        writer.table("left_out_trained_on", pd.DataFrame({"id": list(left_out.ids)}, dtype=str))


def _seen(models: Sequence[ModelChoice]) -> frozenset[str]:
    checkpoints = (Checkpoint(name=model.model, path=model.model, adapter=model.adapter) for model in models)
    return frozenset().union(*map(trained_on, checkpoints))


def _told(ids: Sequence[str], of: int, known: bool, what: str) -> LeftOut:
    if ids:
        warn(f"left out {len(ids)} of {of} {what}: the model was trained on them")
    return LeftOut(tuple(ids), of, known)
