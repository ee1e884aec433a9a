"""Where the command `mechlens` begins, before anything else is imported: Ctrl-C has one line from the first moment."""

import os
import signal
from typing import Any

STOPPED = b"mechlens: stopped\n"


def main() -> None:
    """Imports the command line and runs it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell that runs us in the background has it ignored
        # Imports may swallow a KeyboardInterrupt or turn it into an error of theirs, and there is nothing to tidy yet.
        signal.signal(signal.SIGINT, _leave)
    from mechlens.cli import interrupted
    from mechlens.cli import main as run

    if before is not signal.default_int_handler:
        run()
        return
    signal.signal(signal.SIGINT, interrupted)
    try:
        run()
    finally:
        # Others tidy up now; a further Ctrl-C ends that at once and silently.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave(*_: Any) -> None:
    os.write(2, STOPPED)
    os._exit(130)


if __name__ == "__main__":
    main()
