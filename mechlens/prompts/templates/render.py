"""Rendering chat templates in a process of its own, whose time and memory are bounded by the system.

A template is a program, and may come from a stranger: jinja2's sandbox keeps it from touching anything, but not from
looping for ever or from making a string of many gigabytes. Counting inside the sandbox can't be complete (one
multiplication, one `center` or one comparison of nested lists is enough); a process can be ended.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import is_whole
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates import render_worker

Conversation = tuple[tuple[str, str], ...]
"""Turns as (role, content), oldest first."""

SENTINELS = ("mechlens zero sentinel", "mechlens other sentinel")
"""Words that stand in place of the user's."""
_TOGETHER, _ROOM = 256, 1_000_000
"""Prompts, and characters of them, that are rendered together."""


@dataclass(frozen=True)
class Rendering:
    """What is rendered for a prompt."""

    earlier: Conversation
    """The turns before its words, the system prompt first."""
    marks: tuple[str, ...]
    """Words for the earlier turns that stand nowhere else, so that a turn which is skipped can't be overlooked."""
    conversations: tuple[Conversation, ...]
    """With its own words, with each sentinel in their place, and with a sentinel and all earlier turns marked."""

    @classmethod
    def of(cls, prompt: Prompt) -> "Rendering":
        """Everything that is rendered to find where the prompt's own words stand."""
        system = () if prompt.system is None else (("system", prompt.system),)
        earlier = (*system, *prompt.history)
        marks = tuple(f"mechlens turn {place} sentinel" for place in range(len(earlier)))
        marked = tuple((role, mark if content else "") for (role, content), mark in zip(earlier, marks, strict=True))
        words = [(*earlier, ("user", said)) for said in (prompt.text, *SENTINELS)]
        return cls(earlier, marks, (*words, (*marked, ("user", SENTINELS[0]))))


def portions(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """The prompts in order, a number at a time that one request has time and room for."""
    some: list[Prompt] = []
    size = 0
    for prompt in prompts:
        length = len(prompt.text) + len(prompt.system or "") + sum(len(content) for _, content in prompt.history)
        if some and (len(some) == _TOGETHER or size + length > _ROOM):
            yield some
            some, size = [], 0
        some.append(prompt)
        size += length
    if some:
        yield some


LONGEST = 20_000_000
"""Characters that one request may give back."""
LONGEST_TEMPLATE = 1_000_000
"""Characters of a template; published ones have up to 30,000."""
WAITING = 120.0
"""Seconds until a worker is ended by us, for systems that don't count processor time."""

Turns = Sequence[Mapping[str, str]]


class TemplateFailure(Exception):
    """A template refused a conversation (its index) in its author's words, or could not be rendered (not `refused`)."""

    def __init__(self, conversation: int, message: str, refused: bool) -> None:
        super().__init__(message)
        self.conversation, self.refused = conversation, refused


def render(source: str, conversations: Sequence[Turns], variables: Mapping[str, Any], today: str) -> list[str]:
    """The text of each conversation, on a clock that stands at the midnight with which `today` (ISO) begins.

    `variables` are plain data that the template sees beside `messages`. Raises TemplateFailure where the template
    refuses a conversation, and UserError where it takes too much time or memory.
    """
    if len(source) > LONGEST_TEMPLATE:
        raise UserError(
            f"the chat template has {len(source)} characters, and at most {LONGEST_TEMPLATE} are read; give the "
            "tokenizer a sound chat template"
        )
    request = {
        "source": source, "conversations": [[dict(turn) for turn in turns] for turns in conversations],
        "variables": dict(variables), "today": today, "longest": LONGEST,
    }  # fmt: skip
    reply = _asked(json.dumps(request))
    if reply is None:
        raise _too_much(f"takes more than {render_worker.SECONDS} seconds")
    if "too_much" in reply:
        raise _too_much(reply["too_much"])
    if "error" in reply:
        raise TemplateFailure(reply["failed"], reply["error"], reply["refused"])
    texts: list[str] = reply["texts"]
    if not all(map(is_whole, texts)):
        raise UserError(
            "the chat template writes half a character (an unpaired surrogate), which no tokenizer can read; "
            "give the tokenizer a sound chat template"
        )
    return texts


def names_read(source: str) -> tuple[str, ...] | None:
    """The names of the arguments that a template reads, special tokens among them; None where it can't be rendered."""
    reply = _asked(json.dumps({"source": source})) if len(source) <= LONGEST_TEMPLATE else None
    return None if reply is None or reply["names"] is None else tuple(reply["names"])


def _too_much(what: str) -> UserError:
    return UserError(
        f"the chat template {what}, as a damaged or a hostile one does; give the tokenizer a sound chat template"
    )


class _Worker:
    """One worker process."""

    def __init__(self) -> None:
        # -P: what lies beside the script must not stand in for modules of Python's own.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(render_worker.__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        self._owner = os.getpid()

    @property
    def usable(self) -> bool:
        """False once it has ended, and in a process forked from the one that it belongs to."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: str) -> dict[str, Any] | None:
        """The reply to a line of JSON; None where the worker ended before it gave one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(WAITING, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except BrokenPipeError:
            return None
        finally:
            watch.cancel()

    def end(self) -> None:
        """Ends it, whatever it is doing."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()


_lock = threading.Lock()
_workers: list[_Worker] = []


def _asked(request: str) -> dict[str, Any] | None:
    with _lock:
        while _workers and not _workers[-1].usable:
            _workers.pop().end()
        if not _workers:
            _workers.append(_started())
        reply = None
        try:
            reply = _workers[-1].ask(request)
        finally:
            if reply is None or "too_much" in reply:  # also where we are interrupted: half a reply is in the pipe
                _workers.pop().end()
        return reply


def _started() -> _Worker:
    try:
        return _Worker()
    except OSError as error:
        raise UserError(
            f"the process that renders chat templates can't be started ({error.strerror}); free memory or processes"
        ) from error


@atexit.register
def end_workers() -> None:
    """Ends what runs; the next template starts it anew."""
    while _workers:
        _workers.pop().end()
