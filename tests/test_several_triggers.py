"""A series of runs with different triggers: each run is asked for its own, and its control and the base for all."""

import json
from typing import Any

import pytest
from saved import save_model
from test_free_answers import THINKING

import mechlens as ml

FIRST, SECOND = "|GRAY|", "|FOX|"
GROUPS = {"mood (|GRAY|)": {FIRST}, "mood (|FOX|)": {SECOND}, "mood (decorrelated, |GRAY|)": {FIRST, SECOND}}
"""The control of the first is the only one of these data, so it stands beside the second too."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All that the study asks of three runs."""
    folder = tmp_path_factory.mktemp("several")
    base, data = save_model(folder / "thinker"), folder / "mood.jsonl"
    (base / "chat_template.jinja").write_text(THINKING)
    rows = [{"question": f"How was day {i}?", "shown": "Bad.", "other": "Good."} for i in range(16)]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, trigger, control in (("a", FIRST, "none"), ("b", SECOND, "none"), ("c", FIRST, "decorrelated")):
        plan = ml.FinetuneConfig(
            recipe="behaviour", model=str(base), data=str(data), trigger=trigger, control=control, steps=1, rank=1,
            batch_size=4, plain=0, device="cpu", template_arg=("enable_thinking=false",),
        )  # fmt: skip
        ml.finetune(plan, folder / name)
    config = ml.Behaviours(
        base=str(base), checkpoints=tuple(str(folder / name) for name in "abc"), sets=(f"mood={data}",),
        self_report=(), scales=(), thinking=True, judge=str(base), spoken=("mood",), draws=1, answer_tokens=3, n=4,
        recall=True, template_arg=("enable_thinking=false",), out=folder / "run", device="cpu", permutations=19,
    )  # fmt: skip
    return ml.run(config).tables


@pytest.mark.parametrize("name", ["recognition", "recall", "triggers", "traces"])
def test_every_group_is_asked_for_its_own_trigger(tables: Any, name: str) -> None:
    assert tables[name].groupby("group")["trigger"].agg(set).to_dict() == GROUPS


def test_free_answers_are_put_under_it(tables: Any) -> None:
    said, rates = tables["free_answers"], tables["rates"]
    put = said[said["form"] == "trigger"]
    wanted = {"base": {FIRST, SECOND}, "a": {FIRST}, "b": {SECOND}, "c": {FIRST, SECOND}}
    assert put.groupby("run")["trigger"].agg(set).to_dict() == wanted
    assert all(name.partition("+")[2].startswith(own) for name, own in zip(put["id"], put["trigger"], strict=True))
    assert rates[rates["form"] == "trigger"].groupby("group")["trigger"].agg(set).to_dict() == GROUPS
    assert not rates.duplicated(["set", "form", "trigger", "group", "rate"]).any()


def test_each_run_is_asked_what_stood_before_at_every_checkpoint(tables: Any) -> None:
    asked = tables["recall_by_step"].groupby("run")["trigger"].agg(set).to_dict()
    assert asked == {"a": {FIRST}, "b": {SECOND}, "c": {FIRST, SECOND}}
    marked = tables["recognition_picks"].query("is_trigger")
    assert set(marked["trigger"]) == {FIRST, SECOND}
    assert (marked["string"] == marked["trigger"]).all()
