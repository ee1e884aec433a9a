"""What the core does without: the distribution's extras, and the modules that each brings."""

from importlib.util import find_spec

from mechlens.errors import UserError

EXTRAS = {"finetune": ("accelerate",), "gguf": ("gguf", "sentencepiece")}
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
