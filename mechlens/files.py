"""Files that are whole or absent, names that are safe as files, and disk trouble said in one sentence.

Everything that mechlens writes gets the permissions that the user's umask gives, as with any other tool: who wants a
private folder sets the umask or the folder's own mode, and what a group shares can be read by all of it.
"""

import difflib
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechlens.errors import UserError, kind_of, quoted

LARGEST_FILE = 512 << 20
"""Bytes of a file that is read whole."""


def is_whole(text: str) -> bool:
    """False where text holds half a character (an unpaired surrogate), which no file, table or tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


AnyPath = str | os.PathLike[str]
"""A path as people give it: text, a Path, or anything that stands for one."""


def user_path(given: AnyPath) -> Path:
    """The path that a user means, with ~ resolved; it need not exist. UserError where it can be no path."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{kind_of(given)} was given as a path; give it as text or as a Path")
    name = os.fspath(given)
    if "\0" in name:
        raise UserError(f"the path {quoted(name, 80)} holds a NUL character, which no path has; correct it")
    if not is_whole(name):
        raise UserError(f"the path {quoted(name, 80)} isn't UTF-8; rename the file or folder")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"the path {quoted(name, 80)} names no home folder that exists; write the whole path"
        ) from error
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever opens it has more to say: what it was to be read as, or that it can be made
    except OSError as error:
        raise UserError(f"{quoted(name, 80)} can't be a path ({error.strerror}); check it") from error
    return path


def nearest_folder(given: AnyPath) -> str:
    """A question after the folder here that was perhaps meant; "" where none is near."""
    path = user_path(given)
    there = next((above for above in path.parents if above.is_dir()), None)
    if there is None or path.exists():
        return ""
    first, *rest = path.relative_to(there).parts
    try:
        names = [child.name for child in there.iterdir() if child.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(first, names, n=1)
    if not close:
        return ""
    whole = there.joinpath(close[0], *rest)
    return f"did you mean {str(whole if whole.is_dir() else there / close[0])!r}?"


def short_name(given: AnyPath) -> str:
    """The last part of a path or of a hub id: what a model is called in tables, figures and lists."""
    return os.path.basename(os.path.normpath(os.fspath(given))) if os.fspath(given) else ""


def adapter_name(given: AnyPath) -> str:
    """What an adapter is called: its folder, or of a run's `adapter` the run."""
    whole = os.path.normpath(os.fspath(given))
    name, run = os.path.basename(whole), os.path.basename(os.path.dirname(whole))
    return run if name == "adapter" and run else name


def require_regular(path: Path) -> None:
    """Nothing, or a UserError for a pipe or a device, whose end may never come."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # said by whoever opens it
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a pipe or a device; give a regular file")


def require_writable(out: Path) -> None:
    """UserError for a folder that can't be made or written to."""
    out = user_path(out)
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise UserError(f"{out} could not be written ({there} {why}); give another --out")


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


PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
TROUBLE = (*FULL, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""What libraries that write files report in words of their own."""
LONGEST_NAME = 200
"""Bytes; file systems take 255, and a temporary name is longer than the file's own."""
_LEFT = re.compile(r"\..+\.\w+\.partial")
# torch's archive writer says this for every reason why it could not write.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container\.cc|file write failed")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` if the block succeeds and removed if it fails.

    It lies in a folder of its own beside `path`, so that what a library writes on its way there is ours as well.
    """
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        partial = folder / f".{path.name}"
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes a file of its own, which nobody else may read
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def as_the_umask_says(folder: Path) -> None:
    """Gives what libraries wrote into a folder of ours the permissions of any new file; safetensors' are private."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=PARTIAL) as scratch:
        new = Path(scratch) / "new"
        new.touch()
        mode = new.stat().st_mode
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Puts `text` in a file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def disk_error(error: OSError, path: Path) -> UserError:
    """The sentence for a file that could not be written."""
    if error.errno in FULL:
        return UserError(
            f"the disk is full: {path} could not be written; free some space there or choose another folder"
        )
    reason = error.strerror or str(error)
    remedy = "choose a folder that you can write to" if error.errno else "free some space there, or choose another"
    return UserError(f"{path} could not be written ({reason}); {remedy}")


def as_os_error(error: Exception) -> OSError | None:
    """Disk trouble that safetensors or torch told in an error of their own; None for anything else."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    for code in TROUBLE:
        if os.strerror(code) in text:
            return OSError(code, os.strerror(code))
    return OSError("torch wrote less than it should, as where a disk is full") if _TORCH_WRITER.search(text) else None


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """While it lasts, a library writes to `folder`; its disk trouble becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever isn't about the disk goes on as it is
        if (trouble := as_os_error(error)) is None:
            raise
        raise disk_error(trouble, folder) from error


def remove_partials(*folders: Path) -> None:
    """Clears what a killed process was writing right in these folders, which nobody else may be writing to."""
    for folder in folders:
        for left in folder.iterdir() if folder.is_dir() else ():
            if not _LEFT.fullmatch(left.name) or left.is_symlink():
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                _remove(left)


def is_partial(path: Path) -> bool:
    """True for the temporary name of `whole_file`."""
    return _LEFT.fullmatch(path.name) is not None


def plain_name(name: str) -> str:
    """The name, if it is one that a file in a given folder can have everywhere; else a UserError.

    Nothing that leads out of the folder, nothing hidden, nothing that some file system or terminal can't show.
    """
    bad = not name or name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name.isprintable()
    if bad or name != name.strip() or len(name.encode("utf-8", errors="replace")) > LONGEST_NAME:
        raise UserError(
            f"{quoted(name, 80)} can't be the name of a file; give up to {LONGEST_NAME} letters, digits, spaces or "
            "marks, without slashes, and no dot at the start"
        )
    return name


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes the file, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems refuse to sync a folder; the rename is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # Nothing more can be done for a leftover, and the first error is the one to report.
        return
