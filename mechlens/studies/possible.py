"""What can be said of a configuration's files before anything heavy is imported; of its values `Options` says it.

Studies check the same where they use it, and more; here a slip of the hand is answered at once. Imports no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mechlens.errors import UserError
from mechlens.files import require_writable, short_name, user_path
from mechlens.registry import require_numbers, unknown_name
from mechlens.runs.remote.store import is_remote
from mechlens.settings import SOURCES, Columns

FILES = ("direction", "guard", "controller")
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
"""Of a source that is a file and neither a built-in set nor on the hub."""
POSITIONS = {
    "inst": "inst", "last": "last", "post": "post[k]", "instruction": "instruction[*]", "token": "token[k]",
    "prompt": "prompt[*]", "all": "all",
}  # fmt: skip
"""What positions are called in configurations, up to a bracket, and whole."""


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
    """UserError for a column, a layer, a file or a folder that isn't there, in a configuration of ours."""
    if not type(config).__module__.startswith("mechlens."):
        return  # another package's field of the same name may mean something else
    given = vars(config)
    for name in FILES:
        if (file := given.get(name)) is not None and not user_path(file).exists():
            raise UserError(f"there is no file {file}; check the path")
    for name in SOURCES if given.get("data") is None else ("data",):
        if _is_missing(given.get(name)):
            raise UserError(f"{given[name]} could not be read (No such file or directory); check that it exists")
        if _is_folder(given.get(name)):
            raise UserError(f"{given[name]} is a folder; give one data file inside it")
    _require_positions(given.get("positions"))
    if isinstance(config, Columns):
        _require_columns(config)
    if isinstance(given.get("checkpoints"), tuple):
        _require_checkpoints(given["checkpoints"])
    _require_layers(given)
    if isinstance(given.get("out"), Path) and not is_remote(given["out"]):
        require_writable(given["out"])


def _require_positions(given: Any) -> None:
    """UserError for a name that no position has in any template."""
    for name in given if isinstance(given, tuple) else ():
        if isinstance(name, str) and name.partition("[")[0] not in POSITIONS:
            raise unknown_name("position", name, [*POSITIONS.values(), "post[*]"])


def _require_columns(config: Columns) -> None:
    """UserError for a column that a file lacks, or where no source has any."""
    from mechlens.prompts.builtin import builtin_names
    from mechlens.prompts.files.load import require_columns
    from mechlens.prompts.files.rows import has_columns

    names = SOURCES if config.data is None else ("data",)
    given = [source for name in names if isinstance(source := getattr(config, name, None), str)]
    sources = [part for source in given for part in ([source] if Path(source).exists() else source.split("+"))]
    sources += [source for source in getattr(config, "domains", ()) if Path(source).is_file()]
    some = [part for part in sources if part not in builtin_names() and has_columns(part)]
    named = [name for name in ("column", "label_column", "family_column") if getattr(config, name) is not None]
    if named and not some:
        raise UserError(
            f"--{named[0].replace('_', '-')} was given, and none of {', '.join(dict.fromkeys(sources))} has columns "
            "(text files have a prompt a line, and built-in sets are as they are); leave it out, or give a file with "
            "columns, such as a .csv or .jsonl"
        )
    for part in some:
        require_columns(part, config.column, config.label_column, config.family_column)


def _require_checkpoints(given: tuple[Any, ...]) -> None:
    from mechlens.models.checkpoints.found import sources

    for source in given:
        if isinstance(source, str):
            sources(source)


def _require_layers(given: Mapping[str, Any]) -> None:
    """UserError for a layer or level of a model that lies here and doesn't have it."""
    model = given.get("model") or given.get("base")
    named = {name: given[name] for name in ("layers", "levels") if isinstance(given.get(name), tuple) and given[name]}
    if not isinstance(model, str) or not named:
        return
    from mechlens.models.packaged import blocks_here

    blocks = blocks_here(model)
    for name, numbers in named.items():
        if blocks is not None and all(isinstance(number, int) for number in numbers):
            require_numbers(name[:-1], numbers, blocks - (name == "layers"), short_name(given.get("adapter") or model))


def _is_missing(source: object) -> bool:
    """True for a source that can only be a file, and isn't there."""
    is_file = isinstance(source, str) and "+" not in source and Path(source).suffix.lower() in ENDINGS
    return is_file and not user_path(str(source)).exists()


def _is_folder(source: object) -> bool:
    """True for a source that is a folder here, and no built-in set of that name."""
    from mechlens.prompts.builtin import builtin_names

    return isinstance(source, str) and source not in builtin_names() and user_path(source).is_dir()
