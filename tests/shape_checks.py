"""Run-time checks of what has a shape: functions and dataclasses of mechlens whose annotations jaxtyping wrote.

jaxtyping's own hook (`--jaxtyping-packages`) checks every function. Those without a shape are mypy's, and binding their
arguments a second time on every call was a third of the suite's time.
"""

import ast
import sys
import typing
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

import jaxtyping
from beartype import beartype


def has_shape(annotation: Any) -> bool:
    """Whether a type, or one inside it, is an array with a shape."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    inside = annotation if isinstance(annotation, list | tuple) else typing.get_args(annotation)
    return any(map(has_shape, inside))


def checked(given: Any) -> Any:
    """The function or class, checked on every call where its annotations hold a shape, else as it is."""
    if any(map(has_shape, getattr(given, "__annotations__", {}).values())):
        return jaxtyping.jaxtyped(given, typechecker=beartype)
    return given


class _Decorates(ast.NodeTransformer):
    """Puts `checked` next to every function, and around every class, where `dataclass` has made its __init__."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list.append(_decorator())
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator())
        return node


def _decorator() -> ast.expr:
    return ast.parse(f"__import__({__name__!r}).checked", mode="eval").body


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        tree = _Decorates().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "mechlens":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder())
