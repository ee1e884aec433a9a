"""Which tokens a position's name stands for in each prompt: one, a span of them, or none.

Besides the template's names (`inst`, `post[k]`, ...): `prompt[*]` and `instruction[*]`, every token of the prompt and
of the user's words; `answer[k]` and `answer[*]`; `think[*]` and `think_end`, what stands between an answer's marks of
a thought, and the last token of the closing one; and names of the caller's, for words within the user's.
"""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechlens.errors import UserError, kind_of, many
from mechlens.methods.behaviour.thought import CLOSE, OPEN, opens_thought
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.place import tokens_of_words
from mechlens.prompts.templates.template import ChatTemplate

_ANSWER = re.compile(r"answer\[(-?\d+|\*)\]")
_OPENS = {"prompt[*]": "token", "instruction[*]": "instruction", "answer[*]": "answer", "think[*]": "think"}
"""Spans, and what their tokens are called one by one."""
_TAKEN = ("inst", "post", "last", "prompt", "token", "instruction", "answer", "think", "think_end")
"""What positions are called, up to a bracket."""
Words = Mapping[str, str | Sequence[str]]
"""By a name of the caller's: words that stand in every prompt, or each prompt's own."""


@dataclass(frozen=True)
class Span:
    """One named column: so many tokens from `start` on, counted from the prompt's first; none where length is 0."""

    name: str
    start: Int[Tensor, " prompt"]
    length: Int[Tensor, " prompt"]
    opens: str = ""
    """What its tokens are called one by one; empty for the name of a single token."""

    @property
    def present(self) -> Bool[Tensor, " prompt"]:
        """Prompts that have it."""
        return self.length > 0

    def opened(self) -> list["Span"]:
        """A column for each token of the longest; a prompt whose span is shorter has none in the last ones."""
        if not self.opens:
            return [self]
        most = max(int(self.length.max()), 1)
        return [Span(f"{self.opens}[{k}]", self.start + k, (k < self.length).long()) for k in range(most)]


def spans_of(batch: TokenBatch, names: Sequence[str], words: Words, template: Callable[[], ChatTemplate]) -> list[Span]:
    """The columns that names stand for, in order; `template` is asked for where tokens have to be read as text.

    Raises UserError for a name that there is not, an answer's without answers, and words that a prompt doesn't have.
    """
    if isinstance(names, str):
        raise UserError(f"positions is the one name {names!r}; give a list of names")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(
            f"positions has {wrong[0]!r} ({kind_of(wrong[0])}), and a position is a name; give such as last, inst or "
            "post[-1]"
        )
    _refuse_names(names, words)
    offsets = batch.offsets
    found: dict[str, Span] = {}
    for name in names:
        for span in _spans(batch, name, offsets, words, template):
            found.setdefault(span.name, span)
    if not found:
        raise UserError("there is no position to read at all; name one, such as last")
    return list(found.values())


def opened(spans: Sequence[Span]) -> list[Span]:
    """A column for each token of every span; a token that two spans give by one name is one column."""
    return list({token.name: token for span in spans for token in span.opened()}.values())


def _refuse_names(names: Sequence[str], words: Words) -> None:
    for name in words:
        if name.partition("[")[0] in _TAKEN:
            raise UserError(f"{name!r} is a position of its own; call your words something else")
        if name not in names:
            raise UserError(f"words are given for {name!r}, which is none of the positions; add it to positions")


def _spans(
    batch: TokenBatch, name: str, offsets: Tensor, words: Words, template: Callable[[], ChatTemplate]
) -> list[Span]:
    if name in words:
        return [_of_words(batch, name, words[name], template())]
    if name == "prompt[*]":
        ends = batch.lengths if batch.answer is None else batch.answer[:, 0] - offsets
        return [Span(name, torch.zeros_like(ends), ends, _OPENS[name])]
    if name == "instruction[*]":
        start, inst = (batch.instruction - offsets.unsqueeze(1)).unbind(dim=1)
        return [Span(name, start, inst + 1 - start, _OPENS[name])]
    if _ANSWER.fullmatch(name) or name in ("think[*]", "think_end"):
        if batch.answer is None:
            raise UserError(f"there are no answers to read {name!r} in; pass answers=")
        start, end = batch.answer.unbind(dim=1)
        if name.startswith("answer"):
            return [_of_answer(name, start, end)]
        return [_of_thought(batch, name, template().tokenizer)]
    single = [name] if name.startswith(("token[", "instruction[")) else batch.resolve([name])
    return [Span(one, batch.at(one) - offsets, torch.ones_like(offsets)) for one in single]


def _of_answer(name: str, start: Tensor, end: Tensor) -> Span:
    which = _ANSWER.fullmatch(name)
    assert which is not None
    if which[1] == "*":
        return Span(name, start, end - start, _OPENS[name])
    k = int(which[1])
    at = start + k if k >= 0 else end + k
    return Span(name, at, ((start <= at) & (at < end)).long())


def _of_thought(batch: TokenBatch, name: str, tokenizer: Any) -> Span:
    assert batch.answer is not None
    starts, lengths = [], []
    opened = opens_thought(batch, tokenizer)
    for i, (start, end) in enumerate(batch.answer.tolist()):
        first, last, close = thought_in(batch.row(i)[start:end], tokenizer, opened=opened[i])
        at, n = (first, last - first) if name == "think[*]" else (close, int(close >= 0))
        starts.append(start + max(at, 0))
        lengths.append(n)
    return Span(name, torch.tensor(starts), torch.tensor(lengths), _OPENS.get(name, ""))


def thought_in(answer: Sequence[int], tokenizer: Any, *, opened: bool) -> tuple[int, int, int]:
    """First token of an answer's thought, the one after its last, and the last of the mark that closes it (or -1).

    The first two are equal where it has none; a thought without end goes on to the answer's, and of several it is the
    first.
    """

    def said(n: int) -> str:
        text: str = tokenizer.decode(list(answer[:n]), skip_special_tokens=False)
        return text

    def least(holds: Callable[[str], bool]) -> int:
        """Tokens after which something is true that stays so; one more than there are where it never is."""
        return bisect.bisect_left(range(len(answer) + 1), True, key=lambda n: holds(said(n)))

    first = 0 if opened else least(lambda text: OPEN in text)
    if first > len(answer):
        return 0, 0, -1
    begun = 0 if opened else said(len(answer)).index(OPEN)  # a mark that closes nothing may stand before
    closed = least(lambda text: CLOSE in text[begun:])
    if closed > len(answer):
        return first, len(answer), -1
    before = said(len(answer)).index(CLOSE, begun)
    last = least(lambda text: len(text) > before) - 1  # the first token that holds some of the mark
    return first, max(last, first), closed - 1


def _of_words(batch: TokenBatch, name: str, words: str | Sequence[str], template: ChatTemplate) -> Span:
    if template.fingerprint != batch.template:
        raise UserError(f"{name!r} is looked up in words, and the prompts have another chat template; pass template=")
    each = [words] * len(batch.prompts) if isinstance(words, str) else list(words)
    if len(each) != len(batch.prompts):
        raise UserError(
            f"{name!r} has {many(len(each), 'string')} for {many(len(batch.prompts), 'prompt')}; give one for each"
        )
    found = tokens_of_words(batch.prompts, template, each)
    start, end = torch.tensor(found).unbind(dim=1)
    return Span(name, start, end - start, name)
