"""What can be said of a configuration's values before anything heavy is imported.

Studies check the same where they use it, and more; here a slip of the hand is answered at once. Imports no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mechlens.errors import UserError
from mechlens.files import require_writable, user_path
from mechlens.settings import SOURCES, require_ranges

FILES = ("direction", "guard")
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
"""Of a source that is a file and neither a built-in set nor on the hub."""


def with_paths(config: Any) -> Any:
    """The configuration with its paths as its types have them: a Path with ~ resolved, or else text.

    UserError, before anything slow, for what can be no path.
    """
    hints = get_type_hints(type(config))
    given = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    paths = {name for name in given if Path in (hints[name], *get_args(hints[name]))}
    return replace(config, **{name: (_as_path if name in paths else _as_text)(one) for name, one in given.items()})


def _as_path(given: Any) -> Any:
    return user_path(given) if isinstance(given, str | os.PathLike) else given


def _as_text(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(map(_as_text, given))
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def require_possible(config: Any) -> None:
    """UserError for a count, a pair of options, a file or a folder that can't be, in a configuration of ours."""
    require_ranges(config)
    if not type(config).__module__.startswith("mechlens."):
        return  # another package's field of the same name may mean something else
    given = vars(config)
    if "label_column" in given:
        require_both(given["data"], given["label_column"])
        _require_columns(given)
    for name in FILES:
        if (file := given.get(name)) is not None and not user_path(file).exists():
            raise UserError(f"there is no file {file}; check the path")
    for name in SOURCES if given.get("data") is None else ("data",):
        if _is_missing(given.get(name)):
            raise UserError(f"{given[name]} could not be read (No such file or directory); check that it exists")
    if isinstance(given.get("out"), Path):
        require_writable(given["out"])


def require_both(data: str | None, label_column: str | None) -> None:
    """UserError where one file of both classes is named without its column, or the column without the file."""
    if (data is None) != (label_column is None):
        lacks, has = ("--data", "--label-column") if data is None else ("--label-column", "--data")
        raise UserError(
            f"{has} was given without {lacks}; one file with both classes needs both, such as --data FILE "
            "--label-column tone, and the values of that column as the names of the classes"
        )


def _require_columns(given: Mapping[str, Any]) -> None:
    """UserError for the name of a column where no source has any."""
    named = [name for name in ("column", "label_column", "family_column") if given[name] is not None]
    if not named:
        return
    from mechlens.prompts.builtin import builtin_names
    from mechlens.prompts.files.rows import has_columns

    wanted = SOURCES if given["data"] is None else ("data",)
    sources = [part for name in wanted if isinstance(given.get(name), str) for part in given[name].split("+")]
    if not any(part not in builtin_names() and has_columns(part) for part in sources):
        raise UserError(
            f"--{named[0].replace('_', '-')} was given, and none of {', '.join(dict.fromkeys(sources))} has columns "
            "(text files have a prompt a line, and built-in sets are as they are); leave it out, or give a file with "
            "columns, such as a .csv or .jsonl"
        )


def _is_missing(source: object) -> bool:
    """True for a source that can only be a file, and isn't there."""
    is_file = isinstance(source, str) and "+" not in source and Path(source).suffix.lower() in ENDINGS
    return is_file and not user_path(str(source)).exists()
