"""A best direction is one that the prompts' surface doesn't tell as well; what else differs between sides is named."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted_activations
from planted_surface import World, drawn
from refusing import refusing_model, requests
from sentence import require_short
from shown import require_shown

import mechlens as ml
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.probing.ahead import SURFACE, Ahead
from mechlens.methods.probing.confounds import find_confounds, warn_of_confounds
from mechlens.methods.probing.detect import detect
from mechlens.methods.probing.within_folds import auroc_gain, folds_of
from mechlens.methods.statistics.effect_size import effect_estimate, hedges_g
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.methods.steering import steering_test as module
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import logits_under
from mechlens.methods.steering.steering_test import steering_test
from mechlens.models.bridge import LanguageModel, bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.settings import DetectionPlan
from mechlens.studies.direction.concept import Concept
from mechlens.studies.direction.report import _steering_words
from mechlens.studies.direction.sides import names_given
from mechlens.studies.direction.study import find_concept
from mechlens.studies.direction.verdict import DirectionVerdict, direction_verdict, steering_headline
from mechlens.studies.guard.fitting import fit_guard

PLAN = DetectionPlan(resamples=100, permutations=5, random_directions=5)

WORDS_ONLY, TOKEN_ONLY = World(words=3.0), World(token=4.0, seed=1)


def test_what_activations_hold_beyond_the_words_is_best() -> None:
    found = drawn(World(concept=4.0, words=0.5)).measured().detection
    assert found is not None
    assert found.best is not None
    assert found.best.level == 2
    verdict = direction_verdict(found)
    assert verdict.outcome == "more than the surface"
    assert min(gain.low for gain in verdict.ahead.gains.values()) > 0
    require_short(str(verdict.headline))
    assert str(verdict.headline).startswith(
        f"More than the surface: at {found.best.position}, level 2 (in each fold its own), the AUROC is "
    )


@pytest.mark.parametrize(("world", "ties"), [(WORDS_ONLY, "tfidf"), (World(system=True), "system_prompt")])
def test_what_words_or_a_system_prompt_tell_as_well_has_no_best(world: World, ties: str) -> None:
    found = drawn(world).measured().detection
    assert found is not None
    assert found.best is None
    assert found.strongest.level > 0
    verdict = direction_verdict(found)
    require_short(str(verdict.headline))
    assert verdict.outcome == "no more than the surface"
    assert ties in verdict.ahead.ties
    assert len(found.ahead) == 1  # they tell it at every position: no other is tried
    below = replace(verdict.ahead, auroc=Estimate(0.2, 0.1, 0.3, 80))
    inverse = replace(verdict, outcome="not read", ahead=below).headline
    require_short(str(inverse))
    assert "pairs of one topic were split" in str(inverse)


def test_where_the_token_alone_ties_the_next_position_is_tried() -> None:
    found = drawn(TOKEN_ONLY).measured().detection
    assert found is not None
    assert found.best is None
    assert "token" in next(one for one in found.ahead if one.position == "inst").ties


def test_what_tells_as_much_ties_though_a_fit_shifts_with_the_prompts_it_holds_out() -> None:
    contrast = drawn(TOKEN_ONLY)
    marks = contrast.acts.at(0, "inst")[:, 0].double()
    folds = folds_of(contrast.positive, contrast.acts.families, 0)
    shifted = folds.scored(lambda fit, _: marks + folds.positive[fit].double().mean() * 1e-3)
    assert auroc_gain(marks[None].expand(6, -1), shifted, folds).value == 0.0


def test_detection_alone_knows_the_token_and_never_takes_it() -> None:
    acts = planted_activations(separation=3.0, n_per_class=60, n_levels=3, seed=1).acts
    split = split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    everywhere = detect(acts, "harmful", "harmless", split, PLAN)
    assert everywhere.best is None  # level 0 tells as much
    assert all(choice.level > 0 for choice in everywhere.chosen)
    values = acts.values.clone()
    values[:, 0] = values[0, 0]
    above = detect(replace(acts, values=values), "harmful", "harmless", split, PLAN)
    assert above.best == above.strongest
    # Of another site a level is a block, and none of them is the token.
    other = detect(replace(acts, site="mlp_out"), "harmful", "harmless", split, PLAN)
    assert other.ahead == ()


def prompts(side: str, system: str | None = None, **more: object) -> list[Prompt]:
    """Twenty prompts of one side, alike in everything but what is given."""
    words = [f"{a} the {b} near the {c}" for a in ("paint", "fix") for b in ("door", "wall") for c in "abcde"]
    return [Prompt(f"{side}{i}", f"{text} {i % 7}", side, system=system, **more) for i, text in enumerate(words)]  # type: ignore[arg-type]


HISTORY = (("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("name", "words", "other"),
    [
        ("system_prompt", "0 of 20 against 20 of 20 have a system prompt", {"system": "Be brief."}),
        ("turns", "a median of 0 against 2 earlier messages", {"history": HISTORY}),
    ],
)
def test_a_confound_is_named_with_its_auroc(name: str, words: str, other: dict[str, object]) -> None:
    both = [*prompts("up"), *prompts("down", **other)]  # type: ignore[arg-type]
    found = find_confounds(both, torch.tensor([p.label == "up" for p in both]))
    assert [one.name for one in found if one.telling] == [name]
    assert found[0].auroc.value == 1.0
    with pytest.warns(UserWarning, match=f"{words} .AUROC 1.00 by that alone"):
        warn_of_confounds(found, ("up", "down"))


def test_wrappings_sources_and_lengths_are_found() -> None:
    ours = [replace(p, text=f"Dear model, {p.text}", source="a" if i % 2 else "b") for i, p in enumerate(prompts("up"))]
    theirs = [replace(p, text=f"{p.text} and then go back home", source="a") for p in prompts("down")]
    found = find_confounds([*ours, *theirs], torch.arange(40) < 20)
    assert {one.name for one in found if one.telling} == {"opening", "ending", "length", "source"}
    opening = next(one.sentence for one in found if one.name == "opening")
    assert opening.startswith("how they begin tells them apart (AUROC 1.00 by that alone), such as 20 of 20 against 0")
    # Two files given by hand are two sources, and no confound: they are the contrast.
    apart = [replace(p, source=p.label) for p in (*ours, *theirs)]
    assert "source" not in {one.name for one in find_confounds(apart, torch.arange(40) < 20)}


def test_sides_that_are_alike_raise_no_alarm() -> None:
    both = [*prompts("up"), *prompts("down")]
    found = find_confounds(both, torch.arange(40) < 20)
    assert not any(one.telling for one in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_confounds(found, ("up", "down"))
    assert find_confounds(both[:1], torch.tensor([True])) == ()


@pytest.mark.parametrize(("distance", "paired"), [(0.0, False), (1.0, True), (3.0, False)])
def test_a_planted_effect_is_recovered_and_its_interval_holds_it(distance: float, paired: bool) -> None:
    generator, n, draws = torch.Generator().manual_seed(0), 25, 200
    positive = torch.tensor([True, False]).repeat(n)
    families = [str(i // 2 if paired else i) for i in range(2 * n)]
    shared = torch.randn(draws, n, generator=generator).repeat_interleave(2, dim=1) * (0.5**0.5 if paired else 0.0)
    own = torch.randn(draws, 2 * n, generator=generator) * (0.5**0.5 if paired else 1.0)
    scores = shared + own + distance * positive
    values = hedges_g(scores, positive, torch.ones(1, 2 * n))[:, 0]
    assert float(values.mean()) == pytest.approx(distance, abs=0.08)
    with one_thread():
        held = [effect_estimate(row, positive, families) for row in scores]
    assert 0.9 <= sum(est.low <= distance <= est.high for est in held) / draws <= 0.99
    # Units and origin don't count; too few families have no interval, and equal scores no distance.
    assert torch.allclose(hedges_g(3 * scores + 7, positive, torch.ones(1, 2 * n))[:, 0], values)
    assert not effect_estimate(scores[0, :12], positive[:12], families[:12]).measurable
    assert effect_estimate(torch.ones(2 * n), positive, families).value == 0.0


def planted_model() -> LanguageModel:
    hf_model, tokenizer = refusing_model()
    return bridge(hf_model, tokenizer, Checkpoint("refusing", "refusing", fingerprint="planted"))


@pytest.fixture(scope="module")
def refusing() -> Concept:
    """A model that refuses by one direction, written at block 1, asked about sides that one word tells apart."""
    sides = [
        [Prompt(f"{name}{i}", text, name, family=f"f{i}") for i, text in enumerate(requests(30, name == "harmful"))]
        for name in ("harmful", "harmless")
    ]
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HIGHEST_RISE", math.inf)  # it says one thing only, so refusing breaks plain text
        with pytest.warns(UserWarning, match=r"there is no best direction. No more than .* alone"):
            return find_concept(planted_model(), sides[0], sides[1], ["inst", "last"], PLAN, causal=True)


def test_a_small_steering_test_finds_the_direction_that_acts(refusing: Concept) -> None:
    found = refusing.steered
    assert found is not None
    require_shown(refusing, found, *refusing.confounds, refusing.verdict, refusing.measured, refusing.verdict.ahead)
    assert repr(refusing.verdict).startswith(str(refusing.verdict.headline))
    assert "Estimate(" in repr(refusing.measured.baselines)
    assert len(repr(refusing.measured.baselines)) < 400  # five numbers, as people write them
    for one in refusing.confounds:
        assert repr(one).startswith(f"Confound({one.name}: ")
        assert len(repr(one)) < 200
    assert str(refusing.verdict.headline) in repr(refusing)
    assert refusing.best is None
    assert refusing.direction is found.direction is not None
    assert found.random is not None
    assert found.effect.value > found.random.bound > found.random.maximum
    assert f"that of {found.direction.position}, level {found.direction.level} steers the model" in found.sentence
    # Every candidate stands in the table once, one as chosen; at level 1 both sides are alike, and the top is left out.
    assert len(found.table) == len(found.table.value_counts(["position", "level"])) == 2 * 2
    assert set(found.table["level"]) == {2, 3}
    assert found.table["outcome"].value_counts()["chosen"] == 1
    assert found.table["random_bound"].notna().sum() == 4
    assert refusing.artifacts()["direction"] is found.direction
    assert set(refusing.artifacts()) == {"direction", "directions"}  # one is the result, and under one name
    require_short(str(refusing.headline))
    where = f"{found.direction.position}, level {found.direction.level}"
    assert str(refusing.headline).startswith(f"Steers: adding the direction of {where} has an effect of ")
    assert next(iter(_steering_words(refusing))) == "steering.effect"


def test_what_is_shown_of_a_position_has_its_p(refusing: Concept) -> None:
    # However many numbers there are before it, and where the AUROC has no interval.
    wide = replace(
        refusing.detection.chosen[0],
        auroc=Estimate(1.0, 0.0, 1.0, 10, is_auroc=True), effect=Estimate(-12.16, -192.41, 192.29, 10),
    )  # fmt: skip
    shown = replace(refusing.detection, chosen=(wide, *refusing.detection.chosen[1:]))
    measured = replace(refusing.measured, detection=shown)
    for told in (repr(refusing), repr(replace(refusing, measured=measured)), repr(shown)):
        assert told.count(f"permutation p {wide.permutation.p:.2g}") >= 1
        for line in told.splitlines():
            assert "..." not in line or "permutation p" in line


def test_a_saved_direction_knows_its_sides(refusing: Concept, tmp_path: Path) -> None:
    assert refusing.direction is not None
    for one in (refusing.direction, refusing.detection.directions, refusing.detection.chosen[0].direction):
        assert one.contrast == ("harmful", "harmless")
    again = ml.open(ml.save(refusing.direction, tmp_path / "harm.safetensors"))
    assert repr(again).startswith("Direction(harmful - harmless at level ")


class Column(list):
    """A column of a table, which has a name."""

    def __init__(self, name: str) -> None:
        super().__init__(["a", "b"])
        self.name = name


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ((["a"], ["b"]), ("positive", "negative")),
        ((Column("formal"), Column("casual")), ("formal", "casual")),
        ((Column("text"), Column("text")), ("positive", "negative")),
        (([Prompt("a", "A", "kind")], [Prompt("b", "B", "rude")]), ("kind", "rude")),
        (([Prompt("a", "A", "kind"), Prompt("c", "C", "")], [Prompt("b", "B", "rude")]), ("positive", "negative")),
        (([Prompt("a", "A", "kind"), "C"], [Prompt("b", "B", "rude")]), ("positive", "negative")),
    ],
)
def test_sides_are_called_what_they_arenames_given(given: tuple[Any, Any], sides: tuple[str, str]) -> None:
    assert names_given(*given) == sides


@pytest.mark.parametrize("name", sorted(SURFACE))
@pytest.mark.parametrize("also", ["", "system_prompt", "turns", "source"])
def test_where_the_surface_leaves_no_room_the_verdict_says_so(name: str, also: str) -> None:
    full, none = Estimate(1.0, 0.99, 1.0, 80), Estimate(-0.01, -0.02, 0.01, 80)
    names = list(dict.fromkeys(["tfidf", name, *([also] if also else [])]))
    gains = {one: replace(none, value=-0.02 if one == name else -0.01) for one in names}
    ahead = Ahead("post[-12]", full, full, dict.fromkeys(names, full), gains)
    verdict = DirectionVerdict("no more than the surface", ahead, 120)
    said = str(verdict.headline)
    require_short(said)
    assert "the sides apart (1.00 [0.99, 1.00]), so this set can't show more; sides alike in" in said
    plural = re.search(r"words( \(TF-IDF\))? alone already", said)
    assert f"alone already {'tell' if plural else 'tells'} the sides apart" in said
    assert said.endswith("would settle it.")
    if also not in ("", name):
        assert SURFACE[also] in said
    room = replace(ahead, surface={**ahead.surface, name: Estimate(0.94, 0.9, 0.97, 80)})
    assert "can't show more" not in str(replace(verdict, ahead=room).headline)


def test_a_direction_that_is_not_what_its_folds_are_is_named_with_its_own_number() -> None:
    out_of_fold, words = Estimate(0.99, 0.89, 1.0, 120), Estimate(0.71, 0.6, 0.8, 120)
    ahead = Ahead("post[-12]", out_of_fold, out_of_fold, {"tfidf": words}, {"tfidf": Estimate(0.28, 0.1, 0.4, 120)})
    for outcome in ("more than the surface", "inconclusive", "no more than the surface", "not read"):
        far = str(DirectionVerdict(outcome, ahead, 120, Estimate(0.78, 0.5, 0.9, 24)).headline)  # type: ignore[arg-type]
        assert "(0.78 by the one kept, of level 120)" in far
        require_short(far)
    near = str(DirectionVerdict("more than the surface", ahead, 120, Estimate(0.95, 0.8, 1.0, 24)).headline)
    assert "level 120 (in each fold its own)" in near
    assert "0.95" not in near


def test_families_are_asked_for_where_prompts_share_them() -> None:
    wide = Estimate(0.03, -0.1, 0.16, 120)
    ahead = Ahead("inst", Estimate(0.8, 0.7, 0.9, 120), wide, {"tfidf": Estimate(0.77, 0.6, 0.9, 120)}, {"tfidf": wide})
    pairs, shared = (DirectionVerdict("inconclusive", ahead, 3, families=n) for n in (60, 12))
    assert pairs.headline.settle == f"about {pairs.needed} prompts of a side would settle it"
    wanted = math.ceil(shared.needed / 5)
    assert shared.headline.settle == f"about {wanted} families a side (now 12) would settle it"
    require_short(str(shared.headline))


@pytest.mark.parametrize(("families", "warned"), [(12, True), (60, False)])
def test_levels_that_tie_on_few_families_are_told(tiny_model: Any, families: int, warned: bool) -> None:
    sides = [
        [Prompt(f"{word}{i}", f"Please {word} a thing numbered {i}", family=str(i % families)) for i in range(60)]
        for word in ("make", "break")
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = ml.find_concept(tiny_model(), *sides, plan=DetectionPlan(permutations=5, resamples=20))
    assert found.detection.tied(found.detection.strongest.position) > warned
    assert any("levels at" in str(one.message) and "families only" in str(one.message) for one in told) == warned


def test_the_effect_is_what_adding_it_does(refusing: Concept) -> None:
    found, model = refusing.steered, planted_model()
    assert found is not None
    assert found.direction is not None

    def told(rows: list[int], *given: Add) -> torch.Tensor:
        return logits_under(model, refusing.batch.select(rows), list(given)).double().log_softmax(dim=-1)

    def rows(part: tuple[int, ...], side: str) -> list[int]:
        return [i for i in part if refusing.acts.labels[i] == side]

    ours, theirs = (rows(refusing.split.train, side) for side in ("positive", "negative"))
    contrast = told(ours).exp().mean(dim=0) - told(theirs).exp().mean(dim=0)
    test = rows(refusing.split.test, "negative")
    add = Add(found.direction, strength=1.0, unit="raw", layers=(found.direction.level,), positions=ALL, phase="both")
    effect = ((told(test, add) - told(test)) @ contrast).mean()
    assert found.effect.value == pytest.approx(float(effect), abs=1e-4)
    refusal = int(contrast.argmax())
    assert (told(test).argmax(dim=1) != refusal).all()
    assert (told(test, add).argmax(dim=1) == refusal).all()  # harmless requests are refused


def test_of_directions_that_mean_nothing_none_steers(refusing: Concept) -> None:
    grid = replace(refusing.detection.directions, contrast=("positive", "negative"))  # labels of its prompts
    drawn = torch.randn(grid.vectors.shape, generator=torch.Generator().manual_seed(5))
    noise = drawn * (grid.vectors.norm(dim=-1) / drawn.norm(dim=-1))[..., None]
    found = steering_test(planted_model(), replace(grid, vectors=noise), refusing.batch, refusing.split, PLAN)
    assert found.direction is None
    assert "and no more than chance: the effect on negative test prompts is" in found.sentence
    require_short(str(steering_headline(found, refusing.verdict)))


def test_a_direction_that_breaks_plain_text_is_not_taken(refusing: Concept) -> None:
    grid = replace(refusing.detection.directions, contrast=("positive", "negative"))
    found = steering_test(planted_model(), grid, refusing.batch, refusing.split, PLAN)
    assert (found.direction, found.random) == (None, None)
    assert "breaks plain text" in set(found.table["outcome"])
    assert "leaves plain text whole" in found.sentence
    require_short(str(steering_headline(found, refusing.verdict)))


def test_the_other_studies_warn_of_what_tells_their_sides_apart(tiny_model: Callable[..., Any]) -> None:
    ours = [replace(p, label="harmful") for p in prompts("up")]
    theirs = [replace(p, label="harmless") for p in prompts("down", system="Be brief.")]
    with pytest.warns(UserWarning, match="0 of 20 against 20 of 20 have a system prompt"):
        fit_guard(tiny_model(), [*ours, *theirs], GuardEstimator())
