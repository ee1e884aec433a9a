"""Thoughts in answers: a reasoning model writes one, in marks, before what it says, and only what it says is judged."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mechlens.prompts.batch import TokenBatch

OPEN, CLOSE = "<think>", "</think>"


def written_thought(thinking: str, answer: str, *, opened: bool) -> tuple[str, ...]:
    """A thought in its marks and the answer after it, in pieces: no token holds some of a thought and some of a mark.

    Where the template `opened` the thought, its first mark stands there already.
    """
    return (*(() if opened else (f"{OPEN}\n",)), thinking, f"\n{CLOSE}\n\n", answer)


def after_thought(answer: str) -> str | None:
    """What an answer says after its thought; all of it where it has none, None where it ends inside one."""
    said = answer.rpartition(CLOSE)[2]
    return None if OPEN in said else said


def knows_thoughts(tokenizer: Any) -> bool:
    """Whether the tokenizer has a token for a mark of thoughts, or its chat template writes one."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = tokenizer.get_vocab()
    return any(mark in known or mark in template for mark in (OPEN, CLOSE))


def opens_thought(batch: TokenBatch, tokenizer: Any) -> tuple[bool, ...]:
    """Of each prompt: whether the template opens a thought after the user's words, so that the answer begins in it."""
    return tuple(after_thought(text) is None for text in _after_words(batch, tokenizer))


def closes_thought(batch: TokenBatch, tokenizer: Any) -> tuple[bool, ...]:
    """Of each prompt: whether the template writes a finished thought, an empty one, before the answer begins."""
    return tuple(CLOSE in text and after_thought(text) is not None for text in _after_words(batch, tokenizer))


def _after_words(batch: TokenBatch, tokenizer: Any) -> list[str]:
    """What the template writes after the user's words."""
    known: dict[tuple[int, ...], str] = {}
    found = []
    for i in range(len(batch.prompts)):
        row, first = batch.row(i), batch.offset(i)
        end = len(row) if batch.answer is None else int(batch.answer[i, 0]) - first
        after = tuple(row[int(batch.instruction[i, 1]) - first + 1 : end])
        if after not in known:
            known[after] = tokenizer.decode(list(after))
        found.append(known[after])
    return found


class AnswerText:
    """Answer tokens in words, without special tokens but for a thought's marks, which some tokenizers count as such."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, tokens: Sequence[int], *, opened: bool = False) -> str:
        """The words; where the template `opened` the thought they begin with its mark, which the model didn't write."""
        pieces, start = [OPEN] if opened else [], 0
        for place, token in enumerate(tokens):
            if token in self._marks:
                pieces += [self._decoded(tokens[start:place]), self._marks[token]]
                start = place + 1
        return "".join([*pieces, self._decoded(tokens[start:])]).strip()

    @cached_property
    def _marks(self) -> dict[int, str]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {i: str(token) for i, token in added.items() if token.special and str(token) in (OPEN, CLOSE)}

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def answer_texts(tokenizer: Any, batch: TokenBatch, answers: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Answer tokens to each prompt of the batch in words; see `AnswerText`."""
    in_words = AnswerText(tokenizer)
    opened = opens_thought(batch, tokenizer)
    return tuple(in_words(tokens, opened=begun) for tokens, begun in zip(answers, opened, strict=True))
