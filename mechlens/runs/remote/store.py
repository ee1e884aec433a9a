"""Folders on an object store (`s3://bucket/run`), by fsspec; wherever a path may be one of them, it is a Path.

A Path keeps one slash of the two (`s3:/bucket/run`), which is told from a file's path by the store's name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import AnyPath, user_path, write_text

STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "memory": "fsspec"}
"""Object stores, which put an object whole or not at all, and the package that each needs."""


def is_remote(given: AnyPath) -> bool:
    """Whether a path is one on an object store.

    >>> from mechlens.runs.remote.store import is_remote
    >>> is_remote("s3://bucket/run"), is_remote("runs/first")
    (True, False)
    """
    kind, colon, rest = str(given).partition(":")
    return bool(colon) and kind in STORES and rest.startswith("/")


def address(path: AnyPath) -> str:
    """The URL of a folder or file on a store, with both slashes."""
    kind, _, rest = str(path).partition(":")
    return f"{kind}://{rest.strip('/')}"


def exists(path: Path) -> bool:
    """Whether there is a file, here or on a store."""
    return Store(path).has() if is_remote(path) else path.exists()


def read_text(path: Path) -> str:
    """A small file, here or on a store; FileNotFoundError where there is none."""
    return Store(path).read().decode() if is_remote(path) else path.read_text(encoding="utf-8")


def put_text(path: Path, text: str) -> None:
    """A small file, whole or not at all, with the folders that it needs."""
    if is_remote(path):
        Store(path).write(text.encode())
    else:
        write_text(path, text)


def remove(path: Path) -> None:
    """Takes away a file, if there is one."""
    if is_remote(path):
        Store(path).remove()
    else:
        path.unlink(missing_ok=True)


class Store:
    """A folder of an object store; names are below it, with slashes, and "" is the place itself, as a file."""

    def __init__(self, path: AnyPath) -> None:
        self.url = address(path)
        with self._spoken():
            import fsspec

            found: tuple[Any, str] = fsspec.url_to_fs(self.url)
            self._files, self._root = found

    def names(self) -> list[str]:
        """The name of every object below."""
        with self._spoken():
            self._files.invalidate_cache()
            found: list[str] = self._files.find(self._root)
        start = len(self._root.rstrip("/")) + 1
        return [name[start:] for name in found]

    def modified(self, name: str) -> float:
        """When an object was put, in seconds since 1970, by the store's clock; 0 where it is gone."""
        with self._spoken():
            self._files.invalidate_cache()
            try:
                return float(self._files.modified(self._at(name)).timestamp())
            except FileNotFoundError:
                return 0.0

    def has(self, name: str = "") -> bool:
        """Whether there is such an object."""
        with self._spoken():
            self._files.invalidate_cache()
            return bool(self._files.isfile(self._at(name)))

    def read(self, name: str = "") -> bytes:
        """An object's bytes; FileNotFoundError where there is none."""
        with self._spoken(read=True):
            found: bytes = self._files.cat_file(self._at(name))
            return found

    def write(self, content: bytes, name: str = "") -> None:
        """Puts an object."""
        with self._spoken():
            self._files.pipe_file(self._at(name), content)

    def remove(self, name: str = "") -> None:
        """Takes an object away, if there is one."""
        with self._spoken():
            try:
                self._files.rm_file(self._at(name))
            except FileNotFoundError:
                return

    def put(self, file: Path, name: str) -> None:
        """Puts a file of this machine."""
        with self._spoken():
            self._files.put_file(str(file), self._at(name))

    def get(self, name: str, file: Path) -> None:
        """An object as a file of this machine."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._spoken():
            self._files.get_file(self._at(name), str(file))

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextmanager
    def _spoken(self, *, read: bool = False) -> Iterator[None]:
        """What the store's own library says, in one sentence; it has errors of its own for a network or a key."""
        try:
            yield
        except ImportError as error:
            package = STORES[self.url.partition(":")[0]]
            raise UserError(
                f"{self.url} needs the package {package}; install it with: pip install {package}"
            ) from error
        except Exception as error:
            if read and isinstance(error, FileNotFoundError):
                raise
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"{self.url} could not be reached ({reason:.200}); check the address and your keys"
            ) from error


def require_here(path: Path, what: str) -> None:
    """UserError for a path on a store where only a folder of this machine will do."""
    if is_remote(path):
        raise UserError(f"{what} can't be on {address(path)}; give a folder of this machine")


def local_path(given: AnyPath) -> Path:
    """As `user_path`, of a path that may be on a store."""
    return Path(given) if is_remote(given) else user_path(given)
