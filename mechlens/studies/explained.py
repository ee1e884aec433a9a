"""Configurations as Python shows them: `help(ml.Track)`, `ml.Track?` and Shift-Tab.

Types are plain ones, without what only the command line needs, and every option has its line: the one that `--help`
shows, read from where it stands.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, get_type_hints

Config = TypeVar("Config", bound=type)
WIDTH = 100
"""Characters of a line, before it goes on below."""


def explained(config: Config) -> Config:
    """The same class, with a plain signature and a docstring that says what each option means."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    config.__init__.__signature__ = OneALine([own, *_parameters(config)])  # type: ignore[misc]
    config.__signature__ = Plain()  # type: ignore[attr-defined]
    said = _said(config)
    lines = [_line(field.name, said[field.name]) for field in _ordered(config) if field.name in said]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Options:", *lines])
    return config


class OneALine(inspect.Signature):
    """A signature of options, printed with a line for each."""

    def __str__(self) -> str:
        given = [str(one) for one in self.parameters.values() if one.kind is not one.KEYWORD_ONLY]
        options = [str(one) for one in self.parameters.values() if one.kind is one.KEYWORD_ONLY]
        return "".join(["(\n", *(f"    {one},\n" for one in (*given, "*", *options)), ")"])


class Plain:
    """The signature of a class, or of one that inherits from it."""

    def __get__(self, _: object, owner: type) -> OneALine:
        return OneALine(_parameters(owner))


@dataclass(frozen=True)
class Made:
    """A default that is made anew for each configuration."""

    of: Any

    def __repr__(self) -> str:
        return f"{self.of.__name__}()"


def _parameters(config: type) -> list[inspect.Parameter]:
    plain = get_type_hints(config)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=_default(field), annotation=plain[field.name])
        for field in _ordered(config)
    ]


def _default(field: "Field[Any]") -> object:
    if field.default_factory is not MISSING:
        return Made(field.default_factory)
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _ordered(config: Any) -> "list[Field[Any]]":
    """What must be given first, then its own options, then those that it shares with others."""
    known = {field.name: field for field in fields(config) if field.init}
    near = dict.fromkeys(name for base in config.__mro__ for name in inspect.get_annotations(base))
    found = [known[name] for name in near if name in known]
    return sorted(found, key=lambda field: _default(field) is not inspect.Parameter.empty)


def _said(config: type) -> dict[str, str]:
    """What each option means: as `--help` says it, else the docstring below the field of the nearest class."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        found |= _docstrings(base.__module__).get(base.__qualname__, {})
    for name, hint in get_type_hints(config, include_extras=True).items():
        for part in getattr(hint, "__metadata__", ()):
            if isinstance(helped := getattr(part, "help", None), str):
                found[name] = helped
    return found


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """The docstrings below the fields of a module's classes; none where its source isn't there."""
    try:
        body = ast.parse(inspect.getsource(sys.modules[module])).body
    except (OSError, TypeError, KeyError):
        return {}
    return {one.name: dict(_below(one.body)) for one in body if isinstance(one, ast.ClassDef)}


def _below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield ast.unparse(field.target), " ".join(str(after.value.value).split())


def _line(name: str, said: str) -> str:
    return textwrap.fill(f"{name}: {said}", WIDTH, initial_indent="  ", subsequent_indent="      ")
