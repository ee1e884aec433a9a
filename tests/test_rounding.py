"""The sentence about rounding stands where rounding is not small against the effect, and nowhere else."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer, words

from mechlens.cli import main
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.precision import Parity
from mechlens.runs.run import read_run
from mechlens.studies.shared.rounding import class_rounding, logit_rounding

PARITY = Parity("bfloat16", logits=0.125, tolerance=1.0, largest_logit=20.0, residual=0.01)
SAID = " The rounding of bfloat16 moves a logit by up to 0.12, which is not small against the shift "


def test_logits_against_effects_on_both_sides_of_the_tenth() -> None:
    assert logit_rounding(PARITY, {"the shift": Estimate(2.0, 1.0, 3.0, 20)}) == ""
    said = logit_rounding(PARITY, {"the shift": Estimate(0.5, 0.1, 0.9, 20)})
    assert said == f"{SAID}(0.9); --dtype float32 rounds less."
    # The interval decides: an effect of 0 that may be as large as 3 is not held up by rounding.
    assert logit_rounding(PARITY, {"the shift": Estimate(0.0, -3.0, 3.0, 20)}) == ""
    assert logit_rounding(PARITY, {"the shift": Estimate(-0.5, -0.9, -0.1, 20)}) == said
    # Of several, the one against which it is largest.
    both = {"the shift": Estimate(0.5, 0.1, 0.9, 20), "another": Estimate(1.0, 0.9, 1.1, 20)}
    assert logit_rounding(PARITY, both) == said
    assert logit_rounding(PARITY, {"the shift": Estimate.missing(3)}) == logit_rounding(None, both) == ""


def test_two_ways_that_agree_by_chance_are_still_rounded() -> None:
    """Half a unit in the last place of the largest logit is 2^-8 of it in bfloat16."""
    equal = replace(PARITY, logits=0.0, residual=0.0)
    assert "by up to 0.078," in logit_rounding(equal, {"the shift": Estimate.exact(0.7, 20)})
    assert logit_rounding(replace(equal, dtype="float32"), {"the shift": Estimate.exact(0.7, 20)}) == ""


def planted(distance: float, d_model: int = 400, length: float = 50.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of vectors of one length that lie a distance apart."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(d_model, generator=generator)
    values = (common / common.norm() * length).repeat(40, 1)
    positive = torch.arange(40) < 20
    away = torch.randn(d_model, generator=generator)
    values[positive] += away / away.norm() * distance
    return values, positive


@pytest.mark.parametrize(("distance", "shown"), [(5.0, False), (0.8, False), (0.7, True), (0.1, True)])
def test_classes_against_what_rounding_does_to_a_score(distance: float, shown: bool) -> None:
    """3 x 0.01 x 50 / sqrt(400) = 0.075 along any direction."""
    said = class_rounding(PARITY, {"the distance": planted(distance)})
    assert said.startswith(" The rounding of bfloat16 moves a score along a direction by up to 0.07") is shown
    assert (said == "") is not shown


def test_what_rounding_does_to_scores_is_what_the_rule_says() -> None:
    """Vectors that are really rounded to bfloat16: scores move by less than the bound, and not by much less."""
    values, _ = planted(5.0)
    rounded = values.bfloat16().float()
    share = float(((rounded - values).norm(dim=-1) / values.norm(dim=-1)).max())
    directions = torch.randn(200, 400, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=-1, keepdim=True)
    moved = ((rounded - values) @ directions.T).abs()
    bound = 3 * share * float(values.norm(dim=-1).median()) / math.sqrt(400)
    assert float((moved > bound).float().mean()) < 0.02
    assert float(moved.max()) > bound / 10


def test_a_class_that_nobody_is_in_says_nothing() -> None:
    values, positive = planted(0.1)
    assert class_rounding(PARITY, {"the distance": (values, torch.zeros_like(positive))}) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_records_its_parity_and_its_verdict_says_where_rounding_counts(dtype: str, tmp_path: Path) -> None:
    """A random model whose classes are all but alike to it: float32 tells them apart, bfloat16 only just."""
    tiny_hf().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = words(40)
    for name, part in (("one", texts[:20]), ("other", texts[20:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"the same long words before it {text}" for text in part))
    main([
        "direction", "--positive", str(tmp_path / "one.txt"), "--negative", str(tmp_path / "other.txt"),
        "--model", str(tmp_path / "model"), "--dtype", dtype, "--positions", "last", "--resamples", "50",
        "--permutations", "20", "--wandb.mode", "disabled", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    run = read_run(tmp_path / "run")
    assert run.dtype == dtype
    assert run.parity is not None
    assert run.parity.dtype == dtype
    assert run.parity.logits <= run.parity.tolerance
    assert run.verdict is not None
    assert ("The rounding of bfloat16 moves a score" in run.verdict) is (dtype == "bfloat16")
    assert "Apart from plain Hugging Face, same dtype" in (tmp_path / "run" / "report.html").read_text()
