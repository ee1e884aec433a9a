"""The one error that people are meant to read, the optional extras whose absence is such an error, and warnings."""

import re
import sys
import traceback
import warnings
from importlib.util import find_spec
from types import FrameType

_FLAG = re.compile(r"""`[^`]*`|(?<!\w)'[^']*'|"[^"]*"|(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9]|[a-z])""")
"""An option as the command line has it, and before it what is quoted: that is somebody else's and stays as it is."""


class UserError(ValueError):
    """Bad input, said in one sentence: what was found, what was needed, what to do.

    The command line prints the sentence without a traceback; from Python it is an ordinary ValueError. Sentences are
    written with the command line's options (--skip-broken); `str(error)`, which Python shows, has their names there
    (`skip_broken`), and `typed` has what was written.

    >>> try:
    ...     ml.builtin_prompts("harmfull")
    ... except ml.UserError as error:
    ...     print("did you mean" in str(error) or "harmful" in str(error))
    True
    """

    @property
    def typed(self) -> str:
        """The sentence for those who type commands."""
        return super().__str__()

    def __str__(self) -> str:
        return in_python(self.typed)


def in_python(sentence: str) -> str:
    """A sentence with the names of options in Python in place of the command line's; one that has both is left."""
    if "in Python" in sentence or "=True)" in sentence:
        return sentence
    return _FLAG.sub(lambda found: f"`{found[1].replace('-', '_')}`" if found[1] else found[0], sentence)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of whoever called this package, however deep in it the trouble was found.

    Frames of torch, whose `no_grad` wraps functions, count as the package's.
    """
    found = last = 1
    for level, (frame, _) in enumerate(traceback.walk_stack(sys._getframe(1)), start=2):
        found, last = (level + 1 if _ours(frame) else found), level
    warnings.warn(message, category, stacklevel=min(found, last))


def _ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in (__package__, "torch")


def an(kind: str) -> str:
    """The word with the article that it is said with."""
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def kind_of(value: object) -> str:
    """What a value is, with its article: a str, an int, the class Track."""
    return f"the class {value.__name__}" if isinstance(value, type) else an(type(value).__name__)


def quoted(value: object, width: int = 60) -> str:
    """A value as Python writes it; what is left out at its end is three dots."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def many(n: int, what: str) -> str:
    """A number with what it counts: 1 prompt, 2 prompts."""
    return f"{n} {what}{'' if n == 1 else 's'}"


EXTRAS = {
    "finetune": ("accelerate",),
    "gguf": ("gguf", "sentencepiece"),
    "inspect": ("inspect_ai",),
    "quantise": ("bitsandbytes", "torchao", "accelerate"),
    "ray": ("ray",),
    "reward": ("trl", "accelerate"),
    "slurm": ("submitit",),
    "workspaces": ("wandb_workspaces",),
}
"""Modules by the name of the extra in pyproject.toml."""


def has_extra(name: str) -> bool:
    """Whether all that an extra brings can be imported; imports nothing."""
    return not _missing(name)


def require_extra(name: str, what: str) -> None:
    """UserError, with the command that installs it, where an extra is missing; `what` needs it."""
    if missing := _missing(name):
        raise UserError(
            f"{what} needs the extra [{name}] (no {missing[0]} is installed); "
            f"install it with: pip install 'mechlens-toolkit[{name}]'"
        )


def _missing(name: str) -> list[str]:
    return [module for module in EXTRAS[name] if find_spec(module) is None]
