"""The type of a model's weights and the device they lie on: what `auto` means, and what rounding to a type does."""

import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from mechlens.errors import UserError, warn
from mechlens.files import require_regular

FULL = ("float32", "bfloat16", "float16")
"""Types in which every weight is a number of its own."""
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of types."""


@dataclass(frozen=True)
class Parity:
    """How far a model is from plain Hugging Face in the same type and on the same weights, on one prompt.

    Both ways are right, and what is between them is rounding.
    """

    dtype: str
    """Type that is computed in."""
    logits: float
    """Largest difference of two logits."""
    tolerance: float
    """The largest that still passes for rounding (see `mechlens.models.engine.probes.tolerance`)."""
    largest_logit: float
    residual: float | None
    """Largest distance of two residual vectors, at any level and token, as a share of their length; None where they
    weren't found."""


def chosen_device(device: str | None) -> str:
    """The device that is meant: "auto" is CUDA, then MPS, then the CPU; None, of earlier versions' records, the CPU.

    UserError, before any weights are read, for one that isn't here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r}; give auto, cpu, cuda, cuda:1 or mps") from error
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if wanted.type in here and (wanted.index or 0) >= here[wanted.type]:
        raise UserError(
            f"there is no device {device!r} here: this machine, or this build of PyTorch, has {here[wanted.type]} of "
            f"type {wanted.type}; give auto or cpu"
        )
    return str(wanted)


def main_type(config: Any, stored: "Counter[str]") -> str:
    """The checkpoint's own type: the one in which its weights are stored, or what its configuration names.

    The configuration decides where there are several, as transformers does it, or where none can be seen (on the hub).
    """
    if len(stored) == 1 and set(stored) <= set(FULL):
        return next(iter(stored))
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    full = [kind for kind, _ in stored.most_common() if kind in FULL]
    return named if named in FULL else (full or ["float32"])[0]


def stored_types(folder: Path) -> "Counter[str]":
    """Bytes of the floating-point weights in a folder's safetensors files, by type."""
    from safetensors import SafetensorError, safe_open

    found: Counter[str] = Counter()
    try:
        for path in folder.glob("*.safetensors"):
            require_regular(path)
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    kind = part.get_dtype()
                    size = BYTES.get(kind, 1)
                    for length in part.get_shape():
                        size *= length
                    if not kind.startswith(("I", "U", "BOOL")):
                        found[NAMES.get(kind, kind)] += size
    except (OSError, SafetensorError):
        return Counter()  # loading says what is wrong
    return found


def slow_here(dtype: str) -> bool:
    """Whether this processor has no instructions for products in half precision, by its flags: slower than float32.

    Only where the flags are known, on x86.
    """
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    asked = {
        "bfloat16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        "float16": ("_is_amx_fp16_supported",),
    }  # fmt: skip
    if dtype not in asked:
        return False
    return not any(getattr(torch.cpu, name, lambda: True)() for name in asked[dtype])


def warn_of_slow(dtype: str, place: str) -> None:
    """Says once that float32 is faster."""
    if place == "cpu" and slow_here(dtype) and dtype not in _SAID:
        _SAID.add(dtype)
        warn(
            f"this processor has no instructions for {dtype}, so float32 is faster here: --dtype float32 "
            "(dtype='float32' in Python), where the memory is enough",
        )


_SAID: set[str] = set()


def round_weights(hf_model: Any, dtype: "torch.dtype") -> Any:
    """The model with its parameters in another type, as from_pretrained does it: rotary tables stay float32.

    One parameter at a time, so that memory holds the model once.
    """
    for parameter in hf_model.parameters():
        parameter.data = parameter.data.to(dtype)
    hf_model.config.dtype = dtype
    return hf_model
