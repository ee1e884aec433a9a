"""One page that links the reports of all runs below a folder, each with its sentence."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from mechlens.errors import UserError
from mechlens.files import write_text
from mechlens.runs.report.report import resource, template
from mechlens.runs.results.result import RunResult
from mechlens.runs.run import Run, found_runs

INDEX_FILE = "index.html"


@dataclass(frozen=True)
class Entry:
    """A run as its row on the page shows it; everything is text."""

    name: str
    """Its folder below the page's."""
    link: str
    """To its report, relative and quoted; "" where there is none."""
    sentence: str
    verb: str = ""
    model: str = ""
    """Its short name."""
    path: str = ""
    """The model as it was given."""
    date: str = ""
    status: str = "damaged"
    kind: str = "error"
    """Of the status, for its colour: success, started or error."""


def write_index(root: Path) -> Path:
    """Writes `index.html` into `root`, the newest run first, and gives its path; damaged records are on it as such."""
    entries = [_entry(root, folder, found) for folder, found in found_runs(root)]
    newest = sorted(entries, key=lambda entry: entry.date, reverse=True)
    path = root / INDEX_FILE
    css = Markup(resource("report.css"))
    write_text(path, template("index.html.jinja").render(title=root.resolve().name, entries=newest, css=css))
    return path


def _entry(root: Path, folder: Path, found: Run | UserError) -> Entry:
    below = folder.relative_to(root)
    name = str(below) if below.parts else root.resolve().name
    report = folder / "report.html"
    link = quote((below / report.name).as_posix()) if report.is_file() else ""
    if isinstance(found, UserError):
        return Entry(name, link, str(found).replace(str(folder), name))
    run = RunResult(folder, found)
    said = found.error if run.status == "error" and found.error else found.sentence or run.state
    date = found.started[:16].replace("T", " ")
    verb, model = found.verb.replace("_", " "), found.model_name
    return Entry(name, link, said, verb, run.model, model, date, run.status, found.status)
