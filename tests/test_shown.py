"""Results show themselves in a few lines, whatever their size, and in a notebook with a table of escaped text."""

import ast
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from planted import CHECKPOINT, planted_activations
from shown import require_shown

import mechlens as ml
from mechlens.methods.shown import cut, few, html_with, lines
from mechlens.methods.steering.steering import SteeredAnswers
from mechlens.models.bridge import Loaded

PACKAGE = Path(ml.__file__).parent
EVIL = "<script>alert(1)</script> & more\n" * 20
N, LEVELS, POSITIONS = 500, 31, ("inst", *(f"post[{k}]" for k in range(12)))


def test_large_results_are_a_few_lines() -> None:
    acts = planted_activations(separation=2.0, n_per_class=N // 2, n_levels=LEVELS, d_model=4, positions=POSITIONS).acts
    acts = replace(acts, last=POSITIONS[-1])
    grid = ml.direction_grid(acts, "harmful", "harmless")
    split = ml.split_by_family(acts.labels, acts.families)
    small = replace(acts, values=acts.values[:, :2], levels=(0, 1)).select(range(60))
    plan = ml.DetectionPlan(resamples=10, permutations=5, random_directions=2)
    found = ml.detect(small, "harmful", "harmless", ml.split_by_family(small.labels, small.families), plan)
    require_shown(acts, grid, grid.at(3, "inst"), split, found, found.at("inst"), CHECKPOINT)
    require_shown(ml.centroids(acts, "harmful", "harmless", "inst"), ml.residual_norms(acts))
    assert "prompt 500, level 31, position 13, d_model 4" in repr(acts)
    assert "250 harmful, 250 harmless" in repr(acts)
    assert repr(grid.at(3, "inst")).startswith("Direction(harmful - harmless at level 3, inst; norm ")
    best = found.at("inst")
    told = f"inst: level {best.level}, permutation p {best.permutation.p:.2g}, test AUROC {best.auroc}"
    assert told in repr(found)
    assert "and: 5 more" in repr(found)


def test_what_a_prompt_or_an_answer_says_is_cut_and_escaped() -> None:
    ids = tuple(f"p{i}" for i in range(N))
    asked = tuple(ml.Prompt(name, EVIL, "harmful") for name in ids)
    said = ml.Answers(ids, (EVIL,) * N, ((1, 2),) * N, 8, CHECKPOINT, "t", "fast")
    steered = SteeredAnswers(("p0",) * 4, (EVIL,) * 4, ((1,),) * 4, 8, CHECKPOINT, "t", "fast", interventions=((),) * 4)
    judged = ml.JudgedAnswers(asked, said, {"phrases": ("refused", "accepted") * (N // 2)})
    values = torch.rand(N, 4, 2, 1)
    patched = ml.PatchResult(
        values, torch.ones(N), torch.zeros(N), ids, ids, (0, 1, 2, 3), ("inst", "last"), (), (EVIL, EVIL),
        "resid_pre", "log-odds", "denoising", "plain",
    )  # fmt: skip
    require_shown(said, steered, judged, patched)
    assert "&lt;script&gt;" in said._repr_html_()
    assert "and: 497 more" in repr(said)
    assert repr(steered).count("\n") == 4  # of one prompt, each answer has its line
    recovery = patched.table(seed=0, resamples=2, n_flips=1)["recovery"].max()
    assert f"recovery {recovery:.3f}".rstrip("0") in repr(patched)
    assert "250 refused harmful, 250 accepted harmful" in repr(judged)


def test_a_column_s_numbers_have_as_many_decimals() -> None:
    table = pd.DataFrame(
        {"share": [0.5, 0.48, math.nan], "n": [3, 4, 5], "wide": [1e-6, 3.0, 1e5], "mixed": [1.0, "x", None]}
    )
    page = html_with("A", table)
    assert [re.findall(rf"<td>({cell})</td>", page) for cell in ("0.500", "0.480", "0.5", "0.48")] == [
        ["0.500"], ["0.480"], [], [],
    ]  # fmt: skip
    assert page.count("<td>–</td>") >= 1
    shown = re.findall(r"<td>([^<]*)</td>", page)
    assert {len(cell.partition(".")[2]) for cell in shown[::4] if cell != "–"} == {3}


def test_prompts_without_a_label_are_not_said_to_have_one() -> None:
    acts = planted_activations(separation=1.0, n_per_class=3, n_levels=2, d_model=4, positions=("inst",)).acts
    assert "labels" not in repr(replace(acts, labels=("",) * 6))
    assert "labels: 3 harmful, 3 without one" in repr(
        replace(acts, labels=("harmful", "", "harmful", "", "", "harmful"))
    )


def test_no_public_class_prints_its_tensors() -> None:
    public = set(re.findall(r" as (\w+)", (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")))
    classes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in public
    ]
    large = {
        one.name: [
            ast.unparse(field)
            for field in one.body
            if isinstance(field, ast.AnnAssign)
            and re.search("^(?!Callable).*(Tensor|DataFrame)", ast.unparse(field.annotation))
            and "repr=False" not in ast.unparse(field)
        ]
        for one in classes
    }
    methods = {one.name: {item.name for item in one.body if isinstance(item, ast.FunctionDef)} for one in classes}
    own = {name for name, defined in methods.items() if "__repr__" in defined}
    assert len(own) > 20
    assert {name: fields for name, fields in large.items() if fields and name not in own} == {}


def test_what_is_kept_on_a_model_is_a_line() -> None:
    class Tokenizer:
        def __repr__(self) -> str:
            return "every token there is" * 1000

    told = repr(Loaded(CHECKPOINT, Tokenizer(), "sdpa", None, "w"))
    assert "every" not in told
    assert len(told) < 200
    assert CHECKPOINT.name in told


def test_lines_are_cut_and_lists_have_an_end() -> None:
    assert lines("A", {"b": 1, "c": "", "d": "x " * 200}).splitlines()[:2] == ["A", "  b: 1"]
    assert cut("a  b\nc") == "a b c"
    assert len(cut("x" * 500)) == 120
    assert few(range(31)) == "0, 1, 2, 3 ... 30 (31)"
    assert few((1, 2)) == "1, 2"


def test_a_directions_help_says_how_it_is_kept() -> None:
    assert "ml.save(direction, " in str(ml.Direction.__doc__)
    assert "ml.open(" in str(ml.Direction.__doc__)
