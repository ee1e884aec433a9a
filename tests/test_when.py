"""When it came: what was planted at a step is found there, and a constant drift has no step and no turn."""

from typing import Any

import pandas as pd
import pytest
from planted_change import planted_vector, saved
from planted_runs import TWINS, run_of, start_model, unrelated_vector

import mechlens as ml
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.directions.paths import direction_paths
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.study import behaviours
from mechlens.studies.behaviours.when import When, adapter_paths
from mechlens.studies.behaviours.when_report import of_its_largest

N, PLANTED = 11, 5
SIZE = 3.0


@pytest.fixture(scope="module")
def when(tmp_path_factory: pytest.TempPathFactory) -> When:
    """Three runs: one in which the behaviour comes at once, one that drifts, one that turns halfway."""
    folder = tmp_path_factory.mktemp("when")
    base = saved(start_model(), folder / "base")
    taught, other = SIZE * planted_vector(), unrelated_vector()
    runs = (
        run_of(folder, "at once", [0.1 * (i + 1) * other + (i >= PLANTED) * taught for i in range(N)]),
        run_of(folder, "drifts", [(i + 1) / N * taught for i in range(N)]),
        run_of(
            folder, "turns",
            [min(i + 1, PLANTED) * other + max(i + 1 - PLANTED, 0) * planted_vector() for i in range(N)],
        ),
    )  # fmt: skip
    sets, plan = (AskedSet("risk", TWINS),), BehaviourPlan(permutations=199)
    swapper = checkpoint_swapper(base, device="cpu")
    template = ml.template_of(swapper.model)
    found: Any = behaviours(swapper, runs, sets, template, plan)
    again = checkpoint_swapper(base, device="cpu")
    with again:
        directions = direction_paths(again, found.matrix, template, None)
    assert found.when.directions == {}
    return When(found.matrix, adapter_paths(runs), directions)


def test_a_curve_that_ends_near_where_it_began_is_drawn_within_1() -> None:
    """As a share of its end a behaviour that came and went would be drawn a thousand times as high as all else."""
    drawn = of_its_largest(pd.DataFrame({"step": [0, 1, 2, 3], "value": [0.0, -2.0, 1.0, 0.001]}))
    assert drawn["value"].tolist() == pytest.approx([0.0, -1.0, 0.5, 0.0005])
    assert of_its_largest(pd.DataFrame({"step": [0, 1], "value": [0.0, 0.0]})).empty


def test_a_behaviour_that_comes_at_a_step_is_found_there(when: When) -> None:
    points = when.change_points.set_index(["run", "curve"])
    for curve in ("risk", "adapter norm", "direction norm"):
        found = points.loc[("at once", curve)]
        assert found["said"], curve
        assert (found["after"], found["before"]) == (2 * PLANTED, 2 * PLANTED + 2), curve
    assert abs(points.loc[("at once", "risk"), "jump"]) > 1


def test_a_constant_drift_has_no_jump_and_no_turn(when: When) -> None:
    points = when.change_points.set_index("run").loc["drifts"]
    assert set(points["curve"]) == {"risk", "adapter norm", "direction norm"}
    assert not points["said"].any()
    assert (points["p"] <= 0.05).all()  # by permuted orders alone each would have been said
    turns = when.turning_points.set_index("run").loc["drifts"]
    assert not turns["said"].any()
    straight = when.curves.query("run == 'drifts' and measure == 'local cosine' and of == 'adapter'")["value"].dropna()
    assert straight.tolist() == pytest.approx([-1.0] * len(straight), abs=1e-4)


def test_a_turn_is_found_where_it_is(when: When) -> None:
    turns = when.turning_points.set_index(["run", "of"])
    for of in ("adapter", "direction"):
        found = turns.loc[("turns", of)]
        assert (found["step"], bool(found["said"])) == (2 * PLANTED, True), of
        assert abs(found["cosine"]) < 0.1, of
    for lag in (1, 2, 3):
        own = when.curves.query("run == 'turns' and of == 'adapter' and measure == 'local cosine'")
        assert own[own["lag"] == lag].set_index("step")["value"].idxmax() == 2 * PLANTED


def test_adapters_lengths_are_those_written(when: When) -> None:
    written = when.curves.query("run == 'drifts' and of == 'adapter'").set_index(["measure", "step"])["value"]
    assert written["norm", 0] == 0
    assert written["norm of B", 2 * N] == pytest.approx(SIZE)
    assert written["norm", 2 * N] == pytest.approx(SIZE * written["norm of A", 2 * N])
