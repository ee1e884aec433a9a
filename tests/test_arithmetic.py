"""Vector arithmetic is that of vectors, and what a sum was made of stays with it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from planted import CHECKPOINT

import mechlens as ml
from mechlens.methods.directions.direction import Direction, cosine, random_like

D_MODEL = 24


def made(seed: int, **changed: Any) -> Direction:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    whole = Direction(
        vector, level=2, position="last", site="resid", method="mean difference", contrast=("harmful", "harmless"),
        checkpoint=CHECKPOINT, template="planted", train_ids=(f"p{seed}", "shared"), residual_norm=3.0,
    )  # fmt: skip
    return replace(whole, **changed)


A, B = made(0), made(1, position="inst", contrast=("refused", "accepted"))
C = made(2)


def test_sums_are_sums_of_vectors() -> None:
    assert torch.equal((A + B).vector, A.vector + B.vector)
    assert torch.equal((A - B).vector, A.vector - B.vector)
    assert torch.equal((-A).vector, -A.vector)
    assert torch.equal((0.5 * A).vector, A.vector / 2)
    assert torch.equal((A / 4).vector, A.vector / 4)
    assert torch.equal((np.float64(0.5) * A).vector, (A * 0.5).vector)
    assert torch.allclose((A + 0.5 * B - 2 * C).vector, A.vector + 0.5 * B.vector - 2 * C.vector, atol=1e-6)
    assert (A / A.norm).norm == pytest.approx(1)
    assert sum([A, B, C]) == A + B + C
    with pytest.raises(ml.UserError, match="can't be divided by 0"):
        A / 0


def test_the_laws_of_a_vector_space_hold_to_the_bit() -> None:
    assert torch.equal((A + B).vector, (B + A).vector)
    assert (A + B) + C == A + (B + C)
    assert 2 * (A + B) == 2 * A + 2 * B
    # What comes back to one direction is that direction, its own method and contrast with it.
    assert (A + B) - B == A
    opposite = -A
    assert -opposite == A == 1 * A == A + A - A
    assert 4 * (A / 4) == A
    assert (A - A).norm == 0


def test_a_sum_says_what_it_is_made_of() -> None:
    found = 2 * (A - 0.5 * B)
    assert [weight for weight, _ in found.parts] == [2.0, -1.0]
    assert [one for _, one in found.parts] == [A, B]
    again = sum(weight * one.vector.double() for weight, one in found.parts)
    assert torch.equal(found.vector, again.float())
    assert repr(found) == (
        f"Direction(harmful - harmless at level 2, last; norm {found.norm:.4g}, d_model 24; "
        "2 (harmful - harmless, last) + -1 (refused - accepted, inst); planted, resid)"
    )
    # No number with it may come from a prompt of any part.
    assert found.train_ids == ("p0", "shared", "p1")
    assert (found.position, found.residual_norm) == (A.position, A.residual_norm)
    assert (-A).contrast == ("harmless", "harmful")
    assert random_like(found, 1, 0)[0].parts == ()


def test_merging_equal_ones_changes_nothing() -> None:
    assert ml.merge_directions([A, A, A]) == A
    assert ml.merge_directions([A]) == A
    assert torch.allclose(ml.merge_directions([A, B, C]).vector, (A.vector + B.vector + C.vector) / 3)
    weighted = ml.merge_directions([A, B], weights=[3, 1])
    assert torch.equal(weighted.vector, (0.75 * A + 0.25 * B).vector)
    assert weighted == 0.75 * A + 0.25 * B


@pytest.mark.parametrize("others", [(B,), (B, C), (B, 2 * B, C), (B + C, C)])
def test_what_is_projected_out_is_gone(others: tuple[Direction, ...]) -> None:
    rest = ml.project_out(A, *others)
    for one in others:
        assert abs(float(rest.unit.double() @ one.unit.double())) < 1e-6
    # Nothing else is: the rest and what was taken away make up the whole, and it lies in the span of the others.
    gone = (A - rest).vector.double()
    span = torch.stack([one.vector.double() for one in others], dim=1)
    assert torch.allclose(
        span @ torch.linalg.lstsq(span, gone[:, None], driver="gelsd").solution[:, 0], gone, atol=1e-6
    )
    assert ml.project_out(rest, *others).norm == pytest.approx(rest.norm)
    assert rest.contrast == A.contrast


def test_at_a_right_angle_nothing_is_taken_away() -> None:
    x, y = (replace(A, vector=torch.eye(D_MODEL)[i]) for i in range(2))
    assert ml.project_out(x, y) == x
    assert float(cosine(ml.project_out(x + y, y).vector, x.vector)) == pytest.approx(1)


def test_a_sum_is_saved_and_opened_whole(tmp_path: Path) -> None:
    for one in (A + 0.5 * B, ml.project_out(A, B, C), -A, ml.merge_directions([A, B, C])):
        again = ml.open(ml.save(one, tmp_path / "sum.safetensors"))
        assert again == one
        assert repr(again) == repr(one)
        assert again - one.parts[0][0] * A == one - one.parts[0][0] * A  # and can be calculated with


OTHER = replace(CHECKPOINT, name="other", fingerprint="v2-abc")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (made(3, checkpoint=OTHER), "different models (planted, raw, weights not known; other, raw, abc)"),
        (made(3, checkpoint=replace(CHECKPOINT, regime="processed")), "different models"),
        (made(3, template="paper"), "differ in chat template (planted and paper)"),
        (made(3, site="attn_out"), "differ in site (resid and attn_out)"),
        (made(3, level=3), "differ in level (2 and 3)"),
        (made(3, vector=torch.ones(8)), "differ in size (24 and 8)"),
        (made(3, vector=torch.ones(D_MODEL, dtype=torch.bfloat16)), "differ in type (float32 and bfloat16)"),
        (A.vector, "a Tensor was given as the direction"),
        (2, "an int was given as the direction"),
    ],
)
def test_what_can_not_be_added_is_said(other: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for whoever uses the package
    for sum_of in (lambda: A + other, lambda: A - other, lambda: ml.merge_directions([A, other])):
        with pytest.raises(ml.UserError, match=re.escape(said)):
            sum_of()
    with pytest.raises(ml.UserError, match=re.escape(said)):
        ml.project_out(A, other)


@pytest.mark.parametrize("factor", ["2", None, True, float("nan"), float("inf"), B])
def test_what_is_no_number_is_no_factor(factor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ml.UserError, match="multiplied by"):
        A * factor


def test_what_leaves_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ml.UserError, match="nothing is left of the direction"):
        ml.project_out(A, 3 * A)
    with pytest.raises(ml.UserError, match="nothing is left of the direction"):
        ml.project_out(A + B, A, B)
    with pytest.raises(ml.UserError, match="has length 0"):
        ml.project_out(A, 0 * B)
    with pytest.raises(ml.UserError, match="nothing was named"):
        ml.project_out(A)
    with pytest.raises(ml.UserError, match=r"2 weights came for 1 direction;"):
        ml.merge_directions([A], weights=[1, 2])
    with pytest.raises(ml.UserError, match="add up to 0"):
        ml.merge_directions([A, B], weights=[1, -1])
    for none in ([], A):
        with pytest.raises(ml.UserError, match="was given to merge"):
            ml.merge_directions(none)  # type: ignore[arg-type]
