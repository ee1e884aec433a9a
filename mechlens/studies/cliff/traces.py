"""Reasoning traces from a file: what was asked, thought and answered, and whether the request was harmful."""

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.activations.trace_tokens import Trace
from mechlens.prompts.files.from_row import RowReader, require_column, text_of
from mechlens.prompts.files.rows import read_rows, row_ids

HARMFUL, HARMLESS = "harmful", "harmless"


def read_traces(path: str) -> list[Trace]:
    """The traces of a file; UserError naming file and row for what is none."""
    file = user_path(path)
    rows = read_rows(file)
    columns = tuple(dict.fromkeys(key for row in rows for key in row.values))
    for wanted in ("thinking", "answer", "label"):
        require_column(columns, wanted, file.name)
    reader = RowReader(file.name, columns, None, "label", "family" if "family" in columns else None)
    ids, traces = row_ids(rows, file.stem), []
    for row in rows:
        where = f"{file.name} row {row.number}"
        thinking, said = (
            text_of(row.values.get(name), f"{where}, column {name!r},").strip() for name in ("thinking", "answer")
        )
        prompt = reader(row, ids[row.number])
        if prompt.label not in (HARMFUL, HARMLESS):
            raise UserError(f"{where} is labelled {prompt.label!r}; its label must be {HARMFUL} or {HARMLESS}")
        traces.append(Trace(prompt, thinking, said))
    return traces
