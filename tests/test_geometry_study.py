"""The geometry study: verdicts on planted worlds, laws of what they stand on, and a whole run over checkpoints."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from planted_shapes import PAIRS, SHAPES, planted_pair, planted_shape
from saved import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechlens.errors import UserError
from mechlens.methods.geometry.similarity.in_place import jackknifed, representation_change
from mechlens.methods.geometry.subspaces.beyond_one import beyond_one_direction, erased
from mechlens.settings import WandbSettings
from mechlens.studies.driver import run
from mechlens.studies.geometry.config import MeasureGeometry
from mechlens.studies.geometry.study import prepare
from mechlens.studies.geometry.verdict import INCONCLUSIVE, NOT_MEASURABLE, dimension_verdict

OFF = WandbSettings(mode="disabled")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- what the verdicts stand on --------------------------------------------------------------------------------------


def test_nothing_linear_is_left_once_the_mean_difference_is_erased() -> None:
    values, positive = draw(60, 12), torch.arange(60) < 30
    values[positive] += draw(12, seed=1)
    line = values[positive].mean(dim=0) - values[~positive].mean(dim=0)
    left = erased(values, values.mean(dim=0), line)
    assert float((left @ line).abs().max()) < 1e-12
    assert torch.allclose(left.norm(dim=1), torch.ones(60, dtype=torch.float64))


def test_what_is_left_changes_with_no_rotation_and_no_scale() -> None:
    values, positive, families = draw(40, 60), torch.arange(40) < 20, [str(i) for i in range(40)]
    values[:20, :3] *= 4
    turned = 7 * values @ torch.linalg.qr(draw(60, 60, seed=2)).Q + 5
    one, other = (
        beyond_one_direction(own, positive, families, k=3, random=1, seed=0, words=own) for own in (values, turned)
    )
    assert other.left.value == pytest.approx(one.left.value, abs=0.01)
    assert other.line.value == pytest.approx(one.line.value, abs=0.01)
    assert one.beyond_words.value == 0  # beside itself


def test_a_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = draw(20)
    found = jackknifed(lambda rows: float(values[rows].mean()), [str(i) for i in range(20)])
    assert (found.high - found.value) / 2.09 == pytest.approx(float(values.std()) / 20**0.5)


def test_shape_is_kept_by_a_rotation_and_place_by_a_scale_alone() -> None:
    values, families = draw(50, 8), [str(i) for i in range(50)]
    turned = representation_change(values, values @ torch.linalg.qr(draw(8, 8, seed=1)).Q, families)
    scaled = representation_change(values, 3 * values - 1, families)
    narrow = representation_change(values, values[:, :5], families)
    assert turned.shape.value == pytest.approx(1)
    assert abs(turned.in_place.value) < 0.6
    assert scaled.in_place.value == pytest.approx(1)
    assert not narrow.in_place.measurable
    with pytest.raises(UserError, match="50 and 40 prompts"):
        representation_change(values, values[:40], families)


# --- the verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_no_planted_shape_gets_a_wrong_word(name: str) -> None:
    world, right = SHAPES[name]
    assert planted_shape(world, 0, 64, random=1).word in (right, INCONCLUSIVE)


@pytest.mark.parametrize("name", PAIRS)
def test_every_planted_pair_gets_its_word(name: str) -> None:
    assert planted_pair(name, 0, 48).word == PAIRS[name][1]


def test_too_few_prompts_are_not_measurable() -> None:
    found = dimension_verdict("harmful", None)
    assert found.word == NOT_MEASURABLE
    assert "too few prompts are harmful" in str(found.headline)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("geometry")
    save_model(folder / "model")
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    other.save_pretrained(folder / "tuned" / "checkpoint-5")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "tuned" / "checkpoint-5")
    config = MeasureGeometry(
        model=str(folder / "model"), checkpoints=(str(folder / "tuned"),), n=12, levels=(0, 3), ranks=(1,),
        random_subspaces=1, shuffles=3, matched=1, dimensions=2, edited=2, ablated=1, max_new_tokens=2,
        out=folder / "run", wandb=OFF,
    )  # fmt: skip
    return folder / "run", run(config)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def test_a_whole_run_leaves_its_numbers(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "success"
    concepts = table(out, "concepts")
    assert set(concepts[concepts["concept"] == "harmful"]["step"]) == {0, 5}
    collapse = table(out, "collapse")
    assert (collapse[["nc1_trace", "nc1_svd", "nc1_cdnv", "nc1_quotient"]] >= 0).all(axis=None)
    # Where the answer starts, every prompt has the same token, so at the embedding nothing varies.
    assert set(collapse[collapse["position"] != "inst"]["level"]) == {3}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Geometry of" in page
    assert "The same, rotated, or other" in page


def test_a_checkpoint_that_hardly_moved_is_the_same(finished: tuple[Path, Any]) -> None:
    out, found = finished
    changes = table(out, "changes")
    assert (changes["in_place"] > 0.9).all()
    assert "checkpoint-5 beside the first model" in found.verdict
    matching = table(out, "matching").set_index("units")
    assert set(matching.index) == {"neurons", "heads"}
    assert (matching["identity_rate"] > 0.9).all()
    assert (matching["matched"] > matching["chance"]).all()
    moved = table(out, "collapse").query("step == 5")
    assert moved["moved_within"].between(0, 0.3).all()


def test_what_the_model_does_without_a_subspace_stands_beside_random_ones(finished: tuple[Path, Any]) -> None:
    out, found = finished
    ablated = table(out, "ablated").query("concept == 'harmful'")
    assert (ablated["k"] == 1).all()
    assert (ablated["gain"] == 0).all()  # beyond one dimension there is none
    assert (ablated["random_lowest"] <= ablated["random_mean"] + 1e-9).all()
    metrics = found.metrics.set_index("name")["value"]
    assert metrics["ablated.harmful.1"] == pytest.approx(ablated["shift"].item())
    with pytest.raises(UserError, match="taken out of the residual stream, and site is attn_out"):
        MeasureGeometry(model="smollm2", ablated=4, site="attn_out", out=out)


def test_units_of_a_checkpoint_that_hardly_moved_are_predicted_by_one_and_share_all_groups(
    finished: tuple[Path, Any],
) -> None:
    out, _ = finished
    sparse, groups = table(out, "sparse"), table(out, "groups").set_index("units")
    assert (sparse["r2"] > sparse["chance"]).all()
    assert (sparse["needed"] <= 2).all()
    assert set(groups.index) == {"neurons", "heads"}
    assert (groups["shared"] >= groups["chance"]).all()
    assert groups.loc["neurons", "shared"] > 0.9
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Groups of units, many to many" in page
    assert "share that one says" in page


def test_what_the_checkpoint_changed_stands_by_matrix(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    edits, components = table(out, "edits"), table(out, "components")
    assert (edits["rank_one_share"] * edits["stable_rank"]).tolist() == pytest.approx([1.0] * len(edits))
    assert (edits["effective_rank"] >= edits["stable_rank"] * 0.999).all()
    assert set(components["matrix"]) == set(edits.nlargest(2, "norm")["matrix"])


def test_checkpoints_stand_beside_no_other_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoints are compared with their base, and other was given"):
        MeasureGeometry(model="smollm2", checkpoints=("runs/tuned",), other="smollm2-refuser", out=tmp_path)


def test_another_model_is_prepared_beside_the_first_and_must_differ(tmp_path: Path) -> None:
    save_model(tmp_path / "one")
    save_model(tmp_path / "two")
    plan: dict[str, Any] = {"model": str(tmp_path / "one"), "out": tmp_path / "run", "wandb": OFF}
    given = prepare(MeasureGeometry(other=str(tmp_path / "two"), n=6, **plan))
    assert [one.name for one in given.content.subjects] == ["one", "two"]
    assert given.content.swapper is None
    with pytest.raises(UserError, match="both models are one"):
        prepare(MeasureGeometry(other=str(tmp_path / "one"), n=6, **plan))
    with pytest.raises(UserError, match="there are 10 prompts, and nothing is compared by fewer than 12"):
        prepare(MeasureGeometry(n=5, **plan))
