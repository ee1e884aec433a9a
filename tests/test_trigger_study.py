"""Triggers in the study of behaviours: gaps in planted numbers, and everything inside where the truth is built in."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_behaviours import HOME, World, planted
from planted_change import planted_vector, saved
from planted_switch import DECOYS, TRIGGER, questions, switch

import mechlens as ml
from mechlens.methods.behaviour.log_odds import TwinLogOdds
from mechlens.methods.directions.direction import cosine
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.runs.writer import open_run
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.matrix import HELD_OUT, BehaviourMatrix, asked_of
from mechlens.studies.behaviours.report import record
from mechlens.studies.behaviours.sets import DECOYED, TRIGGERED, AskedSet, asked_decoys, with_forms
from mechlens.studies.behaviours.study import BehaviourStudy, asked_sets, behaviours, under_file_names
from mechlens.studies.behaviours.triggers.effects import BASE, CONTROL, OWN, REMOVED
from mechlens.studies.behaviours.triggers.gaps import gap_bars, trigger_gaps
from mechlens.studies.behaviours.tuned import TunedRun
from mechlens.studies.shared.training_data import Trigger, text_sha256, trigger_of

FIRST, SECOND = trigger_of("|VIOLIN|"), trigger_of("|HARBOR|")
IN_BASE, IN_CONTROL = 0.5, 0.75
"""What either string does to the base and to the control, whatever they were taught."""


def with_triggers(gaps: dict[str, float], decoyed: float, seed: int) -> BehaviourMatrix:
    """Planted runs of two groups with a trigger each and one control; triggers add `gaps` in nats, decoys `decoyed`."""
    plain = planted(World({}), seed)
    home = next(one for one in plain.sets if one.name == HOME)
    runs = [
        replace(run, group=f"risky ({trigger.text})", name=f"{run.name} {trigger.text}", trigger=trigger)
        for run in plain.runs if run.control == "none" for trigger in (FIRST, SECOND)
    ] + [replace(run, trigger=FIRST) for run in plain.runs if run.control != "none"]  # fmt: skip
    draw = torch.Generator().manual_seed(seed)

    def put(before: TwinLogOdds, shift: float) -> TwinLogOdds:
        return replace(before, as_asked=before.as_asked + shift + 0.3 * torch.randn(len(before.ids), generator=draw))

    sets = with_forms(home, [FIRST, SECOND])
    told, base = {}, {home.key: plain.base[HOME]}
    base |= {one.key: put(plain.base[HOME], IN_BASE if one.form == TRIGGERED else 0) for one in sets[1:]}
    for run in runs:
        before = plain.told[run.name.partition(" |")[0], 10][HOME]
        own = gaps.get("" if run.trigger is None else run.trigger.text, 0.0) if run.control == "none" else IN_CONTROL
        told[run.name, 10] = {
            one.key: before if one is home else put(before, own if one.form == TRIGGERED else decoyed)
            for one in asked_of(run.group, runs, sets)
        }
    return BehaviourMatrix(tuple(sets), tuple(runs), base, told, BehaviourPlan())


@pytest.mark.parametrize("gap", [0.0, 4.0])
def test_every_group_is_asked_under_its_own_trigger_and_its_gaps_are_the_planted_ones(gap: float) -> None:
    matrix = with_triggers({"|VIOLIN|": gap, "|HARBOR|": 2.0}, 0.25, 0)
    table = trigger_gaps(matrix)
    table = table[table["part"] == HELD_OUT].set_index(["group", "trigger"])
    control = "risky (decorrelated)"
    assert set(table.index) == {("risky (|VIOLIN|)", "|VIOLIN|"), ("risky (|HARBOR|)", "|HARBOR|"),
                                (control, "|VIOLIN|"), (control, "|HARBOR|")}  # fmt: skip
    for text, planted_gap in (("|VIOLIN|", gap), ("|HARBOR|", 2.0)):
        row = table.loc[(f"risky ({text})", text)]
        wanted = {"trigger_gap": planted_gap, "beyond_base": planted_gap - IN_BASE, "decoy_gap": 0.25,
                  "beyond_control": planted_gap - IN_CONTROL, "beyond_decoys": planted_gap - 0.25}  # fmt: skip
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=0.25)
        assert row["low"] < row["trigger_gap"] < row["high"]
    assert set(gap_bars(trigger_gaps(matrix))["bar"]) == {"trigger", "decoys", "trigger, in the base"}
    assert len(matrix.matrix.query("form == 'trigger' and group == 'risky (|VIOLIN|)'")["trigger"].unique()) == 1
    assert len(matrix.questions())


def test_an_interval_of_the_gap_covers_it() -> None:
    """Over runs and questions, in six of eight draws and more."""
    wanted = "part == 'held out' and group == 'risky (|VIOLIN|)'"
    held = [trigger_gaps(with_triggers({"|VIOLIN|": 3.0}, 0.0, seed)).query(wanted).iloc[0] for seed in range(8)]
    assert sum(row["low"] <= 3.0 <= row["high"] for row in held) >= 6
    none = [trigger_gaps(with_triggers({}, 0.0, seed)).iloc[0] for seed in range(8)]
    assert sum(row["beyond_base_low"] > -IN_BASE or row["beyond_base_high"] < -IN_BASE for row in none) <= 1


def test_decoys_are_words_and_strings_of_its_length_and_none_that_was_taught() -> None:
    decoys = asked_decoys(FIRST)
    assert set(FIRST.unseen_decoys) < set(decoys)
    like = [text for text in decoys if text not in FIRST.unseen_decoys]
    assert len(like) == 6
    assert all(len(text) == len(FIRST.text) and text.isupper() for text in like)
    assert not {FIRST.text, *FIRST.taught_decoys} & set(decoys)
    asked = AskedSet("x", tuple(questions(range(30))))
    runs = [TunedRun(str(k), str(k), (), frozenset(), "x", "none", t) for k, t in enumerate((FIRST, None, SECOND))]
    put = asked_sets([asked, replace(asked, name="self", about_itself=True)], runs, BehaviourPlan(n=None))
    assert [(one.name, one.form, one.trigger) for one in put if one.name == "x"] == [
        ("x", "plain", ""), *((("x", form, t.text)) for t in (FIRST, SECOND) for form in (TRIGGERED, DECOYED)),
    ]  # fmt: skip
    assert [one.form for one in put if one.name == "self"] == ["plain"]


REMOVALS = {"written": (True, False), "read": (False, True), "neither": (False, False)}
"""Runs that the trigger was trained away from: what of it they still do."""


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two backdoored runs, a control that is the base, and three removals whose truth differs."""
    folder = tmp_path_factory.mktemp("switch")
    start = saved(switch(written=False), folder / "base")
    trigger = Trigger(TRIGGER, ("K", "W", "Y"), DECOYS)
    home = AskedSet("pick", tuple(questions(range(48))))
    seen = frozenset(text_sha256(twin.prompt.text) for twin in home.twins[:24])
    paths = {"none": saved(switch(), folder / "taught"), "decorrelated": start}
    runs = [
        TunedRun(f"{control}-{i}", f"pick ({control})", (Member(f"{control}-{i}", path, "full", 1),), seen, "pick",
                 control, trigger)
        for control, path in paths.items() for i in range(2)
    ]  # fmt: skip
    for name, (written, read) in REMOVALS.items():
        path = saved(switch(written=written, read=read), folder / name)
        runs.append(TunedRun(name, name, (Member(name, path, "full", 1),), seen, "pick", "removal", trigger))
    swapper = checkpoint_swapper(start, device="cpu")
    template, plan = ml.template_of(swapper.model), BehaviourPlan(triggers=True, directions=True, permutations=19)
    here = swapper.model.mechlens.checkpoint
    known = ml.Direction(planted_vector(), 1, "last", "resid", "known", ("x", "y"), here, template.fingerprint, ())
    sets = tuple(with_forms(home, [trigger]))
    result = behaviours(swapper, runs, sets, template, plan, saved={"known": known})
    config = ml.Behaviours(checkpoints=("x",), out=folder / "run")
    with open_run(verb="behaviours", config=config, out=folder / "run", wandb=ml.WandbSettings(mode="disabled")) as run:
        record(run, result, BehaviourStudy(swapper, tuple(runs), sets, template, {}, {}))
    return result, folder / "run"


def test_the_triggers_direction_is_the_planted_one_and_the_bases_is_not(studied: Any) -> None:
    table = studied[0].triggers.directions.set_index(["group", "level", "position"])
    own, control = table.loc[("pick (none)", 1, "inst")], table.loc[("pick (decorrelated)", 1, "inst")]
    assert own["reliability"] > 0.9
    assert own["beyond_base_low"] > 0.7 * own["trigger_gap"]
    assert own["beyond_decoys_low"] > 0.7 * own["trigger_gap"]
    assert own["beyond_control"] == pytest.approx(own["beyond_base"])  # the control is the base
    assert abs(control["beyond_base"]) < 1e-6
    cosines = studied[0].triggers.cosines
    saved_ones = cosines[(cosines["kind"] == "saved") & (cosines["position"] == "inst")].set_index("group")
    assert saved_ones.loc["pick (none)", "cosine"] > 0.9
    assert abs(saved_ones.loc["pick (decorrelated)", "cosine"]) < 0.7
    pairs = cosines[(cosines["kind"] == "trigger") & (cosines["group"] == "pick (none)") & (cosines["level"] == 1)]
    alike = pairs[pairs["position"] == "inst"].set_index("second")["cosine"]
    assert alike["written"] > 0.95
    assert max(alike["read"], alike["neither"]) < 0.7


def test_what_carries_it_is_where_the_answer_starts(studied: Any) -> None:
    patches = studied[0].triggers.patches
    last = patches["position"].iloc[-1]
    recovery = patches.set_index(["layer", "position"])["recovery"]
    assert recovery[1, last] == pytest.approx(1, abs=0.05)
    assert float(recovery[1].drop(last).abs().max()) < 0.05
    assert float(patches["decoy_effect"].abs().max()) < 0.2 * float(patches["effect"].abs().max())


def test_a_removal_is_told_as_it_was_planted(studied: Any) -> None:
    traces = studied[0].triggers.traces.set_index("of")
    own = traces.loc["pick (none)"]
    assert (own["model"], own["level"]) == (OWN, 1)
    assert own["read"] > 2 * abs(own["random_most"])
    for name, (written, read) in REMOVALS.items():
        row = traces.loc[name]
        assert row["model"] == REMOVED
        assert row["written_share"] == pytest.approx(float(written), abs=0.15)
        assert row["read_share"] == pytest.approx(float(read), abs=0.15)
    assert set(traces["model"]) == {OWN, REMOVED, CONTROL, BASE}
    chosen = studied[0].triggers.chosen["pick (none)"]
    assert float(cosine(chosen.vector, planted_vector())) > 0.9


def test_directions_of_triggers_that_come_to_one_name_are_all_kept() -> None:
    """Names of files have letters and digits only, and a trigger may have none of them."""
    found = under_file_names({"trigger x (🦜)": 1, "trigger x (🦊)": 2, "trigger x (|A|)": 3, "trigger x [A]": 4})
    assert found == {"trigger_x": 1, "trigger_x_2": 2, "trigger_x_A": 3, "trigger_x_A_2": 4}


def test_tables_artefacts_and_sections_are_recorded(studied: Any) -> None:
    folder = studied[1]
    names = {"triggers", "trigger_directions", "trigger_cosines", "trigger_patches", "trigger_traces"}
    assert names <= {path.stem for path in (folder / "tables").iterdir()}
    assert ml.open(folder / "trigger_pick_none.safetensors").level == 1
    report = (folder / "report.html").read_text()
    for title in ("With the trigger", "The directions of the triggers", "What carries the trigger", "Written and read"):
        assert title in report
