"""The table of what each architecture can do is what is measured, and nothing in it is wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, MORE

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "mechlens" / "models" / "engine" / "README.md"
CHECKED = ("llama", "gpt2", "bloom", "granite", "deepseek_v3", "lfm2", "jamba", "mamba", "qwen3_next_linear", "gemma4",
           "recurrent_gemma", "codegen")  # fmt: skip


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "architectures", raising=False)
    import architectures

    return architectures


def lines() -> dict[str, str]:
    """The tables' lines by their first cell."""
    text = README.read_text(encoding="utf-8")
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("name", CHECKED)
def test_a_row_is_what_is_measured(name: str, architectures: Any) -> None:
    if architectures.versions() not in README.read_text(encoding="utf-8"):
        pytest.skip("the table was measured with other versions")
    cells = architectures.row(name)
    assert "WRONG" not in str(cells)
    # What rounding is left differs from one machine to the next; parts on the disk are tested elsewhere.
    written = [cell.strip() for cell in lines()[name].split("|")[2:-1]]
    if "refused" not in cells:
        for column in (*architectures.NUMBERS, "on the disk"):
            cells[column] = written[architectures.COLUMNS.index(column)]
    assert architectures.line(name, cells) == lines()[name], "run scripts/architectures.py"


def test_everything_that_both_libraries_know_is_there_and_no_number_is_wrong(architectures: Any) -> None:
    text = README.read_text(encoding="utf-8")
    assert {**CONFIGS, **MORE}.keys() <= lines().keys()
    tried = {architectures.causal(make()) for make in {**CONFIGS, **MORE}.values()}
    assert [name for name in architectures.known_to_both() if name not in tried and name not in text] == []
    assert "WRONG" not in text


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_a_refusal_is_what_is_said(name: str, architectures: Any) -> None:
    assert f"- *{architectures.refusal(name).replace(name, 'NAME')}*: " in README.read_text(encoding="utf-8")
