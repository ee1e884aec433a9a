"""What is mistyped at the command line, in a sentence: a command that isn't there, a word where a number belongs."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

from mechlens.errors import quoted
from mechlens.registry import unknown_name

WORDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}
"""Values, as `--help` writes them, in words."""
_PARSING = re.compile(r"Error parsing (--[\w.-]+):.*Argument helptext: (?:--\S+ )*--\S+ (\S+)")


def command_of(argv: Sequence[str], known: Iterable[str]) -> str:
    """The command that the arguments begin with; "" where it is still to be chosen.

    UserError for one that there isn't, with the nearest that there is.
    """
    names = list(known)
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    if not words:
        return ""
    first, pair = words[0], " ".join(words)
    if first in names:  # which may be the first word of others, too
        return pair if pair in names else first
    inner = [name.partition(" ")[2] for name in names if name.startswith(f"{first} ")]
    if not inner:
        raise unknown_name("command", first, list(dict.fromkeys(name.partition(" ")[0] for name in names)))
    if pair != first and pair not in names:
        raise unknown_name(f"command of `{first}`", words[1], inner)
    return pair if pair in names else ""


def no_number(said: str, argv: Sequence[str]) -> str:
    """The parser's words about a value that is no number, as a sentence; "" where they are about something else."""
    found = _PARSING.search(" ".join(re.sub("[─│╭╮╰╯]", " ", said).split()))
    if found is None or not all(part in WORDS for part in found[2].split("|")):
        return ""
    option, needed = found[1], " or ".join(WORDS[part] for part in reversed(found[2].split("|")))
    spelt = [word.partition("=") for word in argv]
    values = [
        given or " ".join(argv[place + 1 : place + 2])
        for place, (name, _, given) in enumerate(spelt)
        if name.replace("_", "-") == option
    ]
    return f"{option} is {quoted(values[-1])}; it must be {needed}" if values else ""
