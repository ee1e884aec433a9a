"""The short form of `scripts/kill_runs.py`, and that it notices what it is there to notice."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import warm

from mechlens.studies.registry import studies

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
KILLS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kill_runs import Killer
folder = Path(sys.argv[2])
killer = Killer("direction", folder / "direction", control=False)
trials = [killer.trial("kill", seed=0, kills=2)]
(folder / "trials.json").write_text(json.dumps([vars(one) for one in trials]))
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with the undisturbed run and a killed one, and what came of the trials."""
    folder = tmp_path_factory.mktemp("kills")
    done = warm.python(KILLS, str(SCRIPTS), str(folder))
    assert done.returncode == 0, done.stderr
    return folder / "direction", json.loads((folder / "trials.json").read_text())


def test_a_study_killed_at_random_moments_ends_with_the_same_bits(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, trials = killed
    assert [one["found"] for one in trials] == [""]
    assert sum(one["hits"] for one in trials) >= 1
    assert (folder / "out" / "run.json").exists()


def test_every_recorded_study_has_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import kill_subjects

    assert set(kill_subjects.STUDIES) == set(studies())


def test_what_differs_is_found(
    killed: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from kill_runs import differences

    whole = killed[0] / "whole"
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    assert differences(whole, other) == []
    name = sorted(path.name for path in (other / "tables").glob("*.parquet") if path.stem != "prompts")[0]
    frame = pd.read_parquet(other / "tables" / name)
    number = next(column for column in frame if frame[column].dtype == "float64")
    frame.loc[frame[number].first_valid_index(), number] += 1e-12
    frame.to_parquet(other / "tables" / name, index=False)
    (other / "figures" / "new.json").write_text("{}")
    record = json.loads((other / "run.json").read_text())
    metric = next(iter(record["metrics"]))
    record["metrics"][metric]["n"] += 1
    (other / "run.json").write_text(json.dumps(record))
    found = differences(whole, other)
    assert len(found) == 3
    assert found[0].startswith(f"metrics of run.json: {metric}: n: ")
    assert found[1:] == ["figures/new.json is in one folder only", f"tables/{name} differs"]
