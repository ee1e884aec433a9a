"""Paths as people give them, and files that are read whole: only regular ones, and only up to a size."""

import os
import stat
from pathlib import Path

from mechlens.errors import UserError

LARGEST_FILE = 512 << 20
"""Bytes of a file that is read whole."""


def is_whole(text: str) -> bool:
    """False where text holds half a character (an unpaired surrogate), which no file, table or tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def user_path(given: str | Path) -> Path:
    """The path that a user means, with ~ resolved; it need not exist. UserError where it can be no path."""
    name = str(given)
    if "\0" in name:
        raise UserError(f"the path {name!r:.80} holds a NUL character, which no path has; correct it")
    if not is_whole(name):
        raise UserError(f"the path {name!r:.80} isn't UTF-8; rename the file or folder")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"the path {name!r:.80} names no home folder that exists; write the whole path") from error
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever opens it has more to say: what it was to be read as, or that it can be made
    except OSError as error:
        raise UserError(f"{name!r:.80} can't be a path ({error.strerror}); check it") from error
    return path


def require_regular(path: Path) -> None:
    """Nothing, or a UserError for a pipe or a device, whose end may never come."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # said by whoever opens it
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a pipe or a device; give a regular file")


def read_whole(path: Path) -> bytes:
    """All bytes of a regular file; UserError where it can't be read or is larger than LARGEST_FILE."""
    require_regular(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(
                f"{path} has {size / (1 << 20):.0f} MB and at most {LARGEST_FILE >> 20} MB are read; give a part of it"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check that it exists and may be read") from error
