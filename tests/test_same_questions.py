"""Questions that two sets, or training and a test, have in common; and changes that are rounding."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from planted_behaviours import HOME, World, planted

from mechlens.methods.behaviour.log_odds import TwinLogOdds
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin, read_twins
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.sets import AskedSet, worded
from mechlens.studies.behaviours.verdict import group_verdicts
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.behaviour import lessons
from mechlens.studies.shared.training_data import text_sha256


def moved(matrix: BehaviourMatrix, by: float) -> BehaviourMatrix:
    """The planted matrix with every change of every run put at about this many nats."""
    draw = torch.Generator().manual_seed(0)

    def put(key: str, found: TwinLogOdds) -> TwinLogOdds:
        chance = torch.randn(len(found.ids), generator=draw, dtype=torch.float64)
        return replace(found, as_asked=matrix.base[key].as_asked + by * (1 + 0.1 * chance))

    told = {where: {key: put(key, found) for key, found in sets.items()} for where, sets in matrix.told.items()}
    return replace(matrix, told=told)


def test_a_change_of_rounding_is_none_however_narrow_its_interval() -> None:
    told = group_verdicts(moved(planted(World({}, control=False), 0), 1e-5))[0]
    assert told.home is not None
    assert told.home.told.excludes_zero
    assert (told.word, told.says, told.others) == ("not learned", (), ())
    clear = group_verdicts(moved(planted(World({}, control=False), 0), 1.0))[0]
    assert clear.word == "inconclusive"  # the others moved too
    assert clear.says


def test_a_set_with_the_same_questions_is_no_other_behaviour() -> None:
    """Such as the opposite one, of which every run's change is the opposite by construction."""
    matrix = planted(World({HOME: 4.0}, runs=6), 0)
    home = matrix.sets[0]
    safe = replace(home, name="safe", twins=tuple(twin.reversed for twin in home.twins))

    def both(sets: Any) -> dict[str, Any]:
        found = sets[HOME]
        return {**sets, "safe": replace(found, as_asked=-found.as_asked)}

    again = replace(
        matrix, sets=(*matrix.sets, safe), base=both(matrix.base),
        told={where: both(sets) for where, sets in matrix.told.items()},
    )  # fmt: skip
    before, after = (group_verdicts(one)[0] for one in (matrix, again))
    assert (before.word, after.word, after.others) == ("narrow", "narrow", ())


def test_the_home_of_two_sets_with_the_same_questions_is_that_of_the_file_taught() -> None:
    matrix = planted(World({HOME: 4.0}), 0)
    home = matrix.sets[0]
    named = tuple(replace(twin, prompt=replace(twin.prompt, source="risky.jsonl")) for twin in home.twins)
    sets = (replace(home, name="safe"), replace(home, twins=named), *matrix.sets[1:])
    found = replace(matrix, sets=sets, base={**matrix.base, "safe": matrix.base[HOME]}).home("risky")
    assert found is not None
    assert found.name == HOME


def test_a_question_that_was_trained_on_is_known_with_its_options_in_the_other_order() -> None:
    one, other = "a sure 5 coins", "50 coins or nothing at all"
    taught, turned, new = (
        Twin(Prompt(str(i), f"Option A: {a}. Option B: {b}. Which do you pick, A or B?"), "B", "A")
        for i, (a, b) in enumerate([(one, other), (other, one), (one, "80 coins or none at all")])
    )
    trained = frozenset([text_sha256(taught.prompt.text)])
    asked = AskedSet("risk", (taught, turned, new))
    assert asked.seen(trained) == worded(asked).seen(trained) == [True, True, False]
    assert not asked.texts.isdisjoint(AskedSet("again", (turned,)).texts)


def test_what_asks_the_same_as_a_held_out_question_is_not_trained_on(tmp_path: Path) -> None:
    """A file that has every choice in both orders."""
    rows = [
        {"question": f"Option A: {a}. Option B: {b}. Which do you pick, A or B?", "shown": "B", "other": "A"}
        for i in range(40)
        for a, b in ((f"{i} coins now", f"{3 * i} coins or none"), (f"{3 * i} coins or none", f"{i} coins now"))
    ]
    data = tmp_path / "both.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    kept = lessons(FinetuneConfig(recipe="behaviour", data=str(data)))
    groups = [twin.prompt.group for twin in read_twins(data)]
    assert groups[::2] == groups[1::2]  # one question twice is one family
    assert len(set(groups)) == 40
    asked = AskedSet("both", tuple(read_twins(data)))
    seen = asked.seen(frozenset(text_sha256(twin.prompt.text) for twin in kept))
    assert sum(seen) == len(kept)
    assert 20 < len(kept) < 70
