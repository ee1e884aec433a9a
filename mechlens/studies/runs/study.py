"""`mechlens runs`: what recorded runs say, and the same numbers again."""

from mechlens.errors import UserError
from mechlens.runs.own_classes import own_classes
from mechlens.runs.remote.copies import shown
from mechlens.runs.remote.store import require_here
from mechlens.runs.results.result import list_runs, open_run_folder
from mechlens.runs.run import metric_text
from mechlens.studies.registry import Screen
from mechlens.studies.runs.config import CompareRuns, IndexRuns, ListRuns, PruneRuns, Rerun, ShowRun

SAME = 1e-6
"""Numbers of a rerun that differ by more are other numbers."""


def list_all(config: ListRuns, screen: Screen) -> None:
    """Two lines a run: which one it is, and what it found or what is the matter with it; or a JSON object each."""
    runs = list_runs(
        config.folder, study=config.study, model=config.model, status=config.status, since=config.since,
        until=config.until,
    )  # fmt: skip
    for run in runs:
        record = run.record
        model = record.model_name if config.json else run.model
        facts = (shown(run.folder), record.verb, model, run.status, record.started[:16].replace("T", " "))
        if config.json:
            names = ("folder", "study", "model", "status", "started", "sentence", "state")
            screen.show(dict(zip(names, (*facts, run.sentence, run.state), strict=True)))
        else:
            screen.show("\n    ".join(filter(None, ("  ".join(filter(None, facts)), run.sentence or run.state))))
    if not (runs or config.json):
        asked = any((config.study, config.model, config.status, config.since, config.until))
        screen.show(f"no {'such ' if asked else ''}runs below {config.folder}")


def show(config: ShowRun, screen: Screen) -> None:
    """One record, in words."""
    opened = open_run_folder(config.folder)
    run = opened.record
    ended = f", finished {run.finished}" if run.finished else ""
    lines = [*filter(None, [run.sentence]), f"{run.id}: {run.verb}, {opened.status}, started {run.started}{ended}"]
    lines += filter(None, [own_classes(run.config)])
    if run.error:
        lines.append(f"error: {run.error}")
    if opened.status == "interrupted":
        lines.append(opened.state)
    inputs = run.inputs.data | ({"today, as the template prints it": run.inputs.today} if run.inputs.today else {})
    for title, values in (("configuration", run.resolved), ("metrics", run.metrics), ("inputs", inputs)):
        lines += ["", title, *(f"  {name:40s} {metric_text(name, value)}" for name, value in values.items())]
    lines += [f"  {name:40s} {file.file} sha256 {file.sha256[:12]}" for name, file in run.artefacts.items()]
    screen.show("\n".join(lines))


def again(config: Rerun, screen: Screen) -> None:
    """Makes a run again; UserError where the numbers aren't the same."""
    from mechlens.studies.driver import rerun  # with it comes torch, without which the others answer at once

    compared = rerun(config.folder, config.out)
    same = compared.difference == 0
    screen.show(
        "the numbers are identical" if same else f"largest difference: {compared.difference:.3g} in {compared.name}"
    )
    if compared.difference > SAME:
        raise UserError(f"the numbers differ by more than {SAME:g}")


def index(config: IndexRuns, screen: Screen) -> None:
    """Writes the page and says where it is."""
    from mechlens.runs.index import write_index

    require_here(config.folder, "an index")
    screen.show(f"index: {write_index(config.folder).resolve()}")


def remove_superfluous(config: PruneRuns, screen: Screen) -> None:
    """Frees disk, run by run, and says what it freed."""
    from mechlens.runs.prune import prune

    require_here(config.folder, "runs to be pruned")
    done = prune(config.folder, dry=config.dry_run)
    for one in done:
        names = ", ".join(str(path.relative_to(one.folder)) for path in one.paths)
        screen.show(f"{one.folder}: {one.left}" if one.left else f"{one.folder}: {megabytes(one.freed)} ({names})")
    if not any(one.freed for one in done):
        screen.show("nothing to remove: caches are removed when a run succeeds")
        return
    total = megabytes(sum(one.freed for one in done))
    screen.show(f"{total} would be freed" if config.dry_run else f"{total} freed")


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:.1f} MB"


def compare(config: CompareRuns, screen: Screen) -> None:
    """What decides in each run, with its difference from the first, and what the runs differ in."""
    from rich.table import Table

    from mechlens.runs.results.compared import compare_runs

    found = compare_runs(*config.folders)
    for name, run in zip(found.names, found.runs, strict=True):
        screen.show(f"{name}: {run.sentence}")
    deciding = {number for run in found.runs for number in run.record.deciding}
    table = Table("number", *found.names)
    told = found.metrics[found.metrics["name"].isin(deciding)]
    for words, rows in told.groupby("words", sort=False):
        by_run = {row["run"]: row for row in rows.to_dict("records")}
        cells = {name: "\n".join(filter(None, found.in_words(row))) for name, row in by_run.items()}
        table.add_row(str(words), *(cells.get(name, "-") for name in found.names))
    screen.show(table)
    for _, row in found.differs.iterrows():
        screen.show(f"{row['of']} {row['name']}: {', '.join(str(row[name]) or 'none' for name in found.names)}")
    if config.out is not None:
        from mechlens.runs.results.compared_page import write_comparison

        require_here(config.out, "the comparison")
        screen.show(f"page: {write_comparison(found, config.out).resolve()}")
