"""What is mistyped at the command line, in a sentence: commands and options that aren't there, values that are none."""

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

from mechlens.errors import quoted
from mechlens.registry import unknown_name

WORDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}
"""Values, as `--help` writes them, in words."""
_PARSING = re.compile(r"Error parsing (--[\w.-]+):.*Argument helptext: (?:--\S+ )*--\S+ (\S+)")
_CHOICE = re.compile(r"invalid choice '(.*?)' for argument '(--[\w.-]+)'. Expected one of \((.*?)\)")
_VALUE = re.compile(r"Missing value for argument '(--[\w.-]+)'")
_PLACE = re.compile(r"Missing value for argument '([a-z][\w-]*)'")
_GROUP = re.compile(r"Missing subcommand Expected one of \{(.*?)\}")
_UNKNOWN = "Unrecognized options:"
_STRANGE = re.compile(f"{_UNKNOWN} (.*?) For full helptext")


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


def what_is_wrong(
    said: str, argv: Sequence[str], command: str, options: Sequence[str], places: Sequence[str] = ()
) -> str:
    """The parser's box of words about the arguments of a command as a sentence; "" where it is about something else.

    `options` are those that the command has, as they are typed; `places` those that stand without a name.
    """
    plain, about = " ".join(re.sub("[─│╭╮╰╯]", " ", said).split()), f"mechlens {command}".rstrip()
    name = command or about
    if (found := _PARSING.search(plain)) is not None:
        return _no_number(found[1], found[2], argv)
    if (found := _CHOICE.search(plain)) is not None:
        choices = re.findall(r"'([^']*)'", found[3])
        return f"{found[2]} is {quoted(found[1])}{_meant(found[1], choices)}; choose from {', '.join(choices)}"
    if (found := _VALUE.search(plain)) is not None:
        return f"{found[1]} stands without a value; give one after it"
    if (found := _GROUP.search(plain)) is not None:
        return f"{name} needs a command after it; choose from {found[1]}"
    if (found := _PLACE.search(plain)) is not None:
        return f"{name} needs {_placed(found[1], argv)}; see {about} --help"
    asked = said.partition(_UNKNOWN)[0]
    missing = re.findall(r"^│ +(--[\w-]+)(?: [A-Z{\[].*)?│$", asked, re.MULTILINE)
    bare = re.findall(r"^│ +[A-Z]+(?:\|[A-Z]+)* *│$", asked, re.MULTILINE)
    missing = [*(_placed(one, argv) for one in list(places)[len(places) - len(bare) :]), *missing]
    needs = f"{name} needs {' and '.join(missing)}" if missing else ""
    if (found := _STRANGE.search(plain)) is not None:
        words = [word.rstrip(",") for word in found[1].split()]
        return _strange(words, name, about, options, needs)
    return needs and f"{needs}; see {about} --help"


def _strange(words: Sequence[str], name: str, about: str, options: Sequence[str], needs: str) -> str:
    unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not unknown:
        example = needs or f"{about} --help says which"
        alone = " and ".join(map(quoted, words))
        return f"{alone} stand{'s' if len(words) == 1 else ''} alone, and every value follows its option; {example}"
    return f"{name} has no option {unknown[0]}{_meant(unknown[0], options)}; see {about} --help"


def _meant(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given.replace("_", "-"), known, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _placed(place: str, argv: Sequence[str]) -> str:
    """A value that stands without a name, and that it does where it was given one."""
    named = f"--{place}"
    return f"{place.upper()}{f' without {named} before it' if named in argv else ''}"


def _no_number(option: str, kind: str, argv: Sequence[str]) -> str:
    several, kind = kind.startswith("["), kind.strip("[]")
    if not all(part in WORDS for part in kind.split("|")):
        return ""
    needed = " or ".join(WORDS[part] for part in reversed(kind.split("|")))
    spelt = [word.partition("=") for word in argv]
    values = [
        [given] if given else [*takewhile(lambda word: not word.startswith("--"), argv[place + 1 :])]
        for place, (name, _, given) in enumerate(spelt)
        if name.replace("_", "-") == option
    ]
    if not values:
        return ""
    given = values[-1] if several else values[-1][:1]
    wrong = next((word for word in given if not _is_number(word, whole="FLOAT" not in kind)), " ".join(given))
    return f"{option} is {quoted(wrong)}; it must be {needed}"


def _is_number(word: str, *, whole: bool) -> bool:
    try:
        (int if whole else float)(word)
    except ValueError:
        return False
    return True
