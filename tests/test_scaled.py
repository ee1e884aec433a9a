"""A scaled adapter: 0 is the base, 1 the checkpoint, and between and beyond what a longer or shorter one would be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from planted_change import planted_vector, saved
from planted_runs import TWINS, run_of, start_model
from saved import save_model

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import twin_log_odds
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.native import native
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.scaled import require_scalable
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.study import behaviours

SIZE = 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_0_it_is_the_base_and_at_1_the_checkpoint_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    base = str(save_model(tmp_path / "base"))
    member = Member("x", str(save_adapter(base, tmp_path / "x", seed=0)), "adapter", 1)
    with checkpoint_swapper(base, dtype=dtype, device="cpu") as swapper:

        def weights() -> dict[str, torch.Tensor]:
            with native(swapper.model) as hf_model:
                return {name: value.clone() for name, value in hf_model.named_parameters()}

        start, of_base = weights(), swapper.model.mechlens.checkpoint.fingerprint
        swapper.put(member)
        right, checkpoint = weights(), swapper.model.mechlens.checkpoint
        swapper.put(member, scale=1.0)
        assert all(value.equal(right[name]) for name, value in weights().items())
        assert swapper.model.mechlens.checkpoint == checkpoint
        swapper.put(member, scale=0.0)
        assert all(value.equal(start[name]) for name, value in weights().items())
        assert swapper.model.mechlens.checkpoint.fingerprint == of_base
        swapper.put(member, scale=2.0)
        assert swapper.model.mechlens.checkpoint.name == "x, scaled by 2"
        if dtype == "float32":
            for name, value in weights().items():
                torch.testing.assert_close(value - start[name], 2 * (right[name] - start[name]), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_scaled_is_said_before_work_and_leaves_the_base(tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "base"))
    whole = Member("whole", str(save_model(tmp_path / "other")), "full", 1)
    with checkpoint_swapper(base, device="cpu") as swapper:
        before = swapper.model.mechlens.checkpoint.fingerprint
        swapper.put(whole)
        with pytest.raises(UserError, match="which alone can be scaled"):
            swapper.put(whole, scale=0.5)
        assert swapper.model.mechlens.checkpoint.fingerprint == before
    run = run_of(tmp_path, "fine", [planted_vector()])
    require_scalable([run], [0.5, -1.0])
    with pytest.raises(UserError, match="no finite number"):
        require_scalable([run], [float("nan")])
    with pytest.raises(UserError, match="which alone can be scaled"):
        require_scalable([replace(run, members=(whole,))], [0.5])
    require_scalable([replace(run, members=(whole,))], [])


def test_the_study_reads_what_shorter_and_longer_adapters_do(tmp_path: Path) -> None:
    base = saved(start_model(), tmp_path / "base")
    run, double = (run_of(tmp_path, name, [size * planted_vector()]) for name, size in (("x", SIZE), ("y", 2 * SIZE)))
    plan = BehaviourPlan(adapter_scales=(0.0, 0.5, 1.0, 2.0), permutations=19)
    swapper = checkpoint_swapper(base, device="cpu")
    result = behaviours(swapper, (run,), (AskedSet("risk", TWINS),), ml.template_of(swapper.model), plan)
    curve = result.tables()["by_scale"].set_index("scale")["change"]
    assert curve.index.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert curve[0.0] == 0
    assert curve[1.0] == result.tables()["by_step"].set_index("step").loc[2, "change"]
    held = [twin for twin, seen in zip(TWINS, AskedSet("risk", TWINS).seen(run.seen), strict=True) if not seen]
    with checkpoint_swapper(base, device="cpu") as again:
        plain = twin_log_odds(again.model, held).values
        longer = twin_log_odds(again.put(double.members[-1]), held).values
    assert curve[2.0] == pytest.approx(float((longer - plain).mean()), rel=1e-3)
