"""A model's weights on disk, out of memory's way: in a file without a name, which a killed process leaves nowhere."""

import shutil
import tempfile
from typing import IO, Any

import torch
from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.packaged import cache_dir


class WeightStore:
    """Tensors by name in an unnamed file: bit for bit what was put in, without room in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, 0
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; UserError where the disk is full."""
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        try:
            self._file.seek(self._end)
            self._file.write(flat.numpy().tobytes())
        except OSError as error:
            raise UserError(
                f"the base's weights can't be kept on disk ({error.strerror}); make room in {str(cache_dir())!r}, or "
                "set MECHLENS_CACHE to another folder"
            ) from error
        self._places[name] = self._end, tensor.shape, tensor.dtype
        self._end += flat.numel()

    def alias(self, name: str, known: str) -> None:
        """Another name for a tensor that was put in."""
        self._places[name] = self._places[known]

    def get(self, name: str) -> Tensor:
        """The tensor as it was, on the CPU."""
        place, shape, dtype = self._places[name]
        self._file.seek(place)
        read = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(read, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()


def unnamed_file(hf_model: Any) -> IO[bytes]:
    """A file without a name in the models' cache folder, which has room for the model; gone when the process ends."""
    folder = cache_dir()
    needed = sum(p.numel() * p.element_size() for p in hf_model.parameters())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - its owner closes it
    except OSError as error:
        raise UserError(
            f"nothing can be written to {str(folder)!r} ({error.strerror}); set MECHLENS_CACHE to another folder"
        ) from error
    if free < needed:
        file.close()
        raise UserError(
            f"the base's weights take {needed >> 20} MB on disk and {str(folder)!r} has {free >> 20} MB left; make "
            "room there, or set MECHLENS_CACHE to another folder"
        )
    return file
