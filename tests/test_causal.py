"""The causal battery: a planted model whose truth is known, its twins, and what can't be measured."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import planted_causal as planted
import pytest
import torch
from saved import save_model, write_prompts

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.damage import damage, repetition
from mechlens.methods.directions.direction import cosine, mean_difference
from mechlens.methods.directions.nulls import shuffled_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.methods.steering.interventions import residual_norms
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import bridge, has_hooks
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.runs.folder import FolderCache
from mechlens.runs.run import read_run
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMFUL, HARMLESS, Setting, intervene, pushes
from mechlens.studies.causal.grid import grid_layers
from mechlens.studies.causal.readings import pushed, read, subjects
from mechlens.studies.causal.study import Battery, run_battery, work_ahead
from mechlens.studies.causal.verdict import INCONCLUSIVE, NOT_SHOWN, SHOWN, causal_verdict

PLAN = CausalPlan(
    layers=(1, 2), strengths=(0.5,), n_validation=2, n_test=12, shuffled_directions=2, max_new_tokens=3, resamples=100
)
N = 40


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


def bridged(entangled: bool = False) -> Any:
    hf_model, tokenizer = planted.planted_model(entangled)
    checkpoint = Checkpoint("planted", "tests/planted", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tokenizer, checkpoint)


@pytest.fixture(scope="module")
def model() -> Any:
    return bridged()


@pytest.fixture(scope="module")
def found(model: Any) -> Battery:
    with one_thread():
        return run_battery(model, *planted.planted_requests(N), PLAN)


def test_the_planted_model_dissociates(found: Battery, model: Any) -> None:
    verdict = causal_verdict(found)
    assert verdict.word == SHOWN
    metrics = found.metrics()
    assert metrics["inversion_parsed"].value == 1.0
    assert metrics["inversion_auroc.unsteered"].value == 1.0
    assert metrics["inversion_shift.harmfulness.before"].value > 3
    # The refusal direction before the question does nothing; everywhere it pushes towards the word that refuses.
    assert abs(metrics["inversion_shift.refusal.before"].value) < 0.5
    assert metrics["inversion_shift.refusal.all"].high < -1
    assert not has_hooks(model)


def test_the_directions_are_the_planted_ones(found: Battery) -> None:
    for name, coordinate in (("harmfulness", planted.BELIEF), ("refusal", planted.WILL)):
        truth = torch.eye(planted.D_MODEL)[coordinate]
        assert cosine(found.tested[name].direction.vector, truth) > 0.8


def test_every_number_has_its_controls(found: Battery) -> None:
    metrics = found.metrics()
    named = [f"steer_refusal.{name}" for name in ("harmfulness", "refusal")]
    named += [f"inversion_shift.{name}.{scope}" for name in ("harmfulness", "refusal") for scope in ("before", "all")]
    for name in named:
        assert metrics[f"{name}.random"].measurable
        assert metrics[f"{name}.random_max"].value >= metrics[f"{name}.random"].value
        assert metrics[f"{name}.shuffled_max"].value >= metrics[f"{name}.shuffled"].value
    assert {control.n for one in found.tested.values() for control in one.random.values()} == {20}


def test_a_push_turns_the_replies_and_ablating_refusal_stops_it(found: Battery) -> None:
    replies = found.tested["harmfulness"].replies.set_index(["scope", "label", "belief"])["share"]
    for scope in ("before", "all"):
        assert replies[scope, HARMLESS, "harmful"] == 1.0
        assert replies[scope, HARMFUL, "harmless"] == 1.0
    table = found.tested["refusal"].damage.set_index(["operation", "measure"])["value"]
    assert table["none", "refused_harmful"] > 0.2
    assert table["ablate", "refused_harmful"] == 0.0
    assert table["add", "refused_harmless"] == 1.0
    assert table["add", "refused_harmless_zhao"] == 1.0  # both judges know "I cannot"
    assert table["none", "kl"] == pytest.approx(0.0, abs=1e-9)
    assert table["add", "kl"] > table["none", "kl"]
    harm = found.grid.rates
    assert set(harm["operation"]) == {"none", "add", "subtract", "ablate"}


def test_the_layer_is_chosen_where_the_direction_can_act(found: Battery) -> None:
    # Block 2 is the last that carries BELIEF on to the last token.
    assert found.grid.chosen["harmfulness"].layer in (1, 2)
    curve = found.grid.pushes.set_index(["direction", "layer", "measure"])["value"]
    assert curve["harmfulness", 1, "inversion.before"] > 2 * abs(curve["random", 1, "inversion.before"])


def test_entangled_and_shuffled_twins_do_not_dissociate() -> None:
    small = replace(PLAN, layers=(1,), random_directions=5)
    twin = run_battery(bridged(entangled=True), *planted.planted_requests(N), small)
    verdict = causal_verdict(twin)
    assert verdict.word == NOT_SHOWN
    assert "the refusal direction too shifts the reply" in verdict.sentence
    shuffled = run_battery(bridged(), *planted.shuffled_requests(N), replace(small, random_directions=2))
    assert not shuffled.measurable
    assert causal_verdict(shuffled).word == INCONCLUSIVE
    assert not shuffled.metrics()["inversion_shift.harmfulness.before"].measurable


def test_replies_that_do_not_parse_make_it_inconclusive(found: Battery) -> None:
    parsed = Estimate(0.79, 0.7, 0.9, 16)
    mute = replace(found, unsteered={**found.unsteered, "inversion_parsed": parsed})
    verdict = causal_verdict(mute)
    assert verdict.word == INCONCLUSIVE
    assert "79% of 16 unsteered replies" in verdict.sentence
    assert not mute.metrics()["inversion_shift.refusal.all.random_max"].measurable
    assert mute.metrics()["steer_refusal.refusal"].measurable
    blind = replace(found, unsteered={**found.unsteered, "inversion_auroc.unsteered": Estimate(0.9, 0.6, 1.0, 16)})
    assert causal_verdict(blind).word == INCONCLUSIVE


def test_a_model_that_never_refuses_has_no_refusal_direction(found: Battery) -> None:
    only = replace(
        found, tested={"harmfulness": found.tested["harmfulness"]}, counts={**found.counts, "refusal": (3, 37)}
    )
    verdict = causal_verdict(only)
    assert verdict.word == INCONCLUSIVE
    assert "3 of refusal" in verdict.sentence
    missing = only.metrics()["steer_refusal.refusal"]
    assert (missing.measurable, missing.n) == (False, 3)


def test_readings_equal_running_each_arm_by_itself(model: Any, found: Battery, tmp_path: Path) -> None:
    sides = zip((HARMFUL, HARMLESS), planted.planted_requests(3), strict=True)
    prompts = [replace(prompt, label=label) for label, own in sides for prompt in own]
    who = subjects(prompts, template_of(model))
    tested = found.tested["harmfulness"]
    norms = found_norms(model, prompts)
    setting = Setting(1, 0.5)
    arms = [
        [None] * 6,
        pushes(tested.direction, setting, norms, who.labels),
        [intervene(tested.direction, "ablate", setting, norms)] * 6,
    ]
    cache = FolderCache(tmp_path)
    values = read(model, who, arms, found.words, cache)
    pieces = sorted(tmp_path.iterdir())
    assert len(pieces) >= 3
    for a, arm in enumerate(arms):
        for i, one in enumerate(arm):
            batch = who.asked.batch.select([i])
            given = [] if one is None else [who.asked.select([i]).within(0, one, "before")]
            logits = logits_under(model, batch, given)
            assert float(values[a, i, 1]) == pytest.approx(float(found.words.asked.difference(logits)[0]), abs=1e-4)
    # From the cache: the same numbers, and nothing is made again.
    again = read(model, who, arms, found.words, cache)
    assert torch.equal(again, values)
    assert sorted(tmp_path.iterdir()) == pieces
    other = read(
        model, who, [*arms[:2], [intervene(tested.direction, "add", Setting(2, 0.5), norms)] * 6], found.words, cache
    )
    assert not torch.equal(other[2], values[2])
    change = pushed(values[1], values[0], who.harmful)
    assert bool((change[:, 1] > 0).all())


def found_norms(model: Any, prompts: list[Any]) -> Any:
    return residual_norms(collect(model, prompts, positions=["inst", "post[*]"]))


def test_damage_is_nothing_without_an_intervention_and_equals_the_loss_by_hand(model: Any) -> None:
    import mechlens as ml

    prompts = planted.planted_requests(5)[0]
    batch = ml.tokenize(prompts, ml.template_of(model), padding_side="left")
    said = ml.answer(model, batch, max_new_tokens=2)
    nothing = damage(model, None, batch, said)
    assert torch.allclose(nothing.kl, torch.zeros(5, dtype=torch.float64), atol=1e-12)
    norms = found_norms(model, prompts)
    acts = ml.collect(model, [replace(p, label=str(i % 2)) for i, p in enumerate(prompts)], positions=["inst"])
    one = intervene(ml.mean_difference(acts, "0", "1", 1, "inst"), "add", Setting(1, 0.7), norms)
    hurt = damage(model, one, batch, said)
    logits = logits_under(model, batch, [one]).double().log_softmax(dim=-1)
    clean = logits_under(model, batch, []).double().log_softmax(dim=-1)
    for i, tokens in enumerate(said.tokens):
        if len(tokens) == 1:  # one token, so the loss is that of the first answer token
            assert float(hurt.own[i]) == pytest.approx(-float(logits[i, tokens[0]]), abs=1e-4)
            kl = (clean[i].exp() * (clean[i] - logits[i])).sum()
            assert float(hurt.kl[i]) == pytest.approx(float(kl), abs=1e-4)
    assert {len(tokens) for tokens in said.tokens} == {1}
    assert not torch.equal(hurt.plain, nothing.plain)


def test_tokens_without_a_row_in_the_embedding_are_said_before_anything_is_run() -> None:
    import mechlens as ml

    small = bridged()
    batch = ml.tokenize(planted.planted_requests(5)[0], ml.template_of(small), padding_side="left")
    said = ml.answer(small, batch, max_new_tokens=1)
    acts = collect(small, [replace(p, label=str(i % 2)) for i, p in enumerate(batch.prompts)], positions=["inst"])
    found = mean_difference(acts, "0", "1", 1, "inst")
    rows = small.original_model.get_input_embeddings().weight.shape[0]
    with pytest.raises(UserError, match=rf"^the text has the token .*{rows}.*, and .* has {rows} rows only; load"):
        ml.project_tokens(small, found, [5, rows])
    small.mechlens.tokenizer.add_tokens([f"beyond{i}" for i in range(rows)])
    small.original_model.forward = None
    with pytest.raises(UserError, match=rf"^the text 'all of beyond.*' has the token .*, and .* has {rows} rows only"):
        damage(small, None, batch, said, texts=["fine", f"all of beyond{rows - 1}"])


@pytest.mark.parametrize(("tokens", "share"), [((), 0.0), ((1, 2), 0.0), ((1, 2, 3), 0.0), ((1,) * 6, 0.75)])
def test_repetition(tokens: tuple[int, ...], share: float) -> None:
    assert repetition(tokens) == share


def test_shuffled_directions_are_those_of_shuffled_labels() -> None:
    from planted import planted_activations

    acts = planted_activations(separation=4.0, n_per_class=32).acts
    real = mean_difference(acts, "harmful", "harmless", 1, "inst")
    drawn = shuffled_like(acts, "harmful", "harmless", 1, "inst", 40, 0)
    norms = torch.tensor([one.norm for one in drawn])
    assert float(norms.max()) < real.norm
    along = torch.stack([cosine(one.vector, real.vector) * one.norm for one in drawn])
    # Within pairs the sign of each difference is chance: mean 0, spread |separation| / sqrt(pairs).
    assert abs(float(along.mean())) < 3 * 4.0 / 32**0.5 / 40**0.5
    again = shuffled_like(acts, "harmful", "harmless", 1, "inst", 40, 0)
    assert all(torch.equal(one.vector, other.vector) for one, other in zip(drawn, again, strict=True))


def test_the_grid_and_the_work(model: Any) -> None:
    assert grid_layers(model, (), 3) == (2,)
    assert grid_layers(model, (), 1) == (1, 2, 3)
    with pytest.raises(UserError, match="no layer 4 to intervene at"):
        grid_layers(model, (1, 4), 3)
    work = work_ahead(model, PLAN)
    # 2 directions x 2 layers x (add, subtract, ablate) and 2 x 2 random; 23 arms in the test; 3 readings each.
    assert work.first_tokens == 3 * (4 * (2 * 2 * 3 + 2 * 2) + 24 * 2 * 23)


# The command line


def saved(folder: Path) -> str:
    hf_model, tokenizer = planted.planted_model()
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = (
    "--layers", "1", "--strengths", "0.5", "--n-validation", "4", "--n-test", "8", "--random-directions", "3",
    "--shuffled-directions", "2", "--resamples", "40", "--max-new-tokens", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command on the planted model; --out is to be added."""
    folder = tmp_path_factory.mktemp("planted")
    harmful, harmless = planted.planted_requests(N)
    files = [
        write_prompts(folder / f"{n}.jsonl", [p.text for p in own]) for n, own in (("bad", harmful), ("good", harmless))
    ]
    return ["causal", "--model", saved(folder / "model"), "--harmful", files[0], "--harmless", files[1], *SMALL]


@pytest.fixture(scope="module")
def out(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "causal"
    with one_thread(), warnings.catch_warnings():
        main([*words, "--out", str(folder), "--wandb.mode", "disabled"])
    return folder


def test_the_run_folder_holds_the_finding(out: Path) -> None:
    run = read_run(out)
    assert run.status == "success"
    assert run.verdict is not None
    assert set(run.metrics) >= {
        "steer_refusal.refusal.random_max",
        "inversion_shift.harmfulness.all",
        "inversion_parsed",
    }
    tables = {path.stem for path in (out / "tables").glob("*.parquet")}
    assert tables >= {
        "pushes_by_layer",
        "operations_by_layer",
        "scopes",
        "replies",
        "damage",
        "steered_answers",
        "tested",
    }
    answers = pd.read_parquet(out / "tables" / "steered_answers.parquet")
    assert len(answers) == 2 * 3 * 16
    html = (out / "report.html").read_text()
    assert "The 2x2 of scopes" in html
    assert "dissociation shown: (1)" in html
    assert (out / "direction_harmfulness.safetensors").exists()
    assert (out / "direction_refusal.safetensors").exists()


def test_the_same_command_goes_on_from_its_cache(out: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((out / "run.json").read_text())["metrics"]
    lost = sorted((out / "cache").glob("*.safetensors"))[::3]
    for path in lost:
        path.unlink()
    made: list[str] = []
    put = FolderCache.put
    monkeypatch.setattr(FolderCache, "put", lambda self, key, value: (made.append(key), put(self, key, value)))
    main([*words, "--out", str(out), "--wandb.mode", "disabled"])
    assert sorted(made) == [path.stem for path in lost]
    after = json.loads((out / "run.json").read_text())["metrics"]
    for name, estimate in before.items():
        for part, value in estimate.items():
            assert after[name][part] == (value if value is None else pytest.approx(value, abs=1e-6)), name


MISTAKES = {
    ("--n-test", "7"): "n_test is 7; give at least 8",
    ("--strengths", "-1"): "give at least one, all above 0",
    ("--layers", "9"): "there is no layer 9 to intervene at, only 1 to 3",
    ("--layers", "1", "--full"): "give one of them",
    ("--random-directions", "0"): "random_directions is 0",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_line(
    mistake: tuple[str, ...], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, *mistake, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    assert stop.value.code == 1
    said = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("mechlens: ") and "warning" not in line
    ]
    assert len(said) == 1
    assert MISTAKES[mistake] in said[0]


def test_a_model_that_answers_nothing_to_the_question_is_told_so(tmp_path: Path, words: list[str]) -> None:
    model = save_model(tmp_path / "noise")
    swapped = [str(model) if word == words[2] else word for word in words]
    main([*swapped, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    run = read_run(tmp_path / "out")
    assert run.verdict is not None
    assert run.verdict.startswith("Inconclusive. Reply inversion is not measurable")


def test_of_pushes_that_do_as_much_the_weakest_is_chosen() -> None:
    from mechlens.studies.causal.grid import _best

    rows = [(2, 0.5, 1.0, 0.5), (5, 0.5, 3.2, 2.0), (5, 1.0, 4.0, 3.0), (2, 1.0, 3.9, 3.0), (9, 0.25, 9.0, 8.0)]
    table = pd.DataFrame(rows, columns=["layer", "strength", "value", "low"])
    table = table.assign(direction="refusal", measure="refusal")
    # Layer 9 of 10 is too late; 3.2 lies above the lower bound of the largest, 4.0.
    assert _best(table, "refusal", 10) == Setting(5, 0.5)
    assert _best(table.assign(low=table["value"]), "refusal", 10) == Setting(5, 1.0)
