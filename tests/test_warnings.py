"""Warnings name the line of whoever called the package, however deep in it the trouble was found."""

import warnings
from pathlib import Path

import torch

import mechlens as ml
from mechlens import errors


def test_a_warning_names_the_callers_line_through_several_files_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("a\na\nb\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ml.load_prompts(tmp_path / "twice.txt")
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    assert "ml.load_prompts" in Path(__file__).read_text().splitlines()[told[0].lineno - 1]


def test_a_function_wrapped_by_torch_is_not_the_caller() -> None:
    deep = {"__name__": "mechlens.studies.deep", "torch": torch, "warn": errors.warn}
    exec("def inner():\n    warn('found')\n@torch.no_grad()\ndef outer():\n    inner()\n", deep)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        deep["outer"]()
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
