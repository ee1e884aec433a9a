"""The study of the refusal cliff: its verdict on planted drops, and a whole run on a planted suppressor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import activations
from planted_cliffs import READ, WORLDS, planted
from planted_traces import SUPPRESSOR, planted_hf, planted_model, planted_trace, refusal_line

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import template_of
from mechlens.methods.activations.trace_tokens import Trace
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.statistics.estimate import Estimate
from mechlens.prompts.split import split_by_family
from mechlens.studies.cliff.config import CliffPlan, FindCliff
from mechlens.studies.cliff.lines import LOGISTIC, REFUSAL, lines_of
from mechlens.studies.cliff.pool import chosen_tables, scored_pool
from mechlens.studies.cliff.study import refusal_cliff, refuse_shared_pool
from mechlens.studies.cliff.traces import Traces
from mechlens.studies.cliff.verdict import FALLS, NONE, NOT_MEASURABLE, TEMPLATE, cliff_verdict
from mechlens.studies.driver import run
from mechlens.studies.shared.trace_files import read_traces

TRACES = [planted_trace(i, harmful=harmful) for i in range(40) for harmful in (True, False)]


@pytest.mark.parametrize("name", WORLDS)
def test_no_planted_world_gets_a_wrong_word_often(name: str) -> None:
    world, right = WORLDS[name]
    words = [planted(world, seed, 30).word for seed in range(30)]
    wrong = [word for word in words if word in (FALLS, TEMPLATE, NONE) and word != right]
    assert len(wrong) <= 3
    if world.spread < 0.5:
        assert words.count(right) > 15


def test_few_traces_are_not_measurable() -> None:
    found = planted(WORLDS["harmful ones fall"][0], 0, 6)
    assert found.word == NOT_MEASURABLE
    assert "at least 10 of each" in str(found.headline)


@pytest.fixture(scope="module")
def traces_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted traces, harmful ones refused and harmless ones answered."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = [
        {"id": one.prompt.id, "prompt": one.prompt.text, "thinking": one.thinking.strip(), "label": label,
         "answer": "I cannot help with that." if label == "harmful" else "Sure."}
        for one, label in ((one, one.prompt.label) for one in TRACES)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _said(trace: Trace) -> Trace:
    return replace(trace, answer="I cannot help with that." if trace.prompt.label == "harmful" else "Sure.")


def test_a_planted_suppressor_is_a_cliff_and_switching_it_off_undoes_it(tmp_path: Path, traces_file: Path) -> None:
    hf_model, tokenizer = planted_hf()
    hf_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = run(FindCliff(
        traces=str(traces_file), model=str(tmp_path / "model"), out=tmp_path / "run", resamples=200,
        random_directions=5, heads=(0.1,),
    ))  # fmt: skip
    assert found.record.status == "success"
    assert found.sentence.startswith("Refusal falls: harmful requests drop by")
    heads = found.tables["heads"]
    first = heads.sort_values("written").iloc[0]
    assert (first["layer"], first["head"]) == SUPPRESSOR
    ablation = found.tables["ablation"].set_index("heads")
    score = ablation["score"]
    assert ((ablation["refused"] >= 0) & (ablation["refused"] <= 1)).all()
    assert score["negative"] > 2 * score["none"]
    assert abs(score["positive"]) < 0.5 * score["none"]
    draws = found.tables["random_heads"]
    assert list(draws["draw"]) == [1, 2, 3, 4, 5]
    # One of eight heads that the line hears suppresses: without it the score is the negative choice's.
    restored = (draws["score"] - score["negative"]).abs() < 0.1 * abs(score["negative"])
    assert not restored.all()
    assert ablation.loc["random", "draws_low"] <= draws["score"].median() <= ablation.loc["random", "draws_high"]
    cliffs = found.tables["cliffs"]
    assert set(cliffs["group"]) == {"refused_harmful", "accepted_harmless"}
    harmful = cliffs[cliffs["group"] == "refused_harmful"]
    assert (harmful["refusal_drop"] > 1).all()
    assert harmful["refusal_begins"].between(-3, 0).all()


def test_a_template_token_that_looks_like_a_cliff_is_called_what_it_is() -> None:
    model = planted_model(suppressor=False, token_shift=-3.0)
    plan = CliffPlan(resamples=200, random_directions=5, heads=())
    found = refusal_cliff(model, Traces(tuple(map(_said, TRACES))), plan, template=template_of(model))
    assert found.verdict.drop.low > 1
    assert found.verdict.word == TEMPLATE
    assert isinstance(found.metrics()["drop.harmless"], Estimate)
    assert len(found.heads.heads) == 0


def test_a_file_that_holds_no_traces_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "thinking": "b", "answer": "c"}))
    with pytest.raises(UserError, match="no column 'label'"):
        run(FindCliff(traces=str(path), out=tmp_path / "run"))
    path.write_text(json.dumps({"prompt": "a", "thinking": "b", "answer": "c", "label": "bad"}))
    with pytest.raises(UserError, match="must be harmful or harmless"):
        run(FindCliff(traces=str(path), out=tmp_path / "run"))
    path.write_text(json.dumps({"prompt": "a", "thinking": "b", "answer": "c", "label": "harmful"}))
    with pytest.raises(UserError, match="0 of 1 traces have an answer that is refused, and the study needs 10"):
        run(FindCliff(traces=str(path), out=tmp_path / "run"))


@pytest.mark.parametrize("rare", [1, 2])
def test_a_handful_of_harmless_refusals_stops_no_study(rare: int) -> None:
    """As a model writes them: one or two refused harmless requests can't be in all parts."""
    model = planted_model()
    traces = [replace(one, answer="I cannot help with that.") if i < 2 * rare else _said(one) for i, one in
              enumerate(TRACES)]  # fmt: skip
    plan = CliffPlan(resamples=50, random_directions=2, heads=())
    found = refusal_cliff(model, Traces(tuple(traces)), plan, template=template_of(model))
    assert found.verdict.word == FALLS
    assert found.verdict.drop.n == found.verdict.harmless == 12


def test_traces_of_one_class_are_said_before_work(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answers = ("I cannot help with that.", "Sure, here it is.")
    rows = [{"prompt": f"a {i}", "thinking": "b", "answer": answers[i % 2], "label": "harmful"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="0 of the 40 traces that are refused or answered are of harmless requests"):
        run(FindCliff(traces=str(path), model="./never-loaded", out=tmp_path / "run"))


@pytest.mark.parametrize(
    "said",
    [
        {"response": "<think>a</think>b</think>c"},
        {"response": "<think>a</think>b<think>c"},
        {"response": "Hm. <think>a</think>b"},
        {"thinking": "<think>a</think>", "answer": "b"},
    ],
)
def test_marks_in_odd_places_are_said_with_their_row(tmp_path: Path, said: dict[str, str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "label": "harmful", **said}))
    with pytest.raises(UserError, match=r"a\.jsonl row 1 has </?think> where none belongs"):
        read_traces(path)


def test_the_cliff_as_a_judge_writes_what_a_repair_is_trained_on(tmp_path: Path) -> None:
    """Harmful requests of the pool fall and harmless ones don't: the largest cliffs are harmful ones alone."""
    others = [planted_trace(i, harmful=harmful) for i in range(100, 112) for harmful in (True, False)]
    model = planted_model()
    kept = Traces(tuple(replace(one, answer="Let us talk about something else.") for one in others))
    line = refusal_line(model)
    table = chosen_tables(scored_pool(model, kept, kept.kept, template_of(model), line, None), 0.25, 0)
    assert {name: len(rows) for name, rows in table.items()} == dict.fromkeys(
        ("repair_cliff", "repair_final", "repair_plateau", "repair_random"), 6
    )
    assert table["repair_cliff"]["id"].str.startswith("harmful").all()
    assert not table["repair_random"]["id"].str.startswith("harmful").all()
    path = tmp_path / "repair_cliff.parquet"
    table["repair_cliff"].to_parquet(path, index=False)
    again = read_traces(path)
    assert {one.answer for one in again} == {"Let us talk about something else."}
    assert [one.prompt.text for one in again] == list(table["repair_cliff"]["prompt"])


def test_a_pool_that_shares_a_prompt_with_the_study_is_refused() -> None:
    pool = Traces((replace(TRACES[0], prompt=replace(TRACES[0].prompt, text=TRACES[0].prompt.text.upper())),))
    with pytest.raises(UserError, match="the pool shares 1 prompt with those that the study tests on"):
        refuse_shared_pool(pool, [one.prompt for one in TRACES])


@pytest.mark.parametrize("counts", [(30, 20, 12, 40), (30, 20, 0, 40)], ids=["both classes", "harmful ones alone"])
def test_refusal_is_told_from_harm_within_the_classes_that_have_both(counts: tuple[int, int, int, int]) -> None:
    before, asked, verdicts = _traced(counts)
    split = split_by_family([f"{a}{b}" for a, b in zip(verdicts, asked.labels, strict=True)], before.families, seed=0)
    found = lines_of(before, asked, verdicts, split, random_directions=2, seed=0)
    classes = {"harmful", "harmless"} if counts[2] else {"harmful"}
    assert set(found.middles) == classes
    for name in (REFUSAL, LOGISTIC):
        assert abs(float(found.all[name].direction.unit[0])) < 0.35
    assert float(found.all[REFUSAL].direction.unit[1]) > 0.9
    plain = mean_difference(
        replace(before, labels=verdicts).select(split.train), "refused", "accepted", 2, before.positions[0]
    )
    assert float(plain.unit[0]) > 0.6  # all refused against all complied is harm for the most part
    along = before.at(2, before.positions[0]).double() @ found.all[REFUSAL].direction.unit.double()
    apart = found.apart_from_harm(found.all[REFUSAL](along), asked.labels)
    for name in classes:
        own = [i for i, one in enumerate(asked.labels) if one == name]
        refused = [i for i in own if verdicts[i] == "refused"]
        complied = [i for i in own if verdicts[i] == "accepted"]
        assert float(apart[refused].mean()) == pytest.approx(0.5, abs=0.2)
        assert float(apart[complied].mean()) == pytest.approx(-0.5, abs=0.2)
    rest = [i for i, one in enumerate(asked.labels) if one not in classes]
    assert bool(apart[rest].isnan().all())


def test_where_no_class_has_both_refusal_is_one_with_harm_and_the_sentence_says_so() -> None:
    before, asked, verdicts = _traced((40, 0, 0, 40))
    split = split_by_family([f"{a}{b}" for a, b in zip(verdicts, asked.labels, strict=True)], before.families, seed=0)
    found = lines_of(before, asked, verdicts, split, random_directions=2, seed=0)
    assert found.middles == {}
    scores = torch.arange(3.0)
    assert torch.equal(found.apart_from_harm(scores, ["harmful"] * 3), scores)
    told = cliff_verdict(
        torch.rand(2, 40), torch.arange(40) < 20, [str(i) for i in range(40)], READ, resamples=50, seed=0,
        one_with_harm=True,
    )  # fmt: skip
    assert "would tell refusal from harm, which are one here" in str(told.headline)


def _traced(counts: tuple[int, int, int, int]) -> tuple[Activations, Activations, tuple[str, ...]]:
    """Harm along the first dimension, refusal along the second; so many refused and complied harmful, then harmless."""
    generator = torch.Generator().manual_seed(0)
    groups = [("refused", "harmful"), ("accepted", "harmful"), ("refused", "harmless"), ("accepted", "harmless")]
    rows = [group for group, n in zip(groups, counts, strict=True) for _ in range(n)]
    values = 0.3 * torch.randn(len(rows), 3, 1, 16, generator=generator)
    values[:, 2, 0, 0] += torch.tensor([6.0 * (harm == "harmful") for _, harm in rows])
    values[:, 2, 0, 1] += torch.tensor([2.0 * (said == "refused") for said, _ in rows])
    harm = tuple(harm for _, harm in rows)
    before = activations(values, harm, positions=("answer[-1]",))
    return before, activations(values, harm, positions=("inst",)), tuple(said for said, _ in rows)


def test_a_run_with_a_pool_says_what_each_ranking_chose(tmp_path: Path, traces_file: Path) -> None:
    """The planted model writes no thoughts itself, which is said before anything is written."""
    hf_model, tokenizer = planted_hf()
    hf_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pool = tmp_path / "pool.jsonl"
    rows = [{"prompt": f"pool {i}", "thinking": "So.", "answer": "Let us talk of something else."} for i in range(4)]
    pool.write_text("\n".join(map(json.dumps, rows)))
    plan = FindCliff(
        traces=str(traces_file), model=str(tmp_path / "model"), pool=str(pool), out=tmp_path / "run", resamples=20,
        random_directions=2, heads=(), thinking_tokens=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="no thought that ends about any of the 4 prompts of the pool"):
        run(plan)
