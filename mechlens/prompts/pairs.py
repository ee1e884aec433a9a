"""Loading pairs: the built-in ones, or a file whose rows hold a clean and a corrupt prompt."""

import random
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.prompts.builtin import builtin_pairs
from mechlens.prompts.files.rows import read_rows
from mechlens.prompts.prompt import Prompt, PromptPair, UnfitPrompt

BUILTIN = "builtin"


def load_pairs(source: str, *, sample: int | None, seed: int) -> list[PromptPair]:
    """Pairs from "builtin" (harmful is clean) or from a file with columns `clean` and `corrupt`.

    `sample` draws that many by seed. UserError naming file, row and column for a row without both texts.
    """
    pairs = builtin_pairs() if source == BUILTIN else _from_file(user_path(source))
    if sample is None or sample >= len(pairs):
        return pairs
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), sample))
    return [pairs[i] for i in drawn]


def _from_file(path: Path) -> list[PromptPair]:
    pairs = []
    for row in read_rows(path):
        for column in ("clean", "corrupt"):
            text = row.values.get(column)
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{path}, row {row.number}, column {column!r}: found {text!r:.60}; a pair needs a text in both "
                    "columns clean and corrupt"
                )
        name = f"{path.stem}-{row.number:04d}"
        try:
            sides = [
                Prompt(f"{name}.{side}", row.values[side], source=path.stem, family=name)
                for side in ("clean", "corrupt")
            ]
        except UnfitPrompt as error:
            raise UserError(f"{path}, row {row.number}: {error}") from error
        pairs.append(PromptPair(*sides))
    if not pairs:
        raise UserError(f"{path} holds no pairs; give rows with columns clean and corrupt")
    return pairs
