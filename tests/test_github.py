"""The files for GitHub are well formed, and ask and run what exists."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_for(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert {field["type"] for field in form["body"]} <= {"textarea", "checkboxes"}


def test_a_bug_report_asks_for_the_environment() -> None:
    (field,) = [field for field in read(FORMS[0])["body"] if field["id"] == "env"]
    assert "`mechlens env`" in field["attributes"]["label"]
    assert field["validations"] == {"required": True}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_our_script(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    command = job["steps"][-1]["run"].split()[0]
    assert (ROOT / command).stat().st_mode & 0o111


def test_every_push_and_pull_request_is_tested() -> None:
    # YAML 1.1 reads the key `on` as true.
    assert set(read(ROOT / ".github" / "workflows" / "test.yml")[True]) == {"push", "pull_request"}
