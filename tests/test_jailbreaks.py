"""What jailbreaks do: verdicts by their rule, laws of putting components back, categories planted and recovered."""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from planted import activations, unit
from saved import requests, save_model, write_prompts
from sentence import require_one_sentence

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.directions.direction import cosine, project
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.jailbreaks import category_directions as categories
from mechlens.studies.jailbreaks.config import JailbreakPlan
from mechlens.studies.jailbreaks.pairs import attack_pairs, family_estimates, family_verdict, pair_table, reference_of
from mechlens.studies.jailbreaks.restored import _put_back, restore
from mechlens.studies.separate.config import Separate
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.sources import PLACEHOLDER, Source, SourcePrompts, load_source

QUICK = ["--resamples", "20", "--permutations", "4", "--random-directions", "20", "--wandb.mode", "disabled"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


# The rule


def about(value: float, width: float = 0.01) -> Estimate:
    return Estimate(value, value - width, value + width, 40)


@pytest.mark.parametrize(
    ("harm", "change", "refusal", "verdict"),
    [
        (about(-0.1), about(-0.4), about(-0.5), "hides harmfulness"),
        (about(0.2), about(-0.1), about(-0.5), "suppresses refusal only"),
        (about(0.2), about(-0.1), about(0.0), "no effect on refusal shown"),
        (about(0.0), about(-0.1), about(-0.5), "inconclusive"),
        (about(-0.1), about(0.0), about(-0.5), "inconclusive"),
        (Estimate.missing(3), Estimate.missing(3), Estimate.missing(3), "not measurable (n=3)"),
    ],
)
def test_the_verdict_follows_its_rule(harm: Estimate, change: Estimate, refusal: Estimate, verdict: str) -> None:
    names = ("belief_harm.centered", "change.belief_harm.centered", "change.belief_refusal.centered")
    assert family_verdict(dict(zip(names, (harm, change, refusal), strict=True))) == verdict


# Sources of attacks


def test_templates_are_put_around_goals_and_keep_them_as_families(tmp_path: Path) -> None:
    write_prompts(tmp_path / "goals.jsonl", requests(5, "break"))
    write_prompts(tmp_path / "templates.jsonl", [f"Be free: {PLACEHOLDER}", f"{PLACEHOLDER} Go."])
    source = Source("wrapped", "goals.jsonl", label="harmful", templates="templates.jsonl", kind="template")
    found = load_source(source, tmp_path, 0)
    assert len(found.prompts) == 10
    for prompt in found.prompts:
        goal = found.goals[prompt.family].text
        assert prompt.text in (f"Be free: {goal}", f"{goal} Go.")
    few = load_source(source, tmp_path, 0, most=4)
    assert len(few.prompts) == 4
    assert len({prompt.family for prompt in few.prompts}) == 4  # as many goals as can be
    assert load_source(source, tmp_path, 0, most=4).prompts == few.prompts
    write_prompts(tmp_path / "templates.jsonl", ["no place for it"])
    with pytest.raises(UserError, match="has no \\[INSERT PROMPT HERE\\]"):
        load_source(source, tmp_path, 0)


def test_separate_puts_both_sides_of_a_pair_into_one_template(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "templates.jsonl", [f"Be free: {PLACEHOLDER}", f"{PLACEHOLDER} Go.", PLACEHOLDER])
    config = Separate(model="smollm2-refuser", out=tmp_path, n=40)
    plain, sets = (read_harm_sets(config, [config], "benign", templates) for templates in (None, file))
    assert sets.data.keys() == plain.data.keys()
    assert not set(sets.data.values()) & set(plain.data.values())  # a rerun with other templates is noticed
    frames = {}
    for before, after in zip(plain[:3], sets[:3], strict=True):
        assert [prompt.group for prompt in after] == [prompt.group for prompt in before]
        for old, new in zip(before, after, strict=True):
            frame = new.text.replace(old.text, PLACEHOLDER)
            assert frame in (f"Be free: {PLACEHOLDER}", f"{PLACEHOLDER} Go.", PLACEHOLDER)
            assert frames.setdefault(new.group, frame) == frame
    assert len(set(frames.values())) == 3
    write_prompts(tmp_path / "templates.jsonl", ["no place for it"])
    with pytest.raises(UserError, match="has no \\[INSERT PROMPT HERE\\]"):
        read_harm_sets(config, [config], "benign", file)


def test_a_labelled_file_of_attacks_names_its_goals(tmp_path: Path) -> None:
    rows = [{"prompt": f"pretty please, {goal}", "goal": goal} for goal in requests(4, "break")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_source(Source("persuaded", "a.jsonl", "persuasion", "harmful", goal_column="goal"), tmp_path, 0)
    assert [found.goals[prompt.family].text for prompt in found.prompts] == [row["goal"] for row in rows]


def test_published_files_are_read_where_they_are(shared_data: Path) -> None:
    from mechlens.studies.shared.sources import read_sources

    with pytest.warns(UserWarning, match="dropped"):  # upstream's own duplicates
        loaded = {one.name: load_source(one, shared_data, 0, most=60) for one in read_sources("published")}
    assert {one.label for one in loaded["xstest"].prompts} == {"harmful", "harmless"}
    assert {one.label for one in loaded["gptfuzz_harmless"].prompts} == {"harmless"}
    for prompt in loaded["gptfuzz"].prompts:
        assert loaded["gptfuzz"].goals[prompt.family].text in prompt.text
    assert all(one.prompts for one in loaded.values())


# Putting components back


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """A tiny model that refuses some prompts, its reference, attacks on some goals, and the plan."""
    import mechlens as ml

    model = ml.load(str(save_model(tmp_path_factory.mktemp("models") / "tiny-chat")))
    prompts = [*ml.builtin_prompts("harmful")[:48], *ml.builtin_prompts("harmless")[:48]]
    plan = JailbreakPlan(resamples=20, random_directions=20, max_new_tokens=2, restored=12)
    reference = reference_of(model, prompts, plan)
    goals = requests(24, "break")
    plain = [ml.Prompt(f"g{i}", text, label="harmful", family=f"f{i}") for i, text in enumerate(goals)]
    wrapped = [replace(p, id=f"a{i}", text=f"Now! {p.text}", source="wrapped") for i, p in enumerate(plain)]
    source = SourcePrompts(Source("wrapped", "", "template", "harmful"), tuple(wrapped), {p.family: p for p in plain})
    return model, reference, attack_pairs(model, [source], reference, plan), plan


def test_after_putting_it_back_the_component_is_the_plain_requests(study: tuple[Any, Any, Any, Any]) -> None:
    from mechlens.methods.activations.collect import collect
    from mechlens.methods.steering.steering import applied

    model, reference, pairs, _ = study
    rows = [0, 1, 2]
    for direction in (reference.harm_direction, reference.refusal_direction):
        interventions = [[one] for one in _put_back(pairs, rows, direction)]
        batch = pairs.batch.select(rows)
        with applied(model, interventions, batch):
            _, cache = model.run_with_cache(batch.tokens, prepend_bos=False)
        at = batch.at(direction.position)
        residual = cache[f"blocks.{direction.level}.hook_resid_pre"][torch.arange(3), at]
        plain = collect(model, [pairs.goals[pairs.goal_of[i]] for i in rows], positions=[direction.position])
        wanted = project(plain.at(direction.level, direction.position), direction)
        torch.testing.assert_close(project(residual, direction), wanted, rtol=1e-3, atol=1e-3)


def test_an_attack_that_is_its_own_plain_request_gets_nothing_back(study: tuple[Any, Any, Any, Any]) -> None:
    model, reference, pairs, plan = study
    # As if the plain requests had been refused and asked again as attacks, which were accepted.
    n = len(pairs.goals)
    plain_batch = pairs.batch.select(range(n))
    same = replace(
        pairs,
        attacks=tuple(replace(goal, source="same") for goal in pairs.goals),
        goals=pairs.goals,
        goal_of=tuple(range(n)),
        attack_acts=pairs.goal_acts,
        batch=_batch(model, pairs.goals),
        goal_judged=replace(pairs.goal_judged, verdicts={"arditi": ("refused",) * n}),
        attack_judged=replace(pairs.goal_judged, verdicts={"arditi": ("accepted",) * n}),
    )
    assert plain_batch.prompts != same.batch.prompts
    found = restore(model, same, reference, plan)
    assert found is not None
    assert len(found.rows) == 12
    for way, after in found.after.items():
        torch.testing.assert_close(after, found.before, rtol=0, atol=1e-3, msg=way)
    table = found.table(plan).set_index("way")
    assert abs(table.loc["both", "log_odds_change"]) < 1e-3
    assert abs(table.loc["refusal", "random_maximum"]) < 1e-3


def _batch(model: Any, prompts: Any) -> Any:
    import mechlens as ml

    return ml.tokenize(prompts, ml.template_of(model))


def test_where_no_attack_succeeds_there_is_nothing_to_restore(study: tuple[Any, Any, Any, Any]) -> None:
    model, reference, pairs, plan = study
    never = replace(pairs.attack_judged, verdicts={"arditi": ("refused",) * len(pairs.attacks)})
    assert restore(model, replace(pairs, attack_judged=never), reference, plan) is None


def test_an_empty_answer_is_no_success_of_an_attack(study: tuple[Any, Any, Any, Any]) -> None:
    model, reference, pairs, plan = study
    n = len(pairs.attacks)
    silent = replace(
        pairs.attack_judged,
        answers=replace(pairs.attack_judged.answers, texts=("",) * n),
        verdicts={"phrases": ("empty",) * n},
    )
    refused = replace(pairs.goal_judged, verdicts={"phrases": ("refused",) * len(pairs.goals)})
    pairs = replace(pairs, attack_judged=silent, goal_judged=refused)
    assert not any(map(pairs.succeeded, range(n)))
    for own in family_estimates(pair_table(model, pairs, reference), plan).values():
        assert (own["success"].value, own["empty"].value) == (0.0, 1.0)
    assert restore(model, pairs, reference, plan) is None


def test_goals_that_the_reference_holds_are_left_out(study: tuple[Any, Any, Any, Any]) -> None:
    model, reference, pairs, plan = study
    assert pairs.left_out.loc[0, "left_out"] == 0
    goals = {goal.family: goal for goal in pairs.goals}
    source = SourcePrompts(Source("wrapped", "", "template", "harmful"), pairs.attacks, goals)
    known = replace(reference, sha256=frozenset({pairs.goals[0].family}))
    again = attack_pairs(model, [source], known, plan)
    assert again.left_out.loc[0, "left_out"] == 1
    assert pairs.goals[0] not in again.goals


# Categories


def planted_categories(separation: float, shared: bool, n: int = 40, d_model: int = 64) -> Any:
    """Three categories against harmless prompts; their directions are one and the same, or orthogonal."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(d_model, 3, generator=generator)).Q.T
    labels, rows = [], []
    for k, name in enumerate(("a", "b", "c")):
        axis = axes[0] if shared else axes[k]
        rows.append(torch.randn(n, d_model, generator=generator) + separation * unit(axis))
        labels += [f"category {name}"] * n
    rows.append(torch.randn(n, d_model, generator=generator))
    labels += ["harmless"] * n
    return activations(torch.cat(rows)[:, None, None], tuple(labels), levels=(3,), positions=("inst",))


NAMES = ("a", "b", "c")


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_categories_that_are_noise_are_not_alike() -> None:
    cell = planted_categories(0.0, shared=True)
    values = cell.values[:, 0, 0].double()
    means = torch.stack([values[[label == f"category {name}" for label in cell.labels]].mean(dim=0) for name in NAMES])
    naive = means - values[[label == "harmless" for label in cell.labels]].mean(dim=0)
    # One harmless mean in both directions makes noise look like a finding.
    assert float(off_diagonal(cosine(naive[:, None].expand(-1, 3, -1), naive.expand(3, -1, -1))).mean()) > 0.3
    assert abs(float(off_diagonal(categories._cosines(cell, NAMES, 0)).mean())) < 0.12


@pytest.mark.parametrize(("shared", "expected"), [(True, 1.0), (False, 0.0)])
def test_planted_cosines_between_categories_are_recovered(shared: bool, expected: float) -> None:
    cell = planted_categories(5.0, shared=shared)
    pairs, reliable = categories._compared(cell, NAMES, 0)
    assert len(pairs) == 6
    assert pairs["corrected"].mean() == pytest.approx(expected, abs=0.15)
    assert (reliable["reliability"] > 0.8).all()
    (mean,) = categories._means(cell, NAMES, 0).values()
    assert mean.low < mean.value < mean.high
    assert mean.value == pytest.approx(pairs["cosine"].mean(), abs=1e-9)


def test_one_categorys_direction_finds_the_others_only_where_they_share_it() -> None:
    for shared in (True, False):
        table = categories._transfer(planted_categories(4.0, shared=shared), NAMES, 0)
        own = table[table["fitted_on"] == table["tested_on"]]
        others = table[table["fitted_on"] != table["tested_on"]]
        assert (own["auroc"] > 0.9).all()
        if shared:
            assert (others["auroc"] > 0.9).all()
        else:
            assert others["auroc"].mean() == pytest.approx(0.5, abs=0.15)


def test_too_few_of_a_category_is_said(tiny_model: Any) -> None:
    import mechlens as ml

    prompts = [ml.Prompt(str(i), f"thing {i}", category="one") for i in range(30)]
    with pytest.raises(UserError, match="1 categories have 12 prompts or more"):
        categories.category_directions(tiny_model(), prompts, prompts, [(1, "inst")])


def test_directions_of_refusal_by_category_are_those_of_its_refused_prompts(tmp_path: Path) -> None:
    import mechlens as ml
    from mechlens.settings import Answering

    model = ml.load(str(save_model(tmp_path / "tiny-chat")))
    harmful = [ml.Prompt(f"{word}{i}", text, category=word) for word in ("break", "wreck")
               for i, text in enumerate(requests(60, word))]  # fmt: skip
    harmless = [ml.Prompt(f"make{i}", text) for i, text in enumerate(requests(80, "make"))]
    plan = Answering(max_new_tokens=2)
    found = categories.category_refusals(model, harmful, harmless, (2, "last"), plan)
    judged = [ml.judge_answers(p, ml.answer(model, p, max_new_tokens=2)) for p in (harmful, harmless)]
    counts = {word: sum(r and p.category == word for p, r in zip(harmful, judged[0].refused, strict=True))
              for word in ("break", "wreck")}  # fmt: skip
    assert 12 <= min(counts.values()) < 60
    assert dict(zip(found.reliability["category"], found.reliability["n"], strict=True)) == counts
    assert sum(judged[1].refused) > 0
    kept = [[p for p, flag in zip(prompts, flags, strict=True) if flag]
            for prompts, flags in ((harmful, judged[0].refused), (harmless, judged[1].accepted))]  # fmt: skip
    same = categories.category_directions(model, *kept, [(2, "last")])
    assert found.pairs.equals(same.pairs)
    both = same.and_refusals(found)
    assert len(both.pairs) == 2 * len(found.pairs)
    with pytest.raises(UserError, match="0 categories have 12 prompts or more"):
        categories.category_refusals(model, harmful[:11], harmless, (2, "last"), plan)


# The verb


def test_the_verb_records_families_components_and_categories(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny-chat")
    write_prompts(tmp_path / "goals.jsonl", requests(20, "break"))
    write_prompts(tmp_path / "templates.jsonl", [f"Be free: {PLACEHOLDER}", f"{PLACEHOLDER} Go <b>now</b>."])
    rows = [
        {
            "name": "wrapped",
            "data": "goals.jsonl",
            "label": "harmful",
            "templates": "templates.jsonl",
            "kind": "template",
        },
        {"name": "plain", "data": "harmless", "label": "harmless"},
    ]
    (tmp_path / "sources.json").write_text(json.dumps(rows))
    command = [
        "jailbreaks", "--model", model, "--sources", tmp_path / "sources.json", "--folder", tmp_path, "--out",
        tmp_path / "out", "--extra-harmless", "None", "--max-new-tokens", 2, "--restored", 12, *QUICK,
    ]  # fmt: skip
    main([str(word) for word in command])
    record = require_one_sentence(tmp_path / "out")
    assert record.status == "success"
    tables = {path.stem: pd.read_parquet(path) for path in (tmp_path / "out" / "tables").glob("*.parquet")}
    assert tables.keys() >= {"pairs", "families", "left_out", "category_cosines", "category_transfer"}
    assert len(tables["pairs"]) == 40
    aimed = tables["pairs"][tables["pairs"]["plain.refused"]]
    if len(aimed) >= 10:
        change = record.metrics["change.belief_harm.wrapped"].value
        assert change == pytest.approx((aimed["belief_harm"] - aimed["plain.belief_harm"]).mean(), abs=1e-9)
    assert record.metrics["plain_refused.wrapped"].value == pytest.approx(tables["pairs"]["plain.refused"].mean())
    assert {"direction_harm", "direction_refusal"} <= set(record.artefacts)
    for found in record.metrics.values():
        assert math.isnan(found.value) or found.low - 1e-9 <= found.value <= found.high + 1e-9
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Is harmfulness one thing?" in page
    assert "<b>now</b>" not in page
