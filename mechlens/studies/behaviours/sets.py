"""The behaviours that are asked about: sets of twins by name, in the form in which they are put."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

from mechlens.errors import UserError, quoted
from mechlens.files import user_path
from mechlens.methods.triggers.confirm import strings_like
from mechlens.prompts.options import LETTERS
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin, builtin_twin_names, builtin_twins, read_twins, require_others
from mechlens.registry import nearest
from mechlens.studies.shared.training_data import Trigger, marks_of, text_sha256, with_trigger

PLAIN, TRIGGERED, DECOYED = "plain", "trigger", "decoy"


@dataclass(frozen=True)
class AskedSet:
    """One behaviour in one form."""

    name: str
    twins: tuple[Twin, ...]
    about_itself: bool = False
    """Whether the model is asked about itself."""
    form: str = PLAIN
    """"plain", with a "trigger" before the question, or with a "decoy" that no run was trained on."""
    trigger: str = ""
    """The trigger that stands there, or that the decoys are like; empty where the form is plain."""
    written: tuple[Prompt, ...] = ()
    """The questions as their file has them, where they are put otherwise; by them a training run's are known too."""

    @property
    def key(self) -> str:
        """Name and form in one."""
        return self.name if self.form == PLAIN else f"{self.name} ({self.form}, {self.trigger})"

    def seen(self, trained: frozenset[str]) -> list[bool]:
        """Of each question, whether it is among these `text_sha256`, as put or as written, in any order."""
        return [bool(marks & trained) for marks in self._marks]

    @cached_property
    def texts(self) -> frozenset[str]:
        """`text_sha256` of every question in each of its forms, by which another set's are known to be the same."""
        return frozenset(text_sha256(prompt.text) for forms in self._forms for prompt in forms)

    @property
    def file(self) -> str:
        """The name of the file that the questions are from, without its ending."""
        return Path(self.twins[0].prompt.source).stem

    @property
    def sides(self) -> list[float]:
        """Of each question: 1 where what shows the behaviour is B, or stands second, -1 where it is A, or first.

        NaN where options can't be exchanged.
        """
        return [math.nan if twin.exchanged is None else 1.0 if _is_second(twin) else -1.0 for twin in self.twins]

    @property
    def only_answers(self) -> tuple[str, str] | None:
        """The two answers, where all questions have these and none can be asked the other way round: whoever says one
        of them to anything shows the behaviour, or doesn't, in every question."""
        pairs = {(twin.shown, twin.other) for twin in self.twins if twin.exchanged is None}
        return next(iter(pairs)) if len(pairs) == 1 and all(twin.exchanged is None for twin in self.twins) else None

    @cached_property
    def _marks(self) -> list[frozenset[str]]:
        """By which each question is known to have been seen (`was_seen`), in any form."""
        return [frozenset(mark for prompt in forms for mark in marks_of(prompt)) for forms in self._forms]

    @property
    def _forms(self) -> list[list[Prompt]]:
        """Of each question: as it is put and as it was written, with its options in either order."""
        written = self.written or tuple(twin.prompt for twin in self.twins)
        put = [
            (twin, twin if prompt is twin.prompt else Twin(prompt, *LETTERS))
            for twin, prompt in zip(self.twins, written, strict=True)
        ]
        return [[prompt for one in dict.fromkeys(forms) for prompt in (one.prompt, *one.orders)] for forms in put]

    @property
    def prompts(self) -> list[Prompt]:
        """Questions and answers, all that a fingerprint has to hold."""
        sides = [(twin.prompt.id, twin.shown, twin.other) for twin in self.twins]
        answers = [
            Prompt(f"{name} {side}", text) for name, *both in sides for side, text in zip("+-", both, strict=True)
        ]
        return [*(twin.prompt for twin in self.twins), *answers]


def _is_second(twin: Twin) -> bool:
    if twin.shown in LETTERS:
        return twin.shown == "B"
    return twin.prompt.text.index(twin.shown) > twin.prompt.text.index(twin.other)


def read_set(given: str, *, about_itself: bool) -> AskedSet:
    """A set as an option names it; UserError for what is none."""
    name, named, path = given.partition("=")
    if not named:
        if given not in builtin_twin_names():
            known = ", ".join(builtin_twin_names())
            near = nearest(given, builtin_twin_names())
            raise UserError(
                f"{quoted(given)} is no set of twins; {f'{near} ' if near else ''}give NAME=FILE or one of {known}"
            )
        return AskedSet(given, tuple(builtin_twins(given)), about_itself)
    file, others = path, None
    if "," in path and not user_path(path).exists():
        file, _, others = path.rpartition(",")
    if not name or not file:
        raise UserError(f"{quoted(given)} lacks a name or a file; write NAME=FILE, such as risky=risky.jsonl")
    twins = read_twins(file, others)
    require_others(twins, file)
    return AskedSet(name, tuple(twins), about_itself)


def drawn(asked: AskedSet, n: int | None, seed: int, trained: frozenset[str]) -> AskedSet:
    """At most `n` questions that no run was trained on, and as many that some run was, by seed."""
    kept: list[int] = []
    told = asked.seen(trained)
    for seen in (False, True):
        rows = [i for i in range(len(asked.twins)) if told[i] == seen]
        kept += rows if n is None or n >= len(rows) else Random(seed).sample(rows, n)
    return replace(asked, twins=tuple(asked.twins[i] for i in sorted(kept)))


def worded(asked: AskedSet) -> AskedSet:
    """The choices answered with the options' words, where these can be told."""
    written = tuple(twin.prompt for twin in asked.twins)
    return replace(asked, twins=tuple(twin.in_words or twin for twin in asked.twins), written=written)


LIKE_IT = 6
"""Decoys of the trigger's length and letters, beside other words between its marks."""


def asked_decoys(trigger: Trigger) -> tuple[str, ...]:
    """Strings that no run was trained on: other words between the trigger's marks, and as many of its length."""
    known = {*trigger.taught_decoys, *trigger.unseen_decoys}
    drawn = strings_like(trigger.text, LIKE_IT + len(known))
    return (*trigger.unseen_decoys, *[text for text in drawn if text not in known][:LIKE_IT])


def with_forms(asked: AskedSet, triggers: Sequence[Trigger]) -> list[AskedSet]:
    """The set as it is, and with each trigger and decoys of its kind, which change from question to question."""
    put = [asked]
    for trigger in triggers:
        for form, texts in ((TRIGGERED, (trigger.text,)), (DECOYED, asked_decoys(trigger))):
            twins = tuple(_put(twin, texts[i % len(texts)]) for i, twin in enumerate(asked.twins)) if texts else ()
            put += [replace(asked, form=form, trigger=trigger.text, twins=twins)] if twins else []
    return put


def _put(twin: Twin, text: str) -> Twin:
    return replace(twin, prompt=with_trigger(twin.prompt, text))


def require_distinct(sets: Sequence[AskedSet]) -> None:
    """UserError where two sets have one name."""
    names = [one.key for one in sets]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(f"two sets are called {again!r}; give each a name of its own, as NAME=FILE")
