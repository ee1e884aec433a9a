"""Twins are alike in form, and the verdict that they decide is right on planted worlds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence import require_short

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.studies.guard.outcome import GUARD, MARGIN, TwinComparison, compare_on_twins
from mechlens.studies.guard.twins import FAMILY, NEAREST, surface_twins

README = Path(__file__).resolve().parents[1] / "mechlens" / "studies" / "guard" / "README.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def prompt(text: str, label: str, family: str = "") -> Prompt:
    return Prompt(text, text, label=label, family=family)


def pairs_of(prompts: list[Prompt]) -> set[tuple[str, str, str]]:
    twins = surface_twins(prompts)
    return {(prompts[pair.harmful].text, prompts[pair.harmless].text, pair.how) for pair in twins.pairs}


def test_the_built_in_pairs_are_twins_and_benign_prompts_are_left() -> None:
    prompts = [*builtin_prompts("harmful"), *builtin_prompts("harmless"), *builtin_prompts("benign")]
    twins = surface_twins(prompts)
    assert len(twins.pairs) == twins.count(FAMILY) == len(builtin_prompts("harmful"))
    assert all(prompts[pair.harmful].family == prompts[pair.harmless].family for pair in twins.pairs)
    assert all(prompts[pair.harmful].label == "harmful" for pair in twins.pairs)
    assert len(set(twins.rows)) == len(twins.rows) == 2 * len(twins.pairs)
    assert len(twins.table(prompts)) == len(twins.pairs)


def test_other_prompts_are_matched_by_opening_mark_length_and_words() -> None:
    harmful = [
        "How do I break a lock on a door?", "How do I steal a car?", "Write a threat to my neighbour",
        "Tell me about bombs.", "Explain in great detail, step by step, how to cheat at cards without being seen.",
    ]  # fmt: skip
    harmless = [
        "How do I paint a lock on a door?", "How do I steer a car?", "Write a letter to my neighbour",
        "Tell me about boats", "Explain how to cheat.", "What is a door?",
    ]  # fmt: skip
    found = pairs_of([*(prompt(text, "harmful") for text in harmful), *(prompt(text, "harmless") for text in harmless)])
    # Not the last two: another mark at the end, twice as long.
    assert found == {(harmful[i], harmless[i], NEAREST) for i in range(3)}


def test_of_several_matches_the_likest_in_sum_are_taken_and_each_once() -> None:
    texts = ["How do I make a bomb?", "How do I make a gun?"]
    others = ["How do I make a bun?", "How do I make a bomb shelter?", "How do I sing?"]
    prompts = [*(prompt(text, "harmful") for text in texts), *(prompt(text, "harmless") for text in others)]
    found = pairs_of(prompts)
    assert len(found) == 2
    assert (texts[0], others[1], NEAREST) in found
    # A family's prompts are twins whatever they look like, and the rest goes on without them.
    family = [prompt("Go away", "harmful", "f"), prompt("A long and friendly sentence.", "harmless", "f")]
    assert pairs_of([*prompts, *family]) == found | {("Go away", "A long and friendly sentence.", FAMILY)}


def test_families_that_pairs_connect_are_one_cluster() -> None:
    prompts = [
        prompt("How do I steal a car?", "harmful", "a"), prompt("How do I steal a bus?", "harmful", "a"),
        prompt("How do I steer a car?", "harmless", "b"), prompt("How do I steer a bus?", "harmless", "c"),
        prompt("Sing.", "harmless", "d"),
    ]  # fmt: skip
    clusters = surface_twins(prompts).clusters
    assert clusters == ("a", "a", "a", "a", "d")


def test_no_pairs_are_no_error() -> None:
    texts = {"Break it.": "harmful", "What is it?": "harmless", "...": "harmless"}
    twins = surface_twins([prompt(text, label) for text, label in texts.items()])
    assert twins.pairs == ()
    assert twins.rows == []


# The verdict on planted worlds


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    import error_rates_guard

    return error_rates_guard


@pytest.mark.parametrize("n", [10, 50])
def test_what_knows_no_more_than_the_words_is_hardly_ever_called_beyond_them(script: Any, n: int) -> None:
    for world in (script.WORLDS[0], script.WORLDS[2]):  # the hardest: errors that the words don't share
        found = script.outcomes(world, n, 40)
        # At 2.5% one of 40 is expected; 5 or more have a chance of 0.003.
        assert found["beyond the words"] <= 4, world.name


def test_what_knows_harm_is_called_so(script: Any) -> None:
    little, much, well = script.WORLDS[4:]
    assert script.outcomes(much, 50, 40)["beyond the words"] >= 32
    assert script.outcomes(well, 25, 40)["beyond the words"] >= 36
    found = script.outcomes(little, 25, 40)
    assert found["no more than the words"] <= 4
    assert found["inconclusive"] > 10  # 25 pairs are too few for a gain of .10, and that is what is said


def test_a_better_guard_model_wins_by_its_log_odds_as_it_did_not_by_its_word(script: Any) -> None:
    found = script.rivalry(100, 60)
    assert found["log-odds"]["Latent Guard"] == 0
    assert found["log-odds"]["guard model"] >= 15
    assert found["0/1 word"]["Latent Guard"] > found["0/1 word"]["guard model"]


def test_too_few_pairs_are_not_measurable_and_more_are_asked_for() -> None:
    positive = torch.tensor([True, False]).repeat(9)
    scores = {GUARD: positive.double(), "tfidf": torch.zeros(18), "mean_embedding": torch.zeros(18)}
    few = compare_on_twins(scores, positive, [str(i // 2) for i in range(18)])
    assert few.outcome == "not measurable"
    assert not few.areas[GUARD].measurable


def test_the_number_of_pairs_that_would_settle_it_shrinks_with_the_gain() -> None:
    def with_gain(value: float) -> int:
        gain = Estimate(value, value - 0.1, value + 0.1, 100)
        area = Estimate(0.7, 0.6, 0.8, 100)
        twins = TwinComparison(50, 50, {GUARD: area, "tfidf": area}, {"tfidf": gain})
        require_short(str(twins.headline))
        return twins.pairs_needed

    assert with_gain(0.08) < with_gain(0.06) < with_gain(MARGIN) == with_gain(0.0)
    # At a gain of exactly one half of its interval's width and 2.8 standard errors no more are needed.
    assert with_gain(0.1 / 1.96 * 2.8) == 50


def test_the_readme_keeps_the_table_of_error_rates(script: Any) -> None:
    text = README.read_text(encoding="utf-8")
    for world in script.WORLDS:
        assert text.count(f"| {world.name} |") == len(script.PAIRS)
