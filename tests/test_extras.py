"""What an extra brings is asked for in one sentence, with the command that installs it."""

import sys
import tomllib
from pathlib import Path

import pytest

from mechlens.errors import EXTRAS, UserError, has_extra
from mechlens.models.load import load_hf, load_tokenizer
from mechlens.models.packaged import fetch
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.training import require_settings

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def sentence(extra: str) -> str:
    command = rf"pip install 'mechlens-toolkit\[{extra}\]'"
    return rf"needs the extra \[{extra}\] \(no \w+ is installed\); install it with: {command}$"


def test_the_extras_are_those_of_the_distribution() -> None:
    declared = PYPROJECT["optional-dependencies"]
    assert {
        name: tuple(line.split(">=")[0].replace("-", "_") for line in lines) for name, lines in declared.items()
    } == EXTRAS
    assert PYPROJECT["name"] == "mechlens-toolkit"
    core = {line.split(">=")[0] for line in PYPROJECT["dependencies"]}
    assert not core & {module for modules in EXTRAS.values() for module in modules}


def test_the_set_up_scripts_install_every_extra() -> None:
    """But inspect, which needs an older fsspec than is pinned; scripts/conformance puts that beside."""
    setup = (ROOT / "scripts" / "setup").read_text(encoding="utf-8")
    assert f"-e '.[{','.join(name for name in EXTRAS if name != 'inspect')}]'" in setup
    assert "inspect-ai==" in (ROOT / "scripts" / "conformance").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["gguf", "sentencepiece"])
def test_without_gguf(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    assert not has_extra("gguf")
    for needing in (load_hf, load_tokenizer, read_direction):
        with pytest.raises(UserError, match=sentence("gguf")):
            needing(tmp_path / "model.gguf" if needing is read_direction else str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match=sentence("gguf")):
        fetch("smollm2")
    assert not (tmp_path / "cache").exists()


def test_without_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FinetuneConfig(recipe="benign")
    require_settings(settings)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=sentence("finetune")):
        require_settings(settings)
