"""Every study's report in a browser: on a phone, on a desk and in the dark, nothing is cut, hidden, empty or pale.

The reports are those that other tests have made: `scripts/test` runs these after them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPORTS = "MECHLENS_TEST_REPORTS"
"""The environment variable that names the folder (pytest's --basetemp) in which the other tests have left reports."""
VERBS = (
    "causal", "compare", "direction", "finetune", "guard_eval", "guard_fit", "jailbreaks", "patch", "select",
    "separate", "track",
)  # fmt: skip
made_by_others = pytest.mark.skipif(
    REPORTS not in os.environ,
    reason=f"{REPORTS} names no folder with reports; scripts/test runs these after the others",
)
CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
MOST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of headless Chromium; `page.said` is what it wrote to its console as errors."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport=PHONE, color_scheme="light")
        opened.said = []
        opened.on("console", lambda message: opened.said.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.said.append(str(error)))
        yield opened
        browser.close()


def made(verb: str) -> Path:
    """The largest report of the study that the tests before have left: the one with most in it."""
    records = [path for path in Path(os.environ[REPORTS]).rglob("run.json") if (path.parent / "report.html").exists()]
    verbs = [path.parent / "report.html" for path in records if _verb(path) == verb]
    assert verbs, f"no test has left a report of {verb}"
    return max(verbs, key=lambda path: path.stat().st_size)


def _verb(record: Path) -> str:
    """Of which study a record is; "" of one that a test has damaged."""
    try:
        return str(json.loads(record.read_text())["verb"])
    except (ValueError, KeyError):
        return ""


@made_by_others
@pytest.mark.parametrize("verb", VERBS)
def test_a_report_is_whole_on_a_phone_on_a_desk_and_in_the_dark(verb: str, page: Any) -> None:
    report = made(verb)
    assert report.stat().st_size < MOST_BYTES
    page.said.clear()
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="light")
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn=light]", state="attached")
    faults = {"phone": page.evaluate(CHECKS)}
    page.set_viewport_size(DESK)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]", state="attached")
    faults["desk, dark"] = page.evaluate(CHECKS)
    assert {where: found for where, found in faults.items() if found} == {}
    assert page.said == []


def test_the_checks_find_what_they_are_for(page: Any) -> None:
    """A page with one fault of each kind that isn't a figure's."""
    page.set_viewport_size(PHONE)
    page.set_content(
        "<main><p style='width: 600px'>wide</p><p style='color: #999'>pale</p><p>a `word`</p>"
        "<p style='width: 60px; overflow: hidden; white-space: nowrap'>much longer than its box</p>"
        "<div class='tokens'><p> </p></div></main>"
    )
    found = " ".join(page.evaluate(CHECKS))
    for fault in ("the page is", "contrast 2.8", "backtick", "cut: p", "an empty view of tokens"):
        assert fault in found
    assert '"wide"' not in found
