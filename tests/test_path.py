"""The way over training: turns are where they were planted, a constant drift has none, adapters are read unmerged."""

import math
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from planted_when import CURVES
from saved import save_model
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.directions.adapter_path import adapter_path
from mechlens.methods.directions.path import local_cosines, turning_point
from mechlens.methods.statistics.change_point import change_point
from mechlens.models.checkpoints.lora import read_lora

STEPS = list(range(0, 24, 2))


def noise(seed: int, scale: float) -> Tensor:
    drawn = torch.randn(len(STEPS), 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * drawn / 8


def drift(corner: int | None) -> Tensor:
    """One unit a checkpoint along a first axis, from the corner on along a second one."""
    at = torch.arange(len(STEPS), dtype=torch.float64)
    path = torch.zeros(len(STEPS), 64, dtype=torch.float64)
    path[:, 0] = at if corner is None else at.clamp(max=corner)
    path[:, 1] = 0.0 if corner is None else (at - corner).clamp(min=0)
    return path


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_local_cosines_are_those_of_the_vectors(lag: int) -> None:
    path = drift(5) + noise(0, 0.5)
    found = local_cosines(path @ path.T, lag)
    for t in range(len(STEPS)):
        if lag <= t < len(STEPS) - lag:
            back, forth = path[t - lag] - path[t], path[t + lag] - path[t]
            assert float(found[t]) == pytest.approx(float(torch.cosine_similarity(back, forth, dim=0)), abs=1e-9)
        else:
            assert found[t].isnan()
    clean = drift(5)
    sharpest = local_cosines(clean @ clean.T, lag).nan_to_num(nan=-2.0)
    assert int(sharpest.argmax()) == 5
    assert float(sharpest[5]) == pytest.approx(0.0, abs=1e-9)
    straight = drift(None)
    assert local_cosines(straight @ straight.T, lag)[lag:-lag].tolist() == pytest.approx([-1.0] * (12 - 2 * lag))
    assert local_cosines(torch.zeros(5, 5, dtype=torch.float64), 1).isnan().all()  # nothing moved
    with pytest.raises(UserError, match="1 or more"):
        local_cosines(torch.zeros(5, 5, dtype=torch.float64), 0)


def test_a_turn_is_found_where_it_was_planted_and_no_drift_has_one() -> None:
    for seed in range(10):
        path = drift(4) + noise(seed, 0.5)
        found = turning_point(STEPS, path @ path.T, permutations=199, seed=seed)
        assert found is not None
        assert (found.step, found.p < 0.05) == (STEPS[4], True)
        assert abs(found.cosine) < 0.3
    said = []
    for seed in range(20):
        slower = torch.linspace(0, 1, len(STEPS), dtype=torch.float64)[:, None]
        path = 12 * (2 * slower - slower.square()) * torch.eye(64, dtype=torch.float64)[:1] + noise(seed, 0.2)
        found = turning_point(STEPS, path @ path.T, permutations=99, seed=seed)
        assert found is not None
        said.append(found.p <= 0.05)
    assert sum(said) <= 2


def test_few_checkpoints_have_no_p_and_a_path_that_stands_still_no_turn() -> None:
    path = drift(2)[:5]
    found = turning_point(STEPS[:5], path @ path.T)
    assert found is not None
    assert found.step == STEPS[2]
    assert math.isnan(found.p)
    assert turning_point(STEPS[:3], torch.eye(3).double()) is None
    assert turning_point(STEPS, torch.zeros(12, 12, dtype=torch.float64)) is None


@pytest.mark.parametrize("name", [name for name in CURVES if "drift" in name or "slows" in name])
def test_a_smooth_climb_is_no_jump(name: str) -> None:
    steps = [2**k for k in range(12)] if "1, 2, 4" in name else STEPS
    said = 0
    for seed in range(30):
        noise = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = CURVES[name](torch.linspace(0, 1, 12, dtype=torch.float64), noise).tolist()
        said += change_point(steps, values, permutations=199, seed=seed).said
    assert said <= 3


def test_a_jump_is_said_with_noise_and_without() -> None:
    for seed in range(10):
        values = [5.0 * (i >= 5) for i in range(12)]
        drawn = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 0.5
        noisy = [value + float(more) for value, more in zip(values, drawn, strict=True)]
        for series in (values, noisy):
            found = change_point(STEPS, series, permutations=199, seed=seed)
            assert (found.said, found.before) == (True, STEPS[5])
    assert not change_point(STEPS, [1.0] * 12).said
    assert not change_point(STEPS[:5], values[:5]).said


def test_adapters_are_as_long_as_what_they_add(tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "base"))
    read = [read_lora(save_adapter(base, tmp_path / f"a{i}", seed=i, rank=rank)) or {} for i, rank in enumerate((1, 4))]
    found = adapter_path(read)
    assert found.rank == 4
    whole = [torch.cat([own[name].product().flatten().double() for name in sorted(own)]) for own in read]
    assert found.norms.tolist() == pytest.approx([0.0, *(float(one.norm()) for one in whole)], rel=1e-5)
    assert float(found.products[1, 2]) == pytest.approx(float(whole[0] @ whole[1]), rel=1e-3, abs=1e-6)
    ups = torch.cat([change.up.flatten().double() for change in read[0].values()])
    assert float(found.b_norms[1]) == pytest.approx(float(ups.norm()))
    assert found.a_norms[0].isnan()
    some = dict(list(read[1].items())[:1])
    (one,) = some.values()
    assert float(adapter_path([read[1], some]).products[1, 2]) == pytest.approx(float(one.product().norm() ** 2))
