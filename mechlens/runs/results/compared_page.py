"""A comparison of runs as one page, and as tables beside it."""

from pathlib import Path

from markupsafe import Markup

from mechlens.files import whole_file, write_text
from mechlens.runs.report.cells import cells
from mechlens.runs.report.report import resource, template
from mechlens.runs.results.compared import RunComparison

PAGE = "compared.html"
_CALLED = {"words": "number", "like": "runs like", "one_run": "one run claims"}


def write_comparison(found: RunComparison, folder: Path) -> Path:
    """Writes the page and metrics, differs and seeds as parquet into a folder, and gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = {"metrics": found.metrics, "differs": found.differs, "seeds": found.seeds}
    for name, frame in frames.items():
        with whole_file(folder / f"{name}.parquet") as part:
            frame.to_parquet(part, index=False)
    told = [found.in_words(row) for row in frames["metrics"].to_dict("records")]
    shown = {
        "metrics": frames["metrics"][["words", "run"]].assign(
            value=[own for own, _ in told], difference=[gap for _, gap in told]
        ),
        "differs": frames["differs"],
        "seeds": frames["seeds"].drop(columns="name"),
    }
    tables = {
        name: {"columns": [_head(str(column), found.names) for column in frame.columns], "rows": cells(frame)}
        for name, frame in shown.items()
    }
    runs = [
        {"name": name, "sentence": run.sentence, "model": run.model, "date": run.record.started[:16].replace("T", " ")}
        for name, run in zip(found.names, found.runs, strict=True)
    ]
    page = template("compared.html.jinja").render(
        verb=found.runs[0].record.verb.replace("_", " "), runs=runs, tables=tables, css=Markup(resource("report.css"))
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _head(column: str, runs: tuple[str, ...]) -> str:
    return column if column in runs else _CALLED.get(column, column.replace("_", " "))
