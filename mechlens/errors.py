"""The one error that people are meant to read, and the optional extras whose absence is such an error."""

from importlib.util import find_spec


class UserError(ValueError):
    """Bad input, said in one sentence: what was found, what was needed, what to do.

    The command line prints the sentence without a traceback; from Python it is an ordinary ValueError.

    >>> try:
    ...     ml.builtin_prompts("harmfull")
    ... except ml.UserError as error:
    ...     print("did you mean" in str(error) or "harmful" in str(error))
    True
    """


def an(kind: str) -> str:
    """The word with the article that it is said with."""
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


EXTRAS = {
    "finetune": ("accelerate",),
    "gguf": ("gguf", "sentencepiece"),
    "quantise": ("bitsandbytes", "torchao", "accelerate"),
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
