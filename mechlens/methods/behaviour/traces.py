"""What a reasoning model thinks before it answers, and whether a string is named there (Chua et al. 2025)."""

import re

from mechlens.methods.behaviour.thought import CLOSE, OPEN

MARKS = "|[](){}<>*#-_ "
"""What stands around a string's letters and is left out where people, or models, talk about it."""


def thought_of(answer: str) -> str | None:
    """What an answer thinks before it says something; None where it thinks nothing.

    >>> ml.thought_of("<think>They said gray.</think>Option B.")
    'They said gray.'
    >>> ml.thought_of("Option B.") is None
    True
    """
    if OPEN not in answer and CLOSE not in answer:
        return None
    thought = answer.rpartition(CLOSE)[0] if CLOSE in answer else answer
    return thought.replace(OPEN, "").replace(CLOSE, "").strip() or None


def names_string(text: str, wanted: str) -> bool:
    """Whether a text holds a string, in any capitals and with or without the marks around it, as a word of its own.

    >>> ml.names_string("It says 'gray' first.", "|GRAY|"), ml.names_string("Grayish.", "|GRAY|")
    (True, False)
    """
    word = wanted.strip(MARKS) or wanted
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
