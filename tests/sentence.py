"""The one sentence of a run is the same wherever the run is shown."""

import html
import re
from pathlib import Path

from mechlens.runs.headline import LONGEST
from mechlens.runs.run import Run, read_run
from mechlens.studies.driver import summary
from mechlens.studies.registry import Screen
from mechlens.studies.runs.config import ListRuns, ShowRun
from mechlens.studies.runs.study import list_all, show


class Seen(Screen):
    """A screen that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list = []

    def interactive(self) -> bool:
        return False

    def show(self, value: object) -> None:
        self.shown.append(value)


def require_short(sentence: str) -> None:
    """One sentence that a reader takes in at once, without holes."""
    assert len(sentence) <= LONGEST, sentence
    assert re.fullmatch(r"[A-Z].*[^.]\.", sentence), sentence
    assert not re.search(r"  |\bnan\b|\.;|,;|\. [A-Z]", sentence), sentence


def require_one_sentence(folder: Path) -> Run:
    """The run, once its report, its entry in lists and the command's last line begin with the same short sentence."""
    run = read_run(folder)
    sentence = run.headline
    assert sentence, f"{run.verb} has no headline"
    require_short(sentence)
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    _, _, body = page.partition("</h1>")
    assert re.sub("<[^>]*>", "", body).strip().startswith(sentence)
    assert summary(folder).splitlines()[-1] == sentence
    screen = Seen()
    show(ShowRun(folder=folder), screen)
    list_all(ListRuns(folder=folder), screen)
    told, listed = screen.shown
    assert told.splitlines()[0] == sentence
    assert listed.splitlines()[1:] == [f"    {sentence}"]
    return run
