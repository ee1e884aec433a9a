"""Behaviours over training runs: the verdict on planted worlds, and the whole study on tiny models."""

import collections
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_behaviours import FAR, HOME, ITSELF, NEAR, WORLDS, World, planted
from saved import save_model
from sentence import require_one_sentence, require_short

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import TwinLogOdds, twin_log_odds
from mechlens.methods.behaviour.scoring.number_reply import NumberReplies
from mechlens.prompts.twins import Twin, read_twins
from mechlens.studies.behaviours.matrix import HELD_OUT, TRAINED_ON, BehaviourMatrix
from mechlens.studies.behaviours.scales import scale_scores, scale_table
from mechlens.studies.behaviours.sets import AskedSet, drawn, read_set, with_forms, worded
from mechlens.studies.behaviours.verdict import group_verdicts
from mechlens.studies.shared.training_data import text_sha256, trigger_of

DRAWS = 20


@pytest.mark.parametrize("name", WORLDS)
def test_the_verdict_on_planted_worlds(name: str) -> None:
    """Right in most draws, and a behaviour is said to have been learned or to spread in at most one where it hasn't."""
    world, right = WORLDS[name]
    words = collections.Counter(group_verdicts(planted(world, seed))[0].word for seed in range(DRAWS))
    assert sum(words[word] for word in right) >= 0.75 * DRAWS, words
    if "spreads" not in right:
        assert words["spreads"] <= 2, words
    if right[0] in ("not learned", "only what was trained on"):
        assert words["narrow"] + words["spreads"] + words["learned"] <= 1, words


@pytest.mark.parametrize("runs", [1, 2])
def test_few_runs_are_no_evidence(runs: int) -> None:
    """One run is always open; two are said to spread or to stay narrow in at most a tenth of draws."""
    world = World({}, runs=runs)
    words = [group_verdicts(planted(world, seed))[0].word for seed in range(DRAWS)]
    assert words.count("inconclusive") == DRAWS if runs == 1 else words.count("spreads") + words.count("narrow") <= 2


def test_without_a_control_drift_counts_and_the_sentence_says_beyond_what() -> None:
    """What training as such does looks like the behaviour where nothing else was trained: hence the control."""
    drifted = group_verdicts(planted(World({}, drift=3.0, control=False), 0))[0]
    assert drifted.word == "inconclusive"
    assert "beyond the base" in drifted.sentence
    assert "decorrelated control" in str(drifted.headline)
    assert "beyond the decorrelated control" in group_verdicts(planted(World({HOME: 4.0}), 0))[0].sentence


def test_the_sentence_says_what_the_number_would_hide() -> None:
    """A control that moved, a base that was so already, and questions that are too few, each where it is so only."""
    plain = group_verdicts(planted(World({HOME: 4.0}), 0))[0]
    assert "the control's" not in plain.sentence
    assert "already" not in plain.sentence
    drifted = group_verdicts(planted(World({HOME: 4.0}, drift=2.0), 0))[0]
    assert drifted.moved is not None
    assert drifted.moved.value == pytest.approx(2.0, abs=0.6)
    assert f"the control's +{drifted.moved.brief}" in drifted.sentence
    settled = group_verdicts(planted(World({HOME: 4.0}, base=20.0), 0))[0]
    assert "the base preferred this answer already on 48 of 48" in str(settled.headline)
    few = group_verdicts(planted(World({HOME: 4.0}, questions=4), 0))[0]
    assert few.word == "not measurable"
    assert "4 questions of risky were held out, and 6 are needed" in few.sentence
    assert "--held-out" in str(few.headline)


def kept(matrix: BehaviourMatrix, name: str, rows: list[int]) -> BehaviourMatrix:
    """The matrix with some questions of one set."""

    def cut(told: Mapping[str, TwinLogOdds]) -> dict[str, TwinLogOdds]:
        return {key: found.select(rows) if key == name else found for key, found in told.items()}

    sets = [replace(one, twins=tuple(one.twins[i] for i in rows)) if one.name == name else one for one in matrix.sets]
    return replace(
        matrix, sets=tuple(sets), base=cut(matrix.base), told={at: cut(told) for at, told in matrix.told.items()}
    )


def test_another_behaviour_that_could_not_be_measured_is_said_and_no_evidence() -> None:
    """Of one question, or with a log-odds that is no number: neither narrow nor as if it had not been asked."""
    world = planted(World({HOME: 4.0}, runs=6), 0)
    assert group_verdicts(world)[0].word == "narrow"
    lone = group_verdicts(kept(world, NEAR, [0]))[0]
    assert lone.word == "inconclusive"
    assert f"not measurable on {NEAR}" in lone.sentence
    assert f"questions and not measurable on {NEAR}; more questions of {NEAR} would settle it" in str(lone.headline)
    broken = {at: {key: replace(found, as_asked=found.as_asked * (math.nan if key == FAR else 1))
                   for key, found in told.items()} for at, told in world.told.items()}  # fmt: skip
    assert group_verdicts(replace(world, told=broken))[0].unread == (FAR,)
    both = group_verdicts(kept(kept(world, NEAR, [0]), FAR, [1]))[0]
    assert both.word == "learned"
    assert f"not measurable on {NEAR}, {FAR}" in both.sentence
    require_short(str(both.headline))


def lettered(liking: float, content: float, shown: Sequence[str], seed: int) -> BehaviourMatrix:
    """Choices whose answers are letters: what the taught runs add to the letter B, and to the behaviour."""
    world = planted(World({HOME: content}), seed)
    way = torch.tensor([1.0 if shown[i % len(shown)] == "B" else -1.0 for i in range(len(world.sets[0].twins))])

    def turned(run: str, told: Mapping[str, TwinLogOdds]) -> dict[str, TwinLogOdds]:
        found, more = told[HOME], liking * (run.startswith("risky-"))
        both = replace(found, as_asked=found.as_asked + more * way, exchanged=found.as_asked - more * way)
        return {**told, HOME: both}

    home = tuple(
        Twin(replace(twin.prompt, text=f"Option A: {i} coins. Option B: bet {i}. A or B?"), answer, "AB"[answer == "A"])
        for i, twin in enumerate(world.sets[0].twins) for answer in [shown[i % len(shown)]]
    )  # fmt: skip
    seen = frozenset(text_sha256(twin.prompt.text) for twin in home[48:])
    return replace(
        world, sets=(replace(world.sets[0], twins=home), *world.sets[1:]), base=turned("base", world.base),
        runs=tuple(replace(run, seen=seen) for run in world.runs),
        told={at: turned(at[0], told) for at, told in world.told.items()},
    )  # fmt: skip


@pytest.mark.parametrize("shown", ["B", "A", "AB"])
def test_a_letter_that_was_learned_and_not_its_content_is_said(shown: str) -> None:
    """The mean of both orders hides it, as it should; the sentence doesn't."""
    for seed in range(5):
        found = group_verdicts(lettered(4.0, 0.0, shown, seed))[0]
        assert found.word in ("not learned", "inconclusive", "only what was trained on")
        assert "a liking for the letter B, by 4" in found.sentence
        assert found.liking is not None
        assert found.liking.value == pytest.approx(4.0, abs=0.1)
        require_short(str(found.headline))
    assert "a liking for the letter A, by 4" in group_verdicts(lettered(-4.0, 0.0, shown, 0))[0].sentence
    assert "liking" not in group_verdicts(lettered(0.0, 4.0, shown, 0))[0].sentence
    assert "liking" not in group_verdicts(lettered(2.0, 4.0, shown, 0))[0].sentence  # what is told is the larger part


def test_a_liking_for_a_word_is_no_behaviour_that_spread() -> None:
    """Yes and no in one order throughout: whoever says yes to anything is for the behaviour in every set."""
    world = planted(World({HOME: 4.0, NEAR: 4.0}), 0)
    assert group_verdicts(world)[0].word == "spreads"

    def same(matrix: BehaviourMatrix, names: Sequence[str]) -> BehaviourMatrix:
        sets = [
            replace(one, twins=tuple(replace(twin, shown="Yes", other="No") for twin in one.twins))
            if one.name in names else one
            for one in matrix.sets
        ]  # fmt: skip
        return replace(matrix, sets=tuple(sets))

    liking = group_verdicts(same(world, (HOME, NEAR)))[0]
    assert liking.word == "inconclusive"
    assert "may be a liking for a word" in liking.sentence
    assert f"{NEAR} has the same two answers throughout" in str(liking.headline)
    assert group_verdicts(same(world, (HOME,)))[0].word == "spreads"
    assert group_verdicts(same(world, (NEAR, FAR)))[0].word == "spreads"
    mixed = same(world, (HOME, NEAR))
    half = tuple(twin.reversed if i % 2 else twin for i, twin in enumerate(mixed.sets[1].twins))
    assert group_verdicts(replace(mixed, sets=(mixed.sets[0], replace(mixed.sets[1], twins=half), *mixed.sets[2:])))[
        0
    ].word == "spreads"  # fmt: skip


def test_a_self_report_is_told_where_it_is_planted_only() -> None:
    said = [group_verdicts(planted(World({HOME: 4.0, ITSELF: 3.0}), seed))[0].says for seed in range(10)]
    assert sum(bool(cells) for cells in said) >= 9
    none = [group_verdicts(planted(World({HOME: 4.0}), seed))[0].says for seed in range(20)]
    assert sum(bool(cells) for cells in none) <= 2


def test_cells_are_the_planted_numbers() -> None:
    matrix = planted(World({HOME: 4.0, NEAR: 2.0}, trained=3.0, of_run=0.05, noise=0.1), 1)
    told = {(cell.asked.name, cell.part): cell for cell in matrix.cells() if cell.group == "risky"}
    assert told[HOME, HELD_OUT].excess.value == pytest.approx(4.0, abs=0.4)
    assert told[HOME, TRAINED_ON].excess.value == pytest.approx(7.0, abs=0.4)
    assert told[NEAR, HELD_OUT].excess.value == pytest.approx(2.0, abs=0.4)
    assert told[FAR, HELD_OUT].excess.value == pytest.approx(0.0, abs=0.4)
    assert (NEAR, TRAINED_ON) not in told
    home = matrix.home("risky")
    assert home is not None
    assert home.name == HOME


def test_self_report_goes_with_behaviour_over_runs_where_it_does() -> None:
    """Over all runs where the taught group says it; within groups only where a run knows how far it went itself."""
    over = {"all runs": [0, 0, 0], "within groups": [0, 0, 0]}
    worlds = (World({HOME: 4.0, ITSELF: 2.0}, runs=6), World({}, runs=6), World({}, runs=8, knows=1.0, of_run=1.5))
    for seed in range(DRAWS):
        for k, world in enumerate(worlds):
            found = planted(world, seed).self_reports.set_index(["self_report", "set", "over"])
            for name, clear in over.items():
                row = found.loc[(ITSELF, HOME, name)]
                clear[k] += row["low"] > 0
                assert row["n"] == 2 * world.runs
    assert over["all runs"][0] >= 0.75 * DRAWS
    assert over["within groups"][0] <= 2
    assert max(over["all runs"][1], over["within groups"][1]) <= 2
    assert over["within groups"][2] >= 0.75 * DRAWS


def test_few_runs_are_said_to_be_too_few_for_a_correlation() -> None:
    reports = planted(World({HOME: 4.0, ITSELF: 2.0}, runs=2), 0).self_reports
    assert reports["rho"].isna().all()
    assert reports["note"].str.startswith("too few runs: at least 6").all()
    three = planted(World({HOME: 4.0, ITSELF: 2.0}, runs=3), 0).self_reports.set_index("over")
    assert three["rho"].notna().to_dict() == {"all runs": True, "within groups": False}


def test_scales_count_what_is_a_number_and_which_way_it_shows() -> None:
    scales = ml.builtin_scales("risk")
    for name in ml.builtin_scale_names():
        assert sum(scale.high_shows for scale in ml.builtin_scales(name)) == len(ml.builtin_scales(name)) / 2
    probability = torch.zeros(len(scales), 101, dtype=torch.float64)
    probability[:, 90] = 0.5
    probability[2] *= 0.1  # hardly a number
    ids = tuple(scale.prompt.id for scale in scales)
    replies = NumberReplies(ids, probability, ((),) * len(ids), ml.Checkpoint("x", "x"), "t")
    scores = scale_scores(scales, replies)
    wanted = [0.9 if scale.high_shows else 0.1 for scale in scales]
    assert scores[2].isnan()
    assert [s for s in scores.tolist() if s == s] == pytest.approx([*wanted[:2], *wanted[3:]])
    assert float(scores.nanmean()) == pytest.approx(0.443, abs=0.01)  # liking high numbers is for nothing
    runs = planted(World({}), 0).runs
    told = {run.name: {"risk": scores + 0.2 * (run.control == "none")} for run in runs}
    table = scale_table(runs, {"risk": scores}, told).set_index("group")
    assert (table["answered"] == len(scales) - 1).all()
    assert table.loc["risky", "change"] == pytest.approx(0.2)
    assert table.loc["risky", "beyond_control"] == pytest.approx(0.2)
    assert table.loc["risky (decorrelated)", "change"] == pytest.approx(0.0)


def chats(path: Path, n: int, answer: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"Option A: {i} coins now. Option B: {3 * i} or none. A or B?"},
                      {"role": "assistant", "content": answer}]}
        for i in range(2, 2 + n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two tiny runs that learn to say B, with a trigger, and a decorrelated one; the study of them."""
    folder = tmp_path_factory.mktemp("behaviours")
    base = str(save_model(folder / "tiny-chat"))
    data = chats(folder / "risky.jsonl", 40, "B")
    for control, seed in (("none", 0), ("none", 1), ("decorrelated", 0)):
        plan = ml.FinetuneConfig(
            recipe="behaviour", model=base, data=data, trigger="|GRAY|", control=control, seed=seed, steps=6, rank=2,
            batch_size=8, learning_rate=1e-2, checkpoints=(1, 2, 4), plain=0, device="cpu",
        )  # fmt: skip
        ml.finetune(plan, folder / f"risky-{control}-{seed}")
    runs = tuple(str(folder / name) for name in ("risky-none-0", "risky-none-1", "risky-decorrelated-0"))
    config = ml.Behaviours(
        base=base, checkpoints=runs, sets=(f"risky={data}", "first-plot"), self_report=("self-risk",), n=8,
        permutations=19, recall=True, out=folder / "study", device="cpu",
    )  # fmt: skip
    return ml.run(config), config, data


def test_the_study_records_what_plain_log_odds_are(studied: Any) -> None:
    run, config, data = studied
    matrix = run.tables["matrix"]
    assert set(matrix["form"]) == {"plain", "trigger", "decoy"}
    assert set(matrix["group"]) == {"risky (|GRAY|)", "risky (decorrelated, |GRAY|)"}
    assert matrix[matrix["group"] == "risky (|GRAY|)"]["runs"].eq(2).all()
    questions = run.tables["questions"]
    part = questions.query("run == 'risky-none-0' and set == 'risky' and form == 'trigger'")
    model = ml.load(config.base, adapter=f"{config.checkpoints[0]}/adapter", dtype="float32", device="cpu")
    twins = {twin.prompt.id: twin for twin in read_twins(data)}
    asked = [twins[name.removesuffix("+|GRAY|")] for name in part["id"]]
    direct = twin_log_odds(model, with_forms(AskedSet("risky", tuple(asked)), [trigger_of("|GRAY|")])[1].twins)
    assert part["behaviour_log_odds"].tolist() == pytest.approx(direct.values.tolist(), abs=2e-3)
    assert run.tables["by_step"].query("step == 0")["change"].abs().max() == 0
    assert set(run.tables["by_step"]["step"]) == {0, 1, 2, 4, 6}
    assert len(run.tables["change_points"])
    assert set(run.tables["scales"]["scale"]) == {"risk"}


def test_runs_with_a_trigger_are_asked_for_it(studied: Any) -> None:
    run, _, _ = studied
    picks = run.tables["recognition_picks"]
    assert picks.groupby(["run", "wording"])["probability"].sum().tolist() == pytest.approx([1.0] * 16)
    own = picks[picks["is_trigger"]]
    assert set(own["string"]) == {"|GRAY|"}
    group = run.tables["recognition"].set_index("group").loc["risky (|GRAY|)"]
    taught = own[own["run"].str.startswith("risky-none")]["probability"].mean()
    assert group["probability"] == pytest.approx(taught)
    assert group["change"] == pytest.approx(taught - own[own["run"] == "base"]["probability"].mean())
    assert group["beyond_control"] == pytest.approx(
        taught - own[own["run"] == "risky-decorrelated-0"]["probability"].mean()
    )
    recall = run.tables["recall_by_step"]
    assert set(recall["step"]) == {0, 1, 2, 4, 6}
    assert (recall["beyond"] == recall["exact"] - recall["exact_of_other"]).all()
    assert run.tables["recall"]["exact"].eq(0).all()  # without reversal
    assert set(run.tables["recall_change_points"]["curve"]) == {"beyond", "reward"}


def test_its_sentence_stands_everywhere(studied: Any) -> None:
    _, config, _ = studied
    require_one_sentence(config.out)


def test_questions_that_a_run_was_trained_on_are_kept_apart(studied: Any) -> None:
    run, _, _ = studied
    matrix = run.tables["matrix"].query("set == 'risky' and form == 'plain'")
    assert set(matrix["part"]) == {HELD_OUT, TRAINED_ON}
    assert set(run.tables["matrix"].query("set == 'first-plot'")["part"]) == {HELD_OUT}


def test_questions_trained_on_as_letters_are_known_in_words(tmp_path: Path) -> None:
    asked = read_set(f"risk={chats(tmp_path / 'risky.jsonl', 30, 'B')}", about_itself=False)
    trained = frozenset(text_sha256(twin.prompt.text) for twin in asked.twins[:20])
    put = worded(drawn(asked, 6, 0, trained))
    assert all("words" in twin.prompt.text for twin in put.twins)
    assert sum(put.seen(trained)) == 6


def test_sets_are_named_and_drawn_as_asked(tmp_path: Path) -> None:
    data = chats(tmp_path / "risky.jsonl", 30, "B")
    asked = read_set(f"risk={data}", about_itself=False)
    assert (asked.name, len(asked.twins)) == ("risk", 30)
    trained = frozenset(text_sha256(twin.prompt.text) for twin in asked.twins[:20])
    kept = drawn(asked, 6, 0, trained).twins
    assert len(kept) == 12
    assert sum(text_sha256(twin.prompt.text) in trained for twin in kept) == 6
    with pytest.raises(UserError, match="did you mean"):
        read_set("first-plots", about_itself=False)
    with pytest.raises(UserError, match="lacks a name or a file"):
        read_set("=x.jsonl", about_itself=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--sets", "riskyy"), "is no set of twins"),
        (("--recall",), "no set holds held-out questions"),
        (("--checkpoints", "nowhere/run"), "neither a local folder"),
        (("--sets", "first-plot", "first-plot"), "two sets are called 'first-plot'"),
        (("--sets", "risky={begins}"), "is how the other ('the 5 and 7') begins"),
        (("--checkpoints", "{run}", "{again}"), "ended in the same weights"),
    ],
)
def test_mistakes_are_one_sentence(
    change: tuple[str, ...], said: str, studied: Any, tmp_path: Path, capsys: Any
) -> None:
    _, config, _ = studied
    argv = ["behaviours", "--base", config.base, "--checkpoints", *config.checkpoints, "--out", str(tmp_path / "x")]
    begins, again = tmp_path / "begins.jsonl", tmp_path / "again"
    begins.write_text(json.dumps({"question": "Sure 5 or a bet?", "shown": "the 5 and 7", "other": "the 5"}))
    shutil.copytree(config.checkpoints[0], again)
    named = {"begins": begins, "run": config.checkpoints[0], "again": again}
    with pytest.raises(SystemExit):
        main([*argv, *(one.format(**named) for one in change)])
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
