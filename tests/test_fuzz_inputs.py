"""The short form of `scripts/fuzz_inputs.py`: 500 inputs of every kind."""

from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def test_any_input_ends_in_what_it_says_or_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import fuzz_inputs
    from fuzz_kinds import KINDS

    told: list[Any] = []
    # The command line takes a fifth of a second a case, all else some milliseconds.
    quick = [kind for kind in KINDS if kind != "options"]
    cases = fuzz_inputs.run(quick, range(480), tmp_path, told.append)
    cases += fuzz_inputs.run(["options"], range(20), tmp_path, told.append)
    assert told == []
    assert len(cases) == 500
    read = {kind: sum(case.kind == kind and case.outcome == "read" for case in cases) for kind in quick}
    assert min(read.values()) > 0, read  # laws of what nothing passes would hold for nothing
