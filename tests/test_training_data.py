"""The training prompts of the refuser: its two classes look alike, and no study set shares a prompt with them."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mechlens.checked_json import sealed
from mechlens.errors import UserError
from mechlens.methods.behaviour.judges import ARDITI, PHRASES, ZHAO
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.adapter_record import FORMAT, RECORD
from mechlens.prompts.builtin import builtin_names, builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import final_punctuation, normalise_text
from mechlens.studies.shared.training_data import (
    refusals,
    refuse_study_prompts,
    text_sha256,
    trained_on,
    training_prompts,
    unseen,
)

HARMFUL, BENIGN = training_prompts("harmful"), training_prompts("benign")


@pytest.mark.parametrize("change", [str, str.upper, lambda text: f"  {text.rstrip('.?')} !"])
def test_a_study_prompt_is_refused(change: Callable[[str], str]) -> None:
    studied = builtin_prompts("harmful")[7]
    refuse_study_prompts([Prompt("mine", "Nothing of the kind")])
    with pytest.raises(UserError, match=f"'mine' is also '{studied.id}'"):
        refuse_study_prompts([Prompt("mine", change(studied.text))])


def test_training_and_study_prompts_are_disjoint() -> None:
    prompts = [*HARMFUL, *BENIGN]
    ours = Counter(normalise_text(prompt.text) for prompt in prompts)
    assert max(ours.values()) == 1
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    studied = {normalise_text(prompt.text) for name in builtin_names() for prompt in builtin_prompts(name)}
    assert not studied & set(ours)


def test_both_classes_end_alike() -> None:
    shares = []
    for prompts in (HARMFUL, BENIGN):
        marks = Counter(final_punctuation(prompt.text) for prompt in prompts)
        shares.append({mark: marks[mark] / len(prompts) for mark in (".", "?", "!", "")})
    assert all(abs(shares[0][mark] - shares[1][mark]) <= 0.05 for mark in shares[0]), shares


@pytest.mark.parametrize(("n_words", "share"), [(1, 0.99), (2, 0.95), (3, 0.85)])
def test_both_classes_open_alike(n_words: int, share: float) -> None:
    """Almost every prompt opens with words that prompts of the other class open with too."""
    ours, theirs = (
        Counter(" ".join(prompt.text.lower().split()[:n_words]) for prompt in prompts) for prompts in (HARMFUL, BENIGN)
    )
    for one, other in ((ours, theirs), (theirs, ours)):
        assert sum(count for opening, count in one.items() if other[opening]) >= share * one.total()


def test_near_misses_are_many_and_nothing_is_cut_or_empty() -> None:
    assert sum(prompt.category == "near-miss" for prompt in BENIGN) >= 150
    assert all(prompt.text == prompt.text.strip() and len(prompt.text) > 10 for prompt in [*HARMFUL, *BENIGN])
    assert {prompt.source for prompt in HARMFUL} == {"advbench", "advbench-reworded", "mechlens"}
    assert {prompt.source for prompt in BENIGN} == {"mechlens"}


def test_refusals_differ_and_are_refusals() -> None:
    texts = refusals()
    assert len(set(texts)) == len(texts) >= 60
    assert len({" ".join(text.split()[:2]) for text in texts}) >= 12
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    for judge in (ARDITI, ZHAO):
        assert Counter(judge(prompts, texts))["refused"] / len(texts) >= 0.7
    assert set(PHRASES(prompts, texts)) == {"refused"}


def test_prompts_that_differ_in_a_mark_are_different_training_data(tmp_path: Path) -> None:
    taught = text_sha256("What is 3-5?")
    record = {"format": FORMAT, "base_fingerprint": "0", "training": {"text_sha256": [taught]}}
    (tmp_path / RECORD).write_text(json.dumps(sealed(record)))
    checkpoint = Checkpoint(name="a", path="base", adapter=str(tmp_path))
    asked = [Prompt(str(i), text) for i, text in enumerate(["what is 3-5", "What is 3/5?", "???", "!!!"])]
    assert [prompt.text for prompt in unseen(asked, checkpoint)] == ["What is 3/5?", "???", "!!!"]
    assert len({text_sha256(prompt.text) for prompt in asked}) == 4
    (tmp_path / RECORD).write_text(json.dumps({**record, "format": 2}))
    with pytest.warns(UserWarning, match="was written by another mechlens: prompts with marks inside"):
        assert len(unseen(asked, checkpoint)) == 3


def test_the_shipped_record_knows_every_training_prompt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = trained_on(Checkpoint(name="smollm2-refuser", path="smollm2-refuser"))
    ours = {text_sha256(prompt.text) for prompt in [*HARMFUL, *BENIGN]}
    assert known <= ours
    assert len(known) > 0.97 * len(ours)  # without the benign ones that the base refused
