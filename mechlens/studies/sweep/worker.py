"""A process that does some of a sweep's jobs: `python -m mechlens.studies.sweep.worker FOLDER ...`.

It ends with the process that started it, which holds the other end of its standard input.
"""

import sys
import traceback
from pathlib import Path

from mechlens.errors import UserError
from mechlens.studies.sweep.engines.parent import end_with_parent
from mechlens.studies.sweep.folders import is_helper, note_failure, read_job


def work_on(folders: list[Path]) -> None:
    """Does every job, whatever becomes of the others; a failure is a sentence in the sweep's folder."""
    # Here, so that a worker whose parent is gone ends before they are imported, which takes seconds.
    from mechlens.methods.kept_model import keeping_model
    from mechlens.studies.driver import do

    with keeping_model():
        for folder in folders:
            if is_helper(folder):
                _help(folder)
                continue
            try:
                do(read_job(folder).config)
            except UserError as error:
                note_failure(folder, error.typed)
            except Exception as error:
                traceback.print_exc()
                note_failure(folder, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300])


def _help(name: Path) -> None:
    """What befalls a helper is no failure of the job, which does without."""
    from mechlens.studies.sweep.shards import help_with

    try:
        help_with(name)
    except Exception:
        traceback.print_exc()


def main() -> None:
    """Entry point."""
    end_with_parent()
    work_on([Path(given) for given in sys.argv[1:]])


if __name__ == "__main__":
    main()
