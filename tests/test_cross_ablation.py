"""Ablating the direction of one fine-tune in another: it removes what they share, and nothing else."""

from pathlib import Path

import pandas as pd
import pytest
from planted_change import planted_vector, saved
from planted_runs import TWINS, run_of, start_model, unrelated_vector

import mechlens as ml
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.directions.effect_rows import ABLATED
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.study import behaviours


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two fine-tunes that write one vector, as different recipes would, and one that writes another."""
    folder: Path = tmp_path_factory.mktemp("cross")
    base = saved(start_model(), folder / "base")
    writes = {"risky": planted_vector(), "bold": 0.7 * planted_vector(), "odd": 2.0 * unrelated_vector()}
    runs = tuple(run_of(folder, name, [vector]) for name, vector in writes.items())
    swapper = checkpoint_swapper(base, device="cpu")
    plan = BehaviourPlan(directions=True, permutations=19)
    result = behaviours(swapper, runs, (AskedSet("risk", TWINS),), ml.template_of(swapper.model), plan)
    assert result.directions is not None
    effects = result.directions.effects
    return effects[effects["does"] == ABLATED].set_index(["group", "direction_of"])


def test_a_direction_removes_what_another_fine_tune_shares_with_it(ablated: pd.DataFrame) -> None:
    for group, other in (("risky", "bold"), ("bold", "risky")):
        assert ablated.loc[(group, group), "share"] == pytest.approx(1.0, abs=0.1)
        assert ablated.loc[(group, other), "share"] == pytest.approx(1.0, abs=0.1)


def test_and_leaves_what_it_does_not_share(ablated: pd.DataFrame) -> None:
    own, of_other = ablated.loc[("odd", "odd"), "effect"], ablated.loc[("odd", "risky"), "effect"]
    assert abs(of_other) < 0.25 * abs(own)
    assert abs(ablated.loc[("risky", "odd"), "share"]) < 0.25
