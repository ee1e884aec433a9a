"""Every new name that the changelog gives for an old one is there, and no old one is left."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+)` \| `([\w.:]+)` \|$", CHANGELOG, re.MULTILINE)
MODULES = [(old, new) for old, new in ROWS if ":" not in new]
NAMES = [(old, new) for old, new in ROWS if ":" in new]


def test_there_are_both_tables() -> None:
    assert len(MODULES) > 200
    assert len(NAMES) > 30
    assert len({old for old, _ in MODULES}) == len(MODULES)


@pytest.mark.parametrize("new", sorted({new for _, new in MODULES}))
def test_every_new_module_can_be_imported(new: str) -> None:
    import_module(f"mechlens.{new}")


@pytest.mark.parametrize("new", [new for _, new in NAMES])
def test_every_new_name_is_there(new: str) -> None:
    module, _, name = new.partition(":")
    assert hasattr(import_module(f"mechlens.{module}"), name)


def test_no_old_module_is_left() -> None:
    assert [old for old, _ in MODULES if (ROOT / "mechlens" / f"{old.replace('.', '/')}.py").exists()] == []


def test_the_newest_entry_is_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r"^## ([\d.]+)", CHANGELOG, re.MULTILINE)[0] == project["version"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"Version ([\d.]+)", readme) == [project["version"]]
