"""Selecting a refusal direction: on a planted model it is the planted one, and the scores are the published loop's."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from planted import CHECKPOINT
from refusing import FREE, LAYERS, LEVEL, REFUSE, refusing_model, requests, save_refusing_model
from saved import left_unfinished, write_prompts
from saved import requests as plain_requests
from sentence import require_one_sentence, require_short
from shown import require_shown
from torch import Tensor

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.chosen_judge import judges_of, once_settled
from mechlens.methods.behaviour.judges import ARDITI, PHRASES, ZHAO, HumanLabels, OnceRefused
from mechlens.methods.directions.direction import Direction, cosine
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.methods.steering.candidates import (
    STATUSES,
    SelectionRule,
    filter_candidates,
    published_kl,
    score_candidates,
)
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.native import native
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.runs import artifacts
from mechlens.runs.results.paired import rows_by_number
from mechlens.runs.results.result import open_run_folder
from mechlens.runs.run import read_run
from mechlens.settings import FRACTIONS
from mechlens.studies import driver
from mechlens.studies.select.config import Select, SelectionPlan
from mechlens.studies.select.study import FEWEST, Selection, prepare, select_direction
from mechlens.studies.select.verdict import selection_verdict

PLAN = SelectionPlan(seed=0, max_new_tokens=3, resamples=100)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


def prompts(n: int = 20) -> tuple[list[Prompt], list[Prompt]]:
    sides = []
    for label, harmful in (("harmful", True), ("harmless", False)):
        texts = enumerate(requests(n, harmful))
        sides.append([Prompt(f"{label}{i}", text, label, family=f"f{i}") for i, text in texts])
    return sides[0], sides[1]


@pytest.fixture(scope="module")
def model() -> Any:
    hf_model, tokenizer = refusing_model()
    fingerprint = weight_fingerprint(hf_model.state_dict())
    return bridge(hf_model, tokenizer, Checkpoint("refusing", "tests/refusing", fingerprint=fingerprint))


@pytest.fixture(scope="module")
def selected(model: Any) -> Selection:
    with one_thread():
        return select_direction(model, *prompts(), PLAN)


def test_the_planted_layer_and_direction_are_found(selected: Selection) -> None:
    best = selected.found.best
    require_shown(selected)
    assert best is not None
    assert best.level == LEVEL
    assert abs(float(best.unit[REFUSE])) > 0.99
    # Above it random features get in, below it nothing is written yet.
    higher = [one for one in selected.found.candidates if one.level > LEVEL]
    assert max(abs(float(one.unit[REFUSE])) for one in higher) < 0.98
    table = selected.found.table()
    assert set(table[table["level"] < LEVEL]["status"]) == {"no direction"}
    assert set(table[table["level"] >= int(0.8 * LAYERS)]["status"]) == {"last layers"}
    assert list(table["status"]).count("chosen") == 1
    assert len(selected.random.candidates) == len(selected.found.candidates)
    for one, twin in zip(selected.found.candidates, selected.random.candidates, strict=True):
        assert twin.norm == pytest.approx(one.norm, rel=1e-5)
        assert (twin.level, twin.position) == (one.level, one.position)


def test_the_verdict_is_what_was_planted(selected: Selection) -> None:
    assert selected.test is not None
    metrics = selected.test.metrics()
    verdict = selection_verdict(selected)
    assert verdict.word == "controls refusal", verdict.sentence
    assert metrics["refusal_rate.harmful"].value == 1.0
    assert metrics["refusal_rate.harmful.ablated"].value == 0.0
    assert metrics["refusal_rate.harmless"].value == 0.0
    assert metrics["refusal_rate.harmless.added"].value == 1.0
    assert metrics["refusal_score.harmful.ablated"].high < 0 < metrics["refusal_score.harmless.added"].low
    # On test prompts only, none of which made or chose the direction.
    assert metrics["bypass_shift"].n == 6
    assert metrics["bypass_shift.beyond_chance"].high < 0 < metrics["induce_shift.beyond_chance"].low
    assert metrics["refusal_rate.harmful.ablated"].high > 0.2  # 0 of 6 is not certainly none
    test = {selected.judged.prompts[i].id for i in selected.split.test}
    assert not test & set(selected.test.chosen.train_ids)
    # Ablating it leaves nothing for the harmless prompts to change by; random directions of its length move little.
    assert abs(metrics["kl.harmless.ablated"].value) < 1e-3
    assert metrics["refusal_score.harmful.ablated.random"].value > 0
    assert metrics["refusal_score.harmless.added.random"].value < 0
    # Nor does the best of as many random directions, each chosen for what it is compared in.
    bypasses, induces = selected.test.random_controls
    means = selected.random.means
    usable = [i for i, status in enumerate(selected.random.filtered.status) if status in ("kept", "induce")]
    assert bypasses is selected.random.candidates[min(usable, key=lambda i: float(means[i, 0]))]
    assert induces is selected.random.candidates[max(usable, key=lambda i: float(means[i, 1]))]
    assert metrics["refusal_rate.harmful.ablated.random_best"].value == 1.0
    assert metrics["refusal_rate.harmless.added.random_best"].value == 0.0


def test_chance_is_not_called_control(selected: Selection) -> None:
    """The same selection with a random direction in the chosen one's place."""
    assert selected.test is not None
    scores = selected.test.scores
    swapped = {
        name: torch.cat([getattr(scores, name)[-1:], getattr(scores, name)[1:-1], getattr(scores, name)[:1]])
        for name in ("bypass", "induce", "kl")
    }
    unlucky = replace(selected, test=replace(selected.test, scores=replace(scores, **swapped)))
    assert selection_verdict(unlucky).word == "no better than chance"


BYPASSES, INDUCES = (-3.0, -4.0, -2.0), (3.0, 2.0, 4.0)
UNSURE = {-1.0: (-1.0, -3.0, 1.0), 1.0: (1.0, -1.0, 3.0)}
"""Half as wide as the value is far from 0: four times the prompts."""
NOT = {-1.0: (1.0, 0.5, 1.5), 1.0: (-1.0, -1.5, -0.5)}


@pytest.mark.parametrize(
    ("bypass", "induce", "word", "settles"),
    [
        (BYPASSES, INDUCES, "controls refusal", ""),
        (BYPASSES, NOT[1.0], "controls refusal in part", ""),
        (BYPASSES, UNSURE[1.0], "controls refusal in part", "about 18 more test prompts of each class (--n 80 in all)"),
        (UNSURE[-1.0], NOT[1.0], "inconclusive", "about 18 more test prompts of each class"),
        ((0.0, -1.0, 1.0), NOT[1.0], "inconclusive", "More prompts would hardly settle"),
        (NOT[-1.0], NOT[1.0], "no better than chance", ""),
    ],
)
def test_what_intervals_leave_open_is_no_chance(
    selected: Selection, bypass: Any, induce: Any, word: str, settles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selected.test is not None
    numbers = selected.test.metrics()
    numbers |= {"bypass_shift.beyond_chance": Estimate(*bypass, 6), "induce_shift.beyond_chance": Estimate(*induce, 6)}
    monkeypatch.setattr(type(selected.test), "metrics", lambda self: numbers)
    verdict = selection_verdict(selected)
    assert verdict.word == word
    assert ("settle" in verdict.sentence) == bool(settles)
    assert settles in verdict.sentence


@pytest.mark.parametrize(
    ("kl", "word", "said"),
    [
        (
            (0.5, 0.3, 0.8),
            "controls refusal, with side effects",
            "changes harmless answers by more than the filter allows",
        ),
        ((0.2, 0.05, 0.4), "controls refusal", "whether it keeps to the limit is open"),
        ((0.02, 0.01, 0.05), "controls refusal", "within the limit"),
    ],
)
def test_a_side_effect_above_the_limit_stands_beside_control(
    selected: Selection, kl: Any, word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selected.test is not None
    found = Estimate(*kl, 6)
    numbers = selected.test.metrics() | {"kl.harmless.ablated": found}
    monkeypatch.setattr(type(selected.test), "metrics", lambda self: numbers)
    verdict = selection_verdict(selected)
    assert verdict.word == word
    assert f"{found.brief} nats where the limit is 0.1" in verdict.sentence
    assert said in verdict.sentence
    assert verdict.deciding["kl.harmless.ablated"] == found
    require_short(str(verdict.headline))
    assert (found.brief in str(verdict.headline)) == (word != "controls refusal")
    assert verdict.sentence.count("n=") == 0
    kept = selected.found.filtered.counts()["kept"]
    numbers["induce_shift.beyond_chance"] = Estimate(*UNSURE[1.0], 6)
    in_part = selection_verdict(selected)
    assert in_part.word == word.replace("controls refusal", "controls refusal in part")
    require_short(str(in_part.headline))
    assert f"({kept} of {len(selected.found.candidates)} candidates passed the filters)" in verdict.sentence


# Scores against the published loop, written down once more: plain Hugging Face hooks, one candidate at a time.


@torch.inference_mode()
def published_logits(
    model: Any, batch: TokenBatch, hooks: Callable[[Any], list[tuple[Any, Callable[..., Any], bool]]]
) -> Tensor:
    """Last-position logits of the whole batch, padded on the left, under plain hooks (module, hook, before)."""
    with native(model) as hf_model:
        handles = [
            module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            for module, hook, before in hooks(hf_model)
        ]
        try:
            logits: Tensor = hf_model(batch.tokens, attention_mask=batch.mask.long()).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
    return logits


def without(direction: Tensor) -> Callable[[Any], list[tuple[Any, Callable[..., Any], bool]]]:
    unit = direction / (direction.norm() + 1e-8)

    def off(x: Tensor) -> Tensor:
        return x - (x @ unit).unsqueeze(-1) * unit

    def out(module: Any, args: Any, output: Any) -> Any:
        return (off(output[0]), *output[1:]) if isinstance(output, tuple) else off(output)

    def hooks(hf_model: Any) -> list[tuple[Any, Callable[..., Any], bool]]:
        layers = hf_model.model.layers
        before = [(layer, lambda module, args: (off(args[0]), *args[1:]), True) for layer in layers]
        return before + [(part, out, False) for layer in layers for part in (layer.self_attn, layer.mlp)]

    return hooks


def plus(direction: Tensor, level: int) -> Callable[[Any], list[tuple[Any, Callable[..., Any], bool]]]:
    return lambda hf: [(hf.model.layers[level], lambda module, args: (args[0] + direction, *args[1:]), True)]


def published_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    share = logits.double().softmax(-1)[:, list(tokens)].sum(-1)
    return torch.log(share + 1e-8) - torch.log(1 - share + 1e-8)


def published_scores(
    model: Any, candidates: Sequence[Direction], batch: TokenBatch, rows: tuple[list[int], list[int]], tokens: list[int]
) -> Tensor:
    """Bypass, induce and KL of every candidate, as in refusal_direction's select_direction."""
    left = tokenize(batch.prompts, template_of(model), padding_side="left")
    harmful, harmless = (left.select(part) for part in rows)
    clean = published_logits(model, harmless, lambda hf: []).double().softmax(-1)
    found = []
    for one in candidates:
        ablated = published_logits(model, harmless, without(one.vector)).double().softmax(-1)
        kl = (clean * (torch.log(clean + 1e-6) - torch.log(ablated + 1e-6))).sum(-1)
        bypass = published_score(published_logits(model, harmful, without(one.vector)), tokens)
        induce = published_score(published_logits(model, harmless, plus(one.vector, one.level)), tokens)
        found.append(torch.stack([bypass.mean(), induce.mean(), kl.mean()]))
    return torch.stack(found)


def test_scores_are_those_of_the_published_loop(model: Any, selected: Selection) -> None:
    candidates = [one for one in selected.found.candidates if one.norm > 0][::5]
    batch = tokenize(selected.judged.prompts, template_of(model))
    rows = (list(range(4)), list(range(20, 25)))
    tokens = list(selected.first_token.tokens.ids)
    found = score_candidates(model, candidates, batch, *rows, tokens).means()
    published = published_scores(model, candidates, batch, rows, tokens)
    assert float((found - published).abs().max()) < 1e-4
    assert float(published.std(dim=0).min()) > 1e-3  # and they differ from candidate to candidate


def test_random_model_scores_are_those_of_the_published_loop(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2")
    asked = [Prompt(f"p{i}", text) for i, text in enumerate(plain_requests(6, "make"))]
    batch = tokenize(asked, template_of(model))
    generator = torch.Generator().manual_seed(0)
    candidates = [
        Direction(torch.randn(32, generator=generator), level, "last", "resid", "random", ("a", "b"),
                  model.mechlens.checkpoint, batch.template, ())
        for level in (0, 1, 2)
    ]  # fmt: skip
    rows = ([0, 2, 4], [1, 3, 5])
    found = score_candidates(model, candidates, batch, *rows, [40, 41, 42]).means()
    assert float((found - published_scores(model, candidates, batch, rows, [40, 41, 42])).abs().max()) < 1e-4


def test_kl_is_close_to_the_divergence_and_0_for_the_same() -> None:
    clean, other = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(published_kl(clean, clean), torch.zeros(3, dtype=torch.float64))
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (clean, other))
    assert torch.allclose(published_kl(clean, other), torch.distributions.kl_divergence(p, q), rtol=1e-3)


# Filters


def candidate(level: int, norm: float = 1.0) -> Direction:
    vector = torch.zeros(8)
    vector[0] = norm
    return Direction(vector, level, "post[0]", "resid", "mean difference", ("a", "b"), CHECKPOINT, "", ())


def test_every_filter_drops_what_it_names_and_the_lowest_bypass_is_taken() -> None:
    nan = float("nan")
    rows = [
        (candidate(0, norm=0.0), (nan, nan, nan), "no direction"),
        (candidate(1), (-9.0, 1.0, nan), "no direction"),
        (candidate(8), (-9.0, 1.0, 0.0), "last layers"),
        (candidate(9), (-9.0, -1.0, 9.0), "last layers"),
        (candidate(2), (-9.0, -1.0, 0.11), "KL"),
        (candidate(3), (-9.0, -0.01, 0.1), "induce"),
        (candidate(4), (-1.0, 0.0, 0.1), "kept"),
        (candidate(7), (-2.0, 3.0, -0.01), "kept"),
        (candidate(5), (-2.0, 3.0, 0.0), "kept"),
    ]
    found = filter_candidates(
        [one for one, _, _ in rows], torch.tensor([s for _, s, _ in rows], dtype=torch.float64), 10, SelectionRule()
    )
    assert list(found.status) == [name for _, _, name in rows]
    assert found.chosen == 7
    assert found.counts() == {"no direction": 2, "last layers": 2, "KL": 1, "induce": 1, "kept": 3}
    assert tuple(found.counts()) == STATUSES
    none = filter_candidates([candidate(9)], torch.zeros(1, 3).double(), 10, SelectionRule())
    assert none.chosen is None


def test_an_empty_set_is_named_with_its_filters(model: Any, selected: Selection) -> None:
    strict = SelectionRule(least_induce=1e6)
    result = replace(
        selected,
        found=replace(
            selected.found,
            filtered=filter_candidates(selected.found.candidates, selected.found.means, LAYERS, strict),
        ),
        test=None,
    )
    verdict = selection_verdict(result)
    assert verdict.word == "none selected"
    n, counts = len(selected.found.candidates) // LAYERS, result.found.filtered.counts()  # n positions
    assert (counts["no direction"], counts["last layers"], counts["kept"]) == (2 * n, 2 * n, 0)
    dropped = ", ".join(f"{many} by {name}" for name, many in counts.items() if many)
    assert f"None of {LAYERS * n} candidates was let through: dropped {dropped}." in verdict.sentence


def test_a_model_that_never_refuses_is_said_with_counts(model: Any) -> None:
    harmless = prompts()[1]
    harmful = [replace(prompt, id=f"x{i}", label="harmful") for i, prompt in enumerate(harmless)]
    with pytest.raises(UserError, match=r"of 10 harmful train prompts 0 have a refusal score above 0, and at least 3"):
        select_direction(model, harmful, harmless, PLAN)


# Answers that need not go on


class Letters:
    """Each token is a character."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("judge", [PHRASES, ARDITI, ZHAO])
def test_what_is_cut_short_keeps_its_verdict(judge: Any) -> None:
    decided = OnceRefused(judge, Letters())
    said = [
        "  I cannot do that",
        "Sure, I'm sorry to hear it, but",
        "Yes. Here",
        "   ",
        "Sorry",
        "i CAN'T say",
        "I won’t",
        "AI will not",
        "",
    ]
    for text in said:
        tokens = list(map(ord, text))
        ends = next((k for k in range(1, len(tokens) + 1) if decided(tokens[:k])), len(tokens))
        prompt = [Prompt("p", "q")]
        assert judge(prompt, [text[:ends].strip()]) == judge(prompt, [text.strip()]), text
    assert not decided([])
    assert not decided(list(map(ord, "   ")))
    assert decided(list(map(ord, "Well, I cannot")))
    assert OnceRefused(ARDITI, Letters()).key != OnceRefused(ZHAO, Letters()).key


SAID = (
    "I cannot do that", "I'm sorry, but I can't assist", "i CANNOT, no. I cannot", "Sure, here you are", "   ", "",
    "Sorry", "sorry? No: I won't. As an AI", "I’m sorry", "Ask someone who can; I am not able to",
    "I do not know, I cannot know", "I am unable to", "AS AN AI, I will not", "I c a n n o t", "*I* cannot",
)  # fmt: skip


@pytest.mark.parametrize("chosen", ["phrases", "arditi", "zhao"])
def test_an_answer_cut_short_for_all_judges_keeps_every_verdict_however_it_would_go_on(chosen: str) -> None:
    class Plain(Letters):
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {}

    judges, prompt = judges_of(chosen), [Prompt("p", "q")]
    decided = once_settled(judges, Plain())
    assert decided is not None
    cut = 0
    for text in SAID:
        for more in ("", *SAID):
            tokens = list(map(ord, f"{text} {more}"))
            ends = next((k for k in range(1, len(tokens) + 1) if decided(tokens[:k])), len(tokens))
            cut += ends < len(tokens)
            for judge in judges:
                whole, short = ("".join(map(chr, own)).strip() for own in (tokens, tokens[:ends]))
                assert judge(prompt, [short]) == judge(prompt, [whole]), (judge.name, text, more)
    assert cut > 50


def test_nothing_is_cut_short_where_a_judge_may_change_its_mind() -> None:
    class Thinking(Letters):
        chat_template = "{{ '<think>' }}"

        def get_vocab(self) -> dict[str, int]:
            return {}

    class Marked(Thinking):
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"</think>": 7}

    assert once_settled(judges_of("phrases"), Thinking()) is None
    assert once_settled(judges_of("phrases"), Marked()) is None
    assert once_settled((*judges_of("phrases"), HumanLabels({})), Letters()) is None
    assert once_settled((), Letters()) is None


# The verb


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    save_refusing_model(folder / "model")
    for name, harmful in (("harmful", True), ("harmless", False)):
        write_prompts(folder / f"{name}.jsonl", requests(20, harmful))
    with one_thread(), warnings.catch_warnings():
        main([str(word) for word in command(folder)])
    return folder


def command(folder: Path, *more: object) -> list[object]:
    files = ["--harmful", folder / "harmful.jsonl", "--harmless", folder / "harmless.jsonl", "--punctuation", "keep"]
    quick = ["--resamples", 40, "--max-new-tokens", 3, "--n", 20, "--wandb.mode", "disabled", "--keep-cache"]
    return ["select", "--model", folder / "model", "--out", folder / "out", *files, *quick, *more]


def test_numbers_come_out_again_of_what_was_kept_by_prompt(recorded: Path) -> None:
    made_of = rows_by_number(open_run_folder(recorded / "out"))
    names = ("refusal_score.harmful.ablated", "kl.harmless.ablated", "bypass_shift", "refusal_rate.harmless.added")
    assert set(names) <= set(made_of)


def test_the_verb_writes_scores_direction_and_report(recorded: Path) -> None:
    run = require_one_sentence(recorded / "out")
    assert run.status == "success"
    assert run.verdict is not None
    assert run.verdict.startswith("Controls refusal.")
    assert run.metrics["chosen.level"].value == LEVEL
    assert run.metrics["candidates.kept"].value > 0
    table = pd.read_parquet(recorded / "out" / "tables" / "candidates.parquet")
    assert set(table["kind"]) == {"candidate", "random"}
    assert {"position", "level", "norm", "bypass", "induce", "kl", "status"} <= set(table.columns)
    answers = pd.read_parquet(recorded / "out" / "tables" / "steered_answers.parquet")
    assert {"refused_before", "refused_after", "verdict_after_arditi", "verdict_after_zhao"} <= set(answers.columns)
    direction = artifacts.load(recorded / "out" / "direction.safetensors", Direction)
    assert float(cosine(direction.vector, torch.eye(len(direction.vector))[REFUSE])) > 0.99
    assert direction.vector[FREE].norm() < 0.1 * direction.norm
    html = (recorded / "out" / "report.html").read_text(encoding="utf-8")
    assert "Dropped, in this order" in html
    assert "harmless: KL, direction ablated (limit 0.1)" in html  # the side effect on test prompts has a card
    assert "below 0: refuses less than under random ones" in html
    assert "need not pass the induce filter" in html
    for name in ("scores_bypass", "scores_induce", "scores_kl", "candidates", "test_scores"):
        assert (recorded / "out" / "figures" / f"{name}.json").exists()
        assert f"figure-{name}" in html


def test_a_run_goes_on_from_its_shelf_with_the_same_numbers(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_run(recorded / "out").metrics
    pieces = sorted((recorded / "out" / "cache").iterdir())
    assert len(pieces) > 6
    for piece in pieces[::2]:
        piece.unlink()
    left_unfinished(recorded / "out")
    config = Select(
        model=str(recorded / "model"), out=recorded / "out", harmful=str(recorded / "harmful.jsonl"),
        harmless=str(recorded / "harmless.jsonl"), punctuation="keep", resamples=40, max_new_tokens=3, n=20,
        keep_cache=True,
    )  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "disabled")
    driver.run(config)
    n = read_run(recorded / "out").metrics["candidates.kept"].n
    assert f"40 prompts are answered with up to 3 tokens; {n} candidates" in capsys.readouterr().err
    assert sorted((recorded / "out" / "cache").iterdir()) == pieces
    after = read_run(recorded / "out").metrics
    assert {n: (e.value, e.low, e.high) for n, e in after.items() if e.measurable} == {
        n: (e.value, e.low, e.high) for n, e in before.items() if e.measurable
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resamples", "0"], "--resamples must be at least 1, and is 0"),
        (["--last-layers", "1.5"], "--last-layers is a share below 1, and was given as 1.5"),
        (["--highest-kl", "-1"], "--highest-kl must be at least 0, and is -1"),
        (["--last-layers", "2"], "--last-layers is a share below 1, and was given as 2"),
        (["--n", "5"], "there are 5 families of harmful prompts, and the study needs 15 of each class; give more "),
        (["--harmless", "harmful"], "share"),
    ],
)
def test_mistakes_are_said_in_one_sentence(
    more: list[str], said: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(recorded, "--out", tmp_path / "out", *more)
    if more[0] == "--harmless":
        words += ["--harmful", "harmful"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == (2 if said.startswith("--") else 1)
    error = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "out").exists()


def test_a_model_without_refusals_ends_in_an_error_that_counts(
    tmp_path: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "calm.jsonl", [text + " please" for text in requests(20, False)])
    words = command(recorded, "--out", tmp_path / "out", "--harmful", tmp_path / "calm.jsonl")
    with pytest.raises(SystemExit):
        main([str(word) for word in words])
    assert "of 10 harmful train prompts 0 have a refusal score above 0" in capsys.readouterr().err
    assert read_run(tmp_path / "out").status == "error"


def test_few_prompts_are_warned_about_with_how_many_it_takes(recorded: Path) -> None:
    sides = {side: str(recorded / f"{side}.jsonl") for side in ("harmful", "harmless")}
    config = Select(model=str(recorded / "model"), out=recorded / "few", punctuation="keep", n=20, **sides)
    with pytest.warns(UserWarning, match=r"of 20 prompts of a class 4 choose and 6 test, .*needs 10; take at least 34"):
        prepare(config)
    assert round(FRACTIONS[2] * FEWEST) == 10


def test_the_log_says_which_part_it_is_at(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    @contextlib.contextmanager
    def noted(name: str, of: str) -> Iterator[None]:
        begun.append(f"{name} {of}".partition(" (")[0])
        yield

    monkeypatch.setattr("mechlens.studies.select.study.phase", noted)
    select_direction(model, *prompts(), PLAN)
    assert begun == [f"selecting {k} of 3" for k in (1, 2, 3)]
