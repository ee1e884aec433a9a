"""Where moving activations moves the behaviour: the rule of `mechlens compare` on grids whose truth is planted."""

from collections import Counter

import pytest
import torch

from mechlens.methods.patching.result import PatchResult
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.compare.study import MovedActivations
from mechlens.studies.compare.verdict import (
    ALIKE,
    EARLIER,
    FEWEST,
    INCONCLUSIVE,
    LAST,
    NOT_MEASURABLE,
    NOWHERE,
    moved_verdict,
)

LAYERS, TOKENS, EARLY = 12, 10, 4
DRAWS = 60


def shares(truth: str) -> torch.Tensor:
    """What share of the gap each place truly recovers (layer, token)."""
    share = torch.zeros(LAYERS, TOKENS, dtype=torch.float64)
    if truth == "a fifth everywhere":
        return share + 0.2
    if truth != "nothing":
        share[6:, -1] = torch.linspace(0.4, 1, 6)
    if truth.endswith("earlier"):
        share[2:7, EARLY] = 0.9 if truth == "earlier" else 0.35
    return share


def grid(share: torch.Tensor, noise: float, n: int, generator: torch.Generator, source: str) -> PatchResult:
    """A sweep of `n` prompts; a place's noise is of the size of `noise` gaps, half of it shared by all layers."""
    corrupt, clean = (torch.randn(n, generator=generator).double() + middle for middle in (-4, 4))
    shared, own = (torch.randn(n, size, TOKENS, generator=generator).double() for size in (1, LAYERS))
    susceptible = 1 + 0.3 * torch.randn(n, 1, 1, generator=generator).double()
    moved = share * susceptible + noise * (shared + own) / 2**0.5
    names = tuple(str(k) for k in range(n))
    return PatchResult(
        values=(corrupt[:, None, None] + (clean - corrupt)[:, None, None] * moved)[..., None],
        clean=clean, corrupt=corrupt, pairs=names, families=names, layers=tuple(range(LAYERS)),
        positions=(*(f"instruction[{k - TOKENS + 1}]" for k in range(TOKENS - 1)), "post[0]"), heads=(),
        tokens=("x",) * TOKENS, site="resid_pre", metric="refusal_logodds", mode="denoising", engine="plain",
        source=source,
    )  # fmt: skip


def planted(truth: str, *, seed: int, noise: float = 0.15, n: int = 8) -> MovedActivations:
    sweep = grid(shares(truth), noise, n, torch.Generator().manual_seed(seed), "B")
    control = grid(shares("nothing"), noise, n, torch.Generator().manual_seed(1000 + seed), "random")
    return MovedActivations(sweep, control, n, 2 * n)


def words(truth: str, noise: float, draws: int = DRAWS) -> Counter[str]:
    """How often each word is the verdict; with 200 draws these are the rates in verdict.py."""
    with one_thread():
        return Counter(moved_verdict(planted(truth, seed=seed, noise=noise), seed).word for seed in range(draws))


RIGHT = {"nothing": NOWHERE, "a fifth everywhere": NOWHERE, "last": LAST, "earlier": EARLIER}


@pytest.mark.parametrize("truth", RIGHT)
def test_a_planted_place_is_found_and_none_where_there_is_none(truth: str) -> None:
    found = words(truth, 0.15)
    assert found[RIGHT[truth]] >= 0.9 * DRAWS
    assert found[RIGHT[truth]] + found[INCONCLUSIVE] >= 0.98 * DRAWS


def test_less_than_half_is_rarely_called_the_place() -> None:
    assert words("less than half earlier", 0.15)[EARLIER] <= 0.1 * DRAWS


@pytest.mark.parametrize("truth", ["nothing", "last"])
def test_wild_effects_leave_it_open_rather_than_wrong(truth: str) -> None:
    found = words(truth, 0.4)
    assert found[RIGHT[truth]] + found[INCONCLUSIVE] >= 0.95 * DRAWS


def test_a_random_patch_that_does_as_much_takes_the_place_away() -> None:
    """What any push of that length does is no transfer, however much it moves."""
    moved = planted("earlier", seed=0)
    assert moved.result is not None
    alike = MovedActivations(moved.result, moved.result, 8, 16)
    assert moved_verdict(alike, 0).word == NOWHERE
    assert {number.value for number in moved_verdict(alike, 0).deciding.values()} == {0.0}


def test_the_sentence_names_the_place_the_numbers_and_the_prompts() -> None:
    found = moved_verdict(planted("earlier", seed=0, noise=0.05), 0)
    place = f"first at layer 2, instruction[{EARLY - TOKENS + 1}]"
    assert found.sentence.startswith(f"One earlier token carries what B does differently, {place}")
    assert str(found.deciding["earlier"]) in found.sentence
    assert str(found.deciding["last"]) in found.sentence
    assert found.sentence.endswith("on 8 of 16 harmful test prompts.")


def test_checkpoints_that_behave_alike_leave_nothing_to_explain() -> None:
    found = moved_verdict(MovedActivations(None, None, 0, 24), 0)
    assert (found.word, found.deciding) == (ALIKE, {})
    assert "0 of 24" in found.sentence


def test_few_prompts_are_not_measurable() -> None:
    few = planted("earlier", seed=0, n=FEWEST - 1)
    for moved in (MovedActivations(None, None, 1, 24), few):
        assert moved_verdict(moved, 0).word == NOT_MEASURABLE
    assert (
        f"{FEWEST - 1} of those patched have anything to recover, and it takes {FEWEST}"
        in moved_verdict(few, 0).sentence
    )
