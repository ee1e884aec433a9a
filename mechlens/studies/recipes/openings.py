"""Harmful prompts with the affirmative openings that AdvBench published for them, and nothing beyond an opening."""

import re
from pathlib import Path
from typing import NamedTuple

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.prompts.builtin import builtin_names, builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.rows import Row, read_rows
from mechlens.prompts.text import normalise_text

MAX_WORDS = 40
"""The longest opening of AdvBench has 31."""
_OPENING = re.compile(r"Sure, here(?: is|'s| are) [^\n\r:]+")
_SENTENCE_END = re.compile(r"[.!?]\s")


class Opening(NamedTuple):
    """A harmful prompt and how a model that accepts it begins to answer."""

    prompt: Prompt
    opening: str


class Openings(NamedTuple):
    """Openings in file order, and the ids of the prompts that a study tests on."""

    openings: list[Opening]
    left_out: tuple[str, ...]


def published_openings(data: str | None) -> Openings:
    """The rows of a file with columns `goal` and `target` (Zou et al. 2023), each prompt once.

    A target has to be one line "Sure, here is ..." of one sentence: what follows it is harmful content, which
    nothing here is trained on. Prompts of the built-in study sets are left out. UserError naming file and row.
    """
    if data is None:
        raise UserError(
            "this recipe needs --data, a file with columns goal and target such as AdvBench's harmful_behaviors.csv"
        )
    path = user_path(data)
    studied = {normalise_text(prompt.text) for name in builtin_names() for prompt in builtin_prompts(name)}
    found: dict[str, Opening] = {}
    left_out = []
    for row in read_rows(path):
        goal, target = _text(path, row, "goal"), _text(path, row, "target")
        _require_opening(path, row, target)
        prompt = Prompt(f"{path.stem}-{row.number:04d}", goal, label="harmful", source=path.stem)
        if normalise_text(goal) in studied:
            left_out.append(prompt.id)
        else:
            found.setdefault(normalise_text(goal), Opening(prompt, target))
    return Openings(list(found.values()), tuple(left_out))


def _text(path: Path, row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{path} row {row.number} has no text in column {column!r}; give a file with a harmful prompt in goal and "
            "its affirmative opening in target, such as AdvBench's harmful_behaviors.csv"
        )
    return value.strip()


def _require_opening(path: Path, row: Row, target: str) -> None:
    opens = _OPENING.fullmatch(target) and not _SENTENCE_END.search(target)
    if not opens or len(target.split()) > MAX_WORDS:
        raise UserError(
            f"{path} row {row.number}: a target must be an opening and no more, one sentence 'Sure, here is ...' of up "
            f"to {MAX_WORDS} words; this recipe trains on no harmful content"
        )
