"""A run in a notebook's cell: its sentence, the numbers that decided, the main figure, and where the rest is.

Plain HTML without scripts and with the figure as an image, which untrusted notebooks and code hosts show as well.
"""

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mechlens.errors import UserError
from mechlens.runs.report.parts import estimate_text
from mechlens.runs.report.report import template
from mechlens.runs.report.still import still

if TYPE_CHECKING:
    from mechlens.runs.results.result import RunList, RunResult

MAX_NUMBERS = 12


def run_html(run: "RunResult") -> str:
    """One run."""
    record = run.record
    image, trouble = _main_figure(run)
    known = [(name, record.words.get(name, name), one) for name, one in record.deciding.items()]
    measured = [(name, words, estimate_text(one)) for name, words, one in known if one.measurable]
    missing = [f"{words} (n = {one.n})" for _, words, one in known if not one.measurable]
    kept = {"tables": run.tables, "figures": run.figures, "directions": run.directions}
    return template("notebook.html.jinja").render(
        run=record,
        folder=str(run.folder),
        model=run.model,
        sentence=run.sentence,
        state=run.state,
        numbers=measured[:MAX_NUMBERS],
        missing=missing[:MAX_NUMBERS],
        image=image,
        image_name=next(iter(run.figures), "").replace("_", " "),
        trouble=trouble,
        report=link(run.folder / "report.html"),
        kept=[(kind, tuple(mapping)) for kind, mapping in kept.items() if mapping],
    )


def list_html(runs: "RunList") -> str:
    """Many runs, a row each."""
    return template("notebook_list.html.jinja").render(runs=[(run, link(run.folder / "report.html")) for run in runs])


def _main_figure(run: "RunResult") -> tuple[str, str]:
    """The first figure as an image; a sentence in its place where its file is damaged."""
    if not run.figures:
        return "", ""
    try:
        shown = still(run.figures[next(iter(run.figures))])
    except UserError as error:
        return "", str(error)
    return f"data:image/svg+xml;base64,{base64.b64encode(shown.encode()).decode()}", ""


def link(path: Path) -> str:
    """A link that a notebook follows, from where it runs; "" where there is no such file."""
    if not path.is_file():
        return ""
    try:
        near = os.path.relpath(path)
    except ValueError:  # another drive
        near = str(path)
    return quote(Path(near).as_posix())
