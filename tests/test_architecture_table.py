"""The table of what each architecture can do is what is measured, and nothing in it is wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, MORE

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "mechlens" / "models" / "ARCHITECTURES.md"
CHECKED = ("llama", "gpt2", "bloom", "granite", "deepseek_v3", "lfm2", "jamba", "mamba", "qwen3_next_linear", "gemma4",
           "recurrent_gemma", "codegen")  # fmt: skip


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "architectures", raising=False)
    import architectures

    return architectures


@pytest.mark.parametrize("name", CHECKED)
def test_a_row_is_what_is_measured(name: str, architectures: Any) -> None:
    if architectures.versions() not in TABLE.read_text(encoding="utf-8"):
        pytest.skip("the table was measured with other versions")
    cells = architectures.row(name)
    row = architectures.readme_table.row((name, *(cells.get(column, "") for column in architectures.COLUMNS)))
    assert row in TABLE.read_text(encoding="utf-8").splitlines(), f"run scripts/architectures.py; measured: {row}"


def test_the_table_has_every_architecture_and_no_wrong_number() -> None:
    text = TABLE.read_text(encoding="utf-8")
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert names == sorted({**CONFIGS, **MORE})
    assert "WRONG" not in text
