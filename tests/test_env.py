"""`mechlens env` says what is there, and names no folder of the user's."""

import json
from pathlib import Path

import pytest

from mechlens.cli import main
from mechlens.errors import EXTRAS


def test_it_names_the_models_in_the_cache_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path))
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    main(["env", "--json"])
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["models in the cache"] == ["smollm2"]
    assert set(found["extras"]) == set(EXTRAS)
    assert str(tmp_path) not in said
    assert str(Path.home()) not in said
