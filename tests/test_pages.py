"""Every study's report in a browser: on a phone, on a desk and in the dark, nothing is cut, hidden, empty or pale.

The reports are those that other tests have made: `scripts/test` runs these after them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechlens.prompts.prompt import Prompt
from mechlens.runs.report import figures
from mechlens.runs.report.parts import paragraphs
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings
from mechlens.studies.behaviours import verdict as behaviours
from mechlens.studies.causal import verdict as causal
from mechlens.studies.cliff import verdict as cliff
from mechlens.studies.compare import verdict as compare
from mechlens.studies.jailbreaks import report as jailbreaks
from mechlens.studies.select import verdict as select
from mechlens.studies.separate import verdict as separate
from mechlens.studies.track import verdict as track

REPORTS = "MECHLENS_TEST_REPORTS"
"""The environment variable that names the folder (pytest's --basetemp) in which the other tests have left reports."""
VERBS = (
    "behaviours", "causal", "cliff", "compare", "direction", "finetune", "geometry", "guard_eval", "guard_fit",
    "jailbreaks", "patch", "select", "separate", "sinks", "steer_train", "track",
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
    page.evaluate("drawAgain(plots, false)")  # all, where a reader has those that are near the screen
    faults = {"phone": page.evaluate(CHECKS)}
    page.set_viewport_size(DESK)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]", state="attached")
    faults["desk, dark"] = page.evaluate(CHECKS)
    assert {where: found for where, found in faults.items() if found} == {}
    assert page.said == []


FIGURES = 12


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with many figures, of which a few fit on a screen; the last is a heatmap with a cell that is no angle."""
    frame = pd.DataFrame({"x": [0, 1, 2], "y": [0.2, 0.5, 0.9]})
    words = {"title": "t", "xlabel": "x", "ylabel": "y"}
    cells = pd.DataFrame({"x": [0, 1], "y": [0, 0], "v": [0.5, float("nan")]})
    grid = figures.heatmap(cells, x="x", y="y", value="v", center=0.0, limits=(-1.0, 1.0), missing="no angle", **words)
    drawn = {f"line{i}": figures.lines(frame, x="x", y="y", **words) for i in range(FIGURES - 1)} | {"grid": grid}
    out = tmp_path_factory.mktemp("long") / "run"
    with open_run(verb="v", config=Prompt("a", "b"), out=out, wandb=WandbSettings(mode="disabled"), argv=["v"]) as run:
        names = tuple(run.figure(name, figure, caption="c") for name, figure in drawn.items())
        return run.report(Report("A long report", "Is it?", "It is.", sections=(Section("All", figures=names),)))


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_figures_are_drawn_when_they_come_near_and_all_of_them_on_paper(
    long_report: Path, page: Any, size: dict[str, int]
) -> None:
    page.said.clear()
    page.set_viewport_size(size)
    page.emulate_media(color_scheme="light")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # the page's own work, however busy the machine
    page.goto(long_report.as_uri())
    page.wait_for_selector("html[data-drawn=light]", state="attached")
    passed = page.evaluate("performance.now()")
    spent = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    devtools.detach()
    print(f"{size['width']} pixels: figures near the screen after {passed:.0f} ms, {1000 * spent:.0f} of the CPU")  # noqa: T201
    count = "document.querySelectorAll('.plot .main-svg:first-child').length"
    assert 0 < page.evaluate(count) < FIGURES
    page.evaluate("plots.at(-1).scrollIntoView()")
    page.wait_for_selector("#figure-grid .heatmaplayer image", state="attached")
    assert page.locator("#figure-grid .heatmaplayer image").count() == 2  # the values, and the grey cell
    assert page.evaluate(count) < FIGURES
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(count) == FIGURES
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(CHECKS) == []
    assert page.said == []


RULES = {
    "separate": separate.RULE, "causal": causal.RULE, "select": select.RULE, "cliff": cliff.RULE, "track": track.RULE,
    "compare": compare.RULE, "behaviours": behaviours.RULE, "jailbreaks": jailbreaks.RULE,
}  # fmt: skip


@pytest.mark.parametrize("study", RULES)
def test_a_rule_is_sentences_and_a_list_with_a_line_for_each_word(study: str) -> None:
    blocks = paragraphs(RULES[study])
    items = ["".join(text for _, text in item) for listed, run in blocks if listed for item in run]
    assert len(items) >= 3
    for text in [*items, *("".join(text for _, text in part) for listed, run in blocks if not listed for part in run)]:
        assert text[0].isupper() or text[0] == "(", text
        assert text[-1] in ".:", text
        assert len(text) < 620, text
    assert all(re.match(r"(\(\d\) )?[A-Z][^.:]*[:,.a-z]", item) for item in items)


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_a_rule_is_a_list_on_the_page_too(page: Any, size: dict[str, int], tmp_path: Path) -> None:
    where = WandbSettings(mode="disabled")
    with open_run(verb="v", config=Prompt("a", "b"), out=tmp_path / "run", wandb=where, argv=["v"]) as run:
        sections = tuple(Section(name, rule) for name, rule in RULES.items())
        report = run.report(Report("Rules", "Which?", "These.", sections=sections, how=RULES["causal"]))
    page.set_viewport_size(size)
    page.emulate_media(color_scheme="light")
    page.goto(report.as_uri())
    items = page.locator(".rules li")
    assert items.count() > 3 * len(RULES)
    assert {box["x"] >= 0 and box["x"] + box["width"] <= size["width"] for box in map(_box, items.all())} == {True}
    assert page.evaluate(CHECKS) == []
    if folder := os.environ.get("MECHLENS_TEST_PICTURES"):
        page.screenshot(path=f"{folder}/rules-{size['width']}.png", full_page=True)


def _box(item: Any) -> dict[str, float]:
    found: dict[str, float] = item.bounding_box()
    return found


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
