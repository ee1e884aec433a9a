"""The rows of a parquet file, column by column: a value that can't be read spoils nothing but itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import LARGEST_FILE

MAX_ROWS = 5_000_000
"""Rows of one file."""
_BATCH = 256


@dataclass(frozen=True)
class Unreadable:
    """Stands where a value can't be had, such as text that isn't UTF-8 or a time in an unknown zone."""

    reason: str


def parquet_rows(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """Each row's values by column. UserError where the file is damaged, or unpacks to more than LARGEST_FILE."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        leaves = map(file.schema.column, range(len(file.schema)))
        words = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # Each different text once: a file of some kilobytes can repeat one of a megabyte as often as it likes.
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), read_dictionary=words)
        _require_room(path, file.metadata)
        _require_names(path, names)
        room = LARGEST_FILE
        for batch in file.iter_batches(batch_size=_BATCH, use_threads=False):
            room -= sum(_size(column) for column in batch.columns)
            if room < 0:
                raise _too_large(path)
            columns = [_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable parquet file ({reason:.200}); write it again") from error


def _require_room(path: Path, metadata: Any) -> None:
    if metadata.num_rows > MAX_ROWS:
        raise UserError(f"{path} has {metadata.num_rows} rows and at most {MAX_ROWS} are read; give a part of it")
    if sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)) > LARGEST_FILE:
        raise _too_large(path)


def _too_large(path: Path) -> UserError:
    return UserError(f"{path} unpacks to more than {LARGEST_FILE >> 20} MB; give a part of it")


def _require_names(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {twice[0]!r} twice; column names must differ")


def _size(column: Any) -> int:
    """Bytes of a column once each value stands for itself, those in lists and structures too."""
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(column, pyarrow.DictionaryArray):
        if not _is_words(column.dictionary.type):
            return int(column.nbytes) + len(column) * int(column.dictionary.nbytes)
        lengths = compute.binary_length(column.dictionary)
        return int(compute.sum(lengths.take(column.indices)).as_py() or 0) + len(column)
    if isinstance(column, pyarrow.StructArray):
        return sum(map(_size, column.flatten()))
    if isinstance(column, pyarrow.MapArray):
        return len(column) + _size(column.keys) + _size(column.items)
    if isinstance(column, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        return len(column) + _size(column.flatten())
    return int(column.nbytes)


def _is_words(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind))


def _values(column: Any) -> list[Any]:
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        words = _values(column.dictionary)
        return [None if place is None else words[place] for place in column.indices.to_pylist()]
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # whatever a converter raises is about values, each of which may not be asked for
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:  # see `_values`
        return Unreadable((str(error).splitlines() or [type(error).__name__])[0][:200])
