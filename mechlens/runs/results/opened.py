"""`ml.open`: whatever mechlens left on the disk, as what it is."""

import os
from typing import Any

from mechlens.errors import UserError
from mechlens.runs.remote.copies import copy_of
from mechlens.runs.remote.store import local_path
from mechlens.runs.results.result import open_run_folder
from mechlens.runs.results.saved import ENDING, open_file
from mechlens.runs.run import RUN_FILE
from mechlens.runs.vectors.foreign_vectors import read_refusal_direction


def open(path: str | os.PathLike[str]) -> Any:
    """A run folder as its `RunResult`; a file that `save` or a run wrote as the object; others' directions as ours.

    UserError, in one sentence, for anything else.

    >>> run = ml.open("runs/first")
    >>> run.sentence == run.record.sentence
    True
    """
    place = copy_of(local_path(path))
    if not place.is_dir():
        if place.name == RUN_FILE and place.is_file():
            return open_run_folder(place.parent)
        if not place.exists():
            raise UserError(f"there is no {place}; give a run folder, or a file that `save` wrote")
        return open_file(place)
    if (place / RUN_FILE).exists():
        return open_run_folder(place)
    if (place / "direction.pt").exists():
        return read_refusal_direction(place)
    below = sorted(found.parent.name for found in place.glob(f"*/{RUN_FILE}"))
    hint = f"it holds the runs {', '.join(below[:5])}" if below else f"give a run folder, or a {ENDING} file"
    raise UserError(f"{place} is no run folder (there is no {RUN_FILE}); {hint}")
