"""Finished pieces of work in a folder, so that a killed run goes on where it stopped."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mechlens.errors import UserError
from mechlens.runs.artifacts import open_tensors, tensor_digest, write_tensors


@dataclass(frozen=True)
class FolderCache:
    """One safetensors file per key; a `mechlens.methods.cache.Cache`."""

    folder: Path

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The piece under `key`, or None where there is none or its file is damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            header, value = open_tensors(path, tensors=True)
        except UserError:
            # A damaged piece costs its recomputation, not the run.
            return None
        whole = header.get("key") == key and header.get("sha256") == tensor_digest(value)
        return value if whole else None

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        """Keeps a finished piece, whole or not at all."""
        write_tensors(value, {"key": key, "sha256": tensor_digest(value)}, self._path(key))

    def _path(self, key: str) -> Path:
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise ValueError(f"a cache's key is a sha256 in hex, not {key!r}")
        return self.folder / f"{key}.safetensors"
