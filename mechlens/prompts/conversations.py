"""What is rendered for a prompt: its own conversation, and some of known words that show where its words stand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mechlens.prompts.prompt import Prompt

Conversation = tuple[tuple[str, str], ...]
"""Turns as (role, content), oldest first."""

SENTINELS = ("mechlens zero sentinel", "mechlens other sentinel")
"""Words that stand in place of the user's."""
_TOGETHER, _ROOM = 256, 1_000_000
"""Prompts, and characters of them, that are rendered together."""


@dataclass(frozen=True)
class Asked:
    """What is rendered for a prompt."""

    earlier: Conversation
    """The turns before its words, the system prompt first."""
    marks: tuple[str, ...]
    """Words for the earlier turns that stand nowhere else, so that a turn which is skipped can't be overlooked."""
    conversations: tuple[Conversation, ...]
    """With its own words, with each sentinel in their place, and with a sentinel and all earlier turns marked."""

    @classmethod
    def of(cls, prompt: Prompt) -> "Asked":
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
