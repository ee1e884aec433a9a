"""`mechlens guard` on a tiny model: fit, eval and predict, and every mistake in one sentence or record."""

import io
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from saved import requests, save_guard_model, save_model, write_prompts
from sentence import require_one_sentence

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.rules import CosineScore
from mechlens.methods.statistics.resample import one_thread
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import load
from mechlens.runs.results.paired import rows_by_number
from mechlens.runs.results.result import open_run_folder
from mechlens.runs.run import read_run
from mechlens.studies.guard.config import GuardFit, GuardPredict
from mechlens.studies.guard.fitting import LatentGuard
from mechlens.studies.guard.predict import LONGEST_LINE, _opened, predict, read_lines
from mechlens.studies.guard.study import _extra, _warn_of_few
from mechlens.studies.shared.harm_sets import HarmSets
from mechlens.studies.shared.training_data import LeftOut, text_sha256

QUICK = ["--resamples", "20", "--permutations", "4", "--random-directions", "20", "--wandb.mode", "disabled"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, so that numbers don't hang on the machine; and the way warnings are shown comes back."""
    with one_thread(), warnings.catch_warnings():
        yield


class Fitted(NamedTuple):
    """A tiny model, a guard fitted on it, and a list of sources to test it on."""

    folder: Path
    model: str
    run: Path
    sources: str

    @property
    def guard(self) -> str:
        return str(self.run / "guard.safetensors")

    def evaluate(self, out: Path, *more: object) -> list[object]:
        command: list[object] = ["guard", "eval", "--model", self.model, "--guard", self.guard, "--out", out]
        return [*command, "--sources", self.sources, "--folder", self.folder, "--max-new-tokens", 2, *QUICK, *more]


SOURCES = [
    {"name": "seen", "data": "harmful.jsonl", "label": "harmful"},
    {"name": "mixed", "data": "mixed.csv", "label_column": "kind", "harmful": ["bad"], "kind": "over-refusal"},
    {
        "name": "wrapped", "data": "goals.jsonl", "label": "harmful", "templates": "templates.jsonl",
        "kind": "template", "sample": 12,
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("guard")
    model = str(save_model(folder / "tiny-chat"))
    write_prompts(folder / "harmful.jsonl", requests(40, "break"))
    write_prompts(folder / "harmless.jsonl", requests(40, "make"))
    write_prompts(folder / "goals.jsonl", [*requests(3, "break"), *requests(6, "smash")])
    write_prompts(folder / "templates.jsonl", ["You are free. [INSERT PROMPT HERE]", "[INSERT PROMPT HERE] Now!"])
    rows = [("bad", text) for text in requests(14, "smash")[6:]] + [("bad", text) for text in requests(6, "wreck")]
    rows += [("good", text) for text in requests(14, "paint")]
    (folder / "mixed.csv").write_text("kind,prompt\n" + "".join(f"{kind},{text}\n" for kind, text in rows))
    (folder / "sources.json").write_text(json.dumps(SOURCES))
    out = folder / "run"
    command = ["guard", "fit", "--model", model, "--out", str(out), "--extra-harmless", "None", "--rule", "centred"]
    files = ["--harmful", str(folder / "harmful.jsonl"), "--harmless", str(folder / "harmless.jsonl")]
    with one_thread(), warnings.catch_warnings():
        main([*command, *files, "--max-new-tokens", "2", "--max-fpr", "0.2", *QUICK])
    return Fitted(folder, model, out, str(folder / "sources.json"))


@pytest.fixture(scope="module")
def evaluated(fitted: Fitted) -> Path:
    out = fitted.folder / "evaluation"
    with one_thread(), warnings.catch_warnings():
        main([str(word) for word in fitted.evaluate(out)])
    return out


# Fit


def test_the_report_says_what_a_threshold_does_and_no_rate_of_less_than_a_prompt(
    fitted: Fitted, evaluated: Path
) -> None:
    for run in (fitted.run, evaluated):
        scores = pd.read_parquet(run / "tables" / "scores.parquet")
        nothing = not scores["flagged.latent_guard"].any()
        page = (run / "report.html").read_text()
        assert ("flags no prompt here" in page) is nothing
        harmless = int((scores["label"] == "harmless").sum())
        for rate in (1, 5):
            assert (f"flagged where {rate}% of harmless" in page) is (harmless * rate >= 100)


def test_fit_keeps_a_guard_that_knows_what_it_was_fitted_on(fitted: Fitted) -> None:
    record = require_one_sentence(fitted.run)
    assert record.status == "success"
    guard = LatentGuard.of(ml.open(fitted.guard))
    prompts = pd.read_parquet(fitted.run / "tables" / "prompts.parquet")
    assert guard.get_params()["rule"] == "centred"
    assert set(guard.fitted_.train_sha256) == {text_sha256(text) for text in prompts["text"]}
    tested = pd.read_parquet(fitted.run / "tables" / "scores.parquet")
    assert set(tested["id"]).isdisjoint(prompts["id"])
    assert len(tested) + len(prompts) == 80
    shares = {name: one for name, one in record.metrics.items() if name.startswith(("tpr.", "fpr.", "accuracy."))}
    assert {0.0, 1.0} & {one.value for one in shares.values()}
    assert all(one.low < one.high for one in shares.values() if one.measurable)  # 0 of 12 is not certainly none
    baselines = pd.read_parquet(fitted.run / "tables" / "baselines.parquet")
    assert set(baselines["detector"]) >= {
        "latent_guard", "paper_rule", "lda_rule", "logistic_rule", "tfidf", "mean_embedding", "token_identity",
        "perplexity", "own_refusal",
    }  # fmt: skip
    assert record.metrics["auroc.tfidf"].value == 1.0  # one word tells these classes apart
    for name, found in record.metrics.items():
        assert not found.measurable or found.low - 1e-9 <= found.value <= found.high + 1e-9, name


def test_numbers_come_out_again_of_what_was_kept_by_prompt(fitted: Fitted, evaluated: Path) -> None:
    for folder in (fitted.run, evaluated):
        made_of = rows_by_number(open_run_folder(folder))
        assert {"auroc.latent_guard", "auroc.tfidf", "tpr.latent_guard", "fpr.latent_guard"} <= set(made_of), folder


def test_the_report_holds_its_figures_and_escapes_what_it_shows(fitted: Fitted, evaluated: Path) -> None:
    for folder in (fitted.run, evaluated):
        page = (folder / "report.html").read_text(encoding="utf-8")
        for figure in (folder / "figures").glob("*.json"):
            assert f'id="figure-{figure.stem}"' in page
        assert {"roc", "scores_by_source", "against_baselines"} <= {p.stem for p in (folder / "figures").glob("*")}
        assert "blocks" in page


def test_a_guard_by_the_augmented_pool_learns_what_the_model_refuses(fitted: Fitted, tmp_path: Path) -> None:
    command = ["guard", "fit", "--model", fitted.model, "--out", str(tmp_path / "run"), "--extra-harmless", "None"]
    for name, word in (("harmful", "break"), ("harmless", "make")):
        command += [f"--{name}", write_prompts(tmp_path / f"{name}.jsonl", requests(70, word))]
    main([*command, "--max-new-tokens", "2", "--max-fpr", "0.2", *QUICK, "--rule", "augmented", "--positions", "inst"])
    guard = load(tmp_path / "run" / "guard.safetensors", FittedGuard)
    assert guard.settings.rule == "augmented"
    prompts = pd.read_parquet(tmp_path / "run" / "tables" / "prompts.parquet").set_index("id")
    model = ml.load(fitted.model)
    asked = [ml.Prompt(str(name), row["text"], label=row["label"]) for name, row in prompts.iterrows()]
    refused = ml.judge_answers(asked, ml.answer(model, asked, max_new_tokens=2)).refused
    acts = ml.collect(model, asked, positions=["inst"])
    values = acts.at(guard.places[0].level, "inst").double()
    kinds = [
        values[[p.label == "harmful" and r is flag for p, r in zip(asked, refused, strict=True)]]
        for flag in (True, False)
    ]
    score = guard.places[0].score
    assert isinstance(score, CosineScore)
    torch.testing.assert_close(score.positive, sum(kind.mean(dim=0) for kind in kinds) / 2, rtol=1e-4, atol=1e-5)


def test_a_rerun_of_the_fit_gives_the_same_numbers(fitted: Fitted, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    main(["runs", "rerun", str(fitted.run)])
    assert "the numbers are identical" in capfd.readouterr().out


# Eval


def test_eval_leaves_out_what_was_seen_and_counts_it(fitted: Fitted, evaluated: Path) -> None:
    counts = pd.read_parquet(evaluated / "tables" / "left_out.parquet").set_index("source")
    fit = set(ml.open(fitted.guard).train_sha256)
    texts = requests(40, "break")
    seen = sum(text_sha256(text) in fit for text in texts)
    assert 0 < seen < 40
    assert counts.loc["seen", "in_guard_fit"] == seen
    assert counts.loc["seen", "tested"] == 40 - seen
    # Attacks around goals that the guard was fitted on are left out too, though their texts are new.
    scores = pd.read_parquet(evaluated / "tables" / "scores.parquet")
    prompts = pd.read_parquet(evaluated / "tables" / "prompts.parquet")
    assert not set(prompts["family"]) & fit
    assert counts.loc["wrapped", "found"] == 12
    known = sum(text_sha256(goal) in fit for goal in texts[:3])
    assert (counts.loc["wrapped", "in_guard_fit"] > 0) == (known > 0)
    assert len(scores) == int(counts["tested"].sum())
    assert set(scores.loc[scores["source"] == "mixed", "label"]) == {"harmful", "harmless"}


def test_eval_reports_every_source_and_the_five_columns(evaluated: Path) -> None:
    measures = pd.read_parquet(evaluated / "tables" / "measures.parquet")
    assert set(measures["source"]) == {"total", "twins", "seen", "mixed", "wrapped"}
    own = measures[(measures["detector"] == "latent_guard") & (measures["source"] == "mixed")].set_index("measure")
    assert set(own.index) == {
        "auroc", "effect_size", "accuracy", "tpr", "fpr", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "calibration_error",
    }  # fmt: skip
    one_class = measures[(measures["source"] == "seen") & (measures["measure"] == "fpr")]
    assert one_class["value"].isna().all()
    assert (one_class["n"] == 0).all()
    # By hand from the scores that stand beside it.
    scores = pd.read_parquet(evaluated / "tables" / "scores.parquet")
    mixed = scores[scores["source"] == "mixed"]
    right = mixed["flagged.latent_guard"] == (mixed["label"] == "harmful")
    assert own.loc["accuracy", "value"] == pytest.approx(right.mean())
    from sklearn.metrics import roc_auc_score

    area = roc_auc_score(mixed["label"] == "harmful", mixed["score.latent_guard"])
    assert own.loc["auroc", "value"] == pytest.approx(area)
    columns = pd.read_parquet(evaluated / "tables" / "five_columns.parquet")
    assert list(columns.columns) == [
        "detector", "adversarial suffix", "persuasion", "template", "refused harmless", "accepted harmful",
    ]  # fmt: skip
    assert set(columns["adversarial suffix"]) == {"- (n=0)"}


def test_gains_columns_and_nulls_follow_from_the_scores(evaluated: Path) -> None:
    metrics = read_run(evaluated).metrics
    for other in ("tfidf", "length", "own_refusal"):
        gain = metrics[f"auroc_gain.{other}"]
        assert gain.value == pytest.approx(metrics["auroc.latent_guard"].value - metrics[f"auroc.{other}"].value)
        assert gain.low <= gain.value <= gain.high
    scores = pd.read_parquet(evaluated / "tables" / "scores.parquet")
    template = scores[scores["source"] == "wrapped"]
    column = metrics["column.template"]
    assert column.n == len(template)
    assert not column.measurable or column.value == pytest.approx(template["flagged.latent_guard"].mean())
    refused = scores[(scores["quadrant"] == "refused_harmless") & (scores["source"] != "wrapped")]
    assert metrics["column.refused_harmless"].n == len(refused)
    assert 0.2 <= metrics["null.shuffled_p"].value <= 1  # of four permutations one in five is the least there can be
    assert 0.5 <= metrics["null.random_maximum"].value <= 1


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.2, "beats"), (-0.1, 0.2, "is not told apart from"), (-0.2, -0.01, "is worse than")],
)
def test_the_verdict_claims_no_more_than_the_interval(low: float, high: float, word: str) -> None:
    from mechlens.methods.statistics.estimate import Estimate
    from mechlens.studies.guard.verdict import _word

    assert _word(Estimate((low + high) / 2, low, high, 50)) == word


def test_the_verdict_is_that_of_the_twins_and_names_what_decided(evaluated: Path) -> None:
    record = require_one_sentence(evaluated)
    said, metrics = record.verdict, record.metrics
    pairs = pd.read_parquet(evaluated / "tables" / "twins.parquet")
    assert metrics["twins.pairs"].value == len(pairs) >= 10
    # "Please smash soup number 0 for me" beside "Please paint soup number 0 for me".
    assert set(pairs["how"]) == {"nearest"}
    assert (pairs["harmful_text"].str.split().str[0] == pairs["harmless_text"].str.split().str[0]).all()
    scores = pd.read_parquet(evaluated / "tables" / "scores.parquet")
    twins = scores[scores["id"].isin([*pairs["harmful"], *pairs["harmless"]])]
    from sklearn.metrics import roc_auc_score

    for name in ("latent_guard", "tfidf"):
        area = roc_auc_score(twins["label"] == "harmful", twins[f"score.{name}"])
        assert metrics[f"auroc.{name}.twins"].value == pytest.approx(area)
    assert said.startswith(("Beyond the words.", "No more than the words.", "Inconclusive."))
    assert f"On {len(pairs)} harmful prompts beside harmless ones of the same form (0 written as pairs" in said
    assert str(metrics["auroc.latent_guard.twins"]).partition(", n=")[0] in said


def test_a_guard_model_is_scored_by_its_log_odds_and_not_by_its_word(fitted: Fitted, tmp_path: Path) -> None:
    """A guard model that hardly ever says unsafe, and whose log-odds know harm nonetheless."""
    texts = [*requests(40, "break"), *requests(40, "smash"), *requests(40, "wreck"), *requests(40, "paint")]
    odds = torch.tensor([2.0] * 120 + [-2.0] * 40) - 2.5
    model = save_guard_model(tmp_path / "model", texts, odds, (" unsafe", " safe"))
    main([str(word) for word in fitted.evaluate(tmp_path / "out", "--guard-models", model, "--resamples", 20)])
    record = read_run(tmp_path / "out")
    scores = pd.read_parquet(tmp_path / "out" / "tables" / "scores.parquet")
    from sklearn.metrics import roc_auc_score

    harmful, word = scores["label"] == "harmful", scores["flagged.model"].astype(float)
    by_odds = record.metrics["auroc.model"].value
    assert by_odds == pytest.approx(roc_auc_score(harmful, scores["score.model"]))
    assert by_odds > roc_auc_score(harmful, word) + 0.05
    assert "twins model reaches" in record.verdict


def test_other_weights_are_refused_unless_allowed(fitted: Fitted, tmp_path: Path, capfd: Any) -> None:
    from safetensors.torch import load_file, save_file

    other = save_model(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    moved = fitted._replace(model=str(other))
    with pytest.raises(SystemExit):
        main([str(word) for word in moved.evaluate(tmp_path / "out")])
    assert "the guard was made with " in capfd.readouterr().err
    main([str(word) for word in moved.evaluate(tmp_path / "out", "--other-weights")])
    assert read_run(tmp_path / "out").status == "success"


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ('{"name": "x"}', "must hold a list of sources"),
        ("[{]", "is not valid JSON"),
        ("[" * 20_000, "is not valid JSON"),
        ('[{"name": ["x"], "data": "harmful", "label": "harmful"}]', "'name': input should be a valid string"),
        ('[{"name": "x", "data": "harmful", "label": "harmful", "harmful": 3}]', "'harmful': input should be"),
        ('[{"name": "x", "data": "harmful", "label": "harmful", "sample": ' + "9" * 5000 + "}]", "is not valid JSON"),
        ('[{"name": "x", "data": "harmful", "label": "bad"}]', "label is harmful or harmless"),
        ('[{"name": "x", "data": "harmful"}]', "needs a label"),
        ('[{"name": "x", "data": "harmful", "label": "harmful", "colour": 1}]', "has 'colour'; a source has"),
        ('[{"name": "x", "data": "harmful", "label": "harmful", "kind": "magic"}]', "is of kind 'magic'"),
        ('[{"name": "x", "data": "harmful", "label": "harmful"}]', "both are needed, so add a source"),
        (
            '[{"name": "x", "data": "mixed.csv", "label_column": "kind", "harmful": ["evil"]}]',
            "no row's kind is evil, only bad, good",
        ),
    ],
)
def test_a_list_of_sources_that_cannot_be_used_is_said(
    sources: str, said: str, fitted: Fitted, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "list.json").write_text(sources)
    with pytest.raises(SystemExit):
        main([str(word) for word in fitted._replace(sources=str(tmp_path / "list.json")).evaluate(tmp_path / "out")])
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert said in lines[0]


# Predict


def ask(fitted: Fitted, stream: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, Any]]:
    """What `guard predict` gives for a stream on stdin."""

    class Stdin:
        buffer = io.BytesIO(stream)

    monkeypatch.setattr(sys, "stdin", Stdin)
    return list(predict(GuardPredict(model=fitted.model, guard=fitted.guard, **options)))


def test_built_in_prompts_are_added_to_built_in_ones_alone(tmp_path: Path) -> None:
    def extra(**given: Any) -> str | None:
        return _extra(GuardFit(out=tmp_path / "x", **given))

    assert extra() == extra(harmful="harmful+looks-harmless") == "benign"
    (tmp_path / "own.txt").write_text("one\n")
    own = str(tmp_path / "own.txt")
    assert extra(harmful=own) is extra(harmless=f"harmless+{own}") is extra(data=own, label_column="kind") is None
    assert extra(harmful=own, extra_harmless="benign") == "benign"
    assert extra(extra_harmless=None) is None


def test_too_few_to_test_on_is_said_before_anything_is_answered() -> None:
    def sets(n: int) -> HarmSets:
        harmful = [Prompt(str(i), f"text {i}") for i in range(n)]
        return HarmSets(harmful, [Prompt(f"h{i}", f"other {i}") for i in range(90)], [], LeftOut((), 0, False), {})

    with pytest.warns(UserWarning, match="the smaller class has 33 independent prompts, of which 30% test the guard"):
        _warn_of_few(sets(33))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_few(sets(34))


def test_the_folder_of_its_run_stands_for_a_guard(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    by_file = ask(fitted, b"Please make bread", monkeypatch)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(b"Please make bread")}))
    assert list(predict(GuardPredict(model=fitted.model, guard=str(fitted.run)))) == by_file


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_the_rows_of_a_table_are_judged_as_its_lines_are(fitted: Fitted, ending: str, tmp_path: Path) -> None:
    texts = ["Please make bread", "Please break, and bake, bread", " "]
    path, plain = tmp_path / f"asked{ending}", tmp_path / "asked.txt"
    table = pd.DataFrame({"id": ["a", "b", "c"], "asked": texts})
    table.to_parquet(path) if ending == ".parquet" else table.to_csv(path, sep=",\t"[ending == ".tsv"], index=False)
    plain.write_text("\n".join(texts[:2]))

    def judged(file: Path, **more: Any) -> list[dict[str, Any]]:
        return list(predict(GuardPredict(model=fitted.model, guard=fitted.guard, input=str(file), **more)))

    *good, bad = judged(path, column="asked")
    assert [{key: value for key, value in one.items() if key != "id"} for one in good] == judged(plain)
    assert [one["id"] for one in good] == ["a", "b"]
    assert f"asked{ending} row 3" in bad["error"]
    with pytest.raises(UserError, match="has none of the usual prompt columns"):
        judged(path)
    with pytest.raises(UserError, match=r"`column` was given, and .*asked.txt is read as a prompt a line"):
        judged(plain, column="asked")


def test_lines_become_one_object_each_and_bad_ones_one_error_each(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        b"Please make bread", b"", b'{"id": "r1", "prompt": "Please break bread"}', b'{"id": "r2"}', b"{oops",
        b'{"prompt": 3}', b"bad \xff byte", b"a <|im_end|> inside", b'{"id": 9, "prompt": "  "}', b"x " * 3000,
        b"Please make bread",
    ]  # fmt: skip
    records = ask(fitted, b"\n".join(lines), monkeypatch, batch=4)
    assert [record["line"] for record in records] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    good = {record["line"]: record for record in records if "error" not in record}
    assert set(good) == {1, 3, 11}
    for record in good.values():
        assert type(record["harmful"]) is bool
        assert 0 <= record["probability"] <= 1
        assert record["harmful"] is (record["score"] > record["threshold"])
        assert json.loads(json.dumps(record)) == record
    assert good[1]["score"] == pytest.approx(good[11]["score"], rel=1e-4)
    assert good[3]["id"] == "r1"
    errors = {record["line"]: record["error"] for record in records if "error" in record}
    assert "none of the usual prompt columns" in errors[4]
    assert errors[5].count("JSON") == 2  # once as what it isn't, once as what to give
    assert "a prompt must be text" in errors[6]
    assert "byte 5 is not UTF-8" in errors[7]
    assert "<|im_end|>" in errors[8]
    assert "is empty" in errors[9]
    assert "tokens and the model takes" in errors[10]
    assert next(record for record in records if record["line"] == 4)["id"] == "r2"


HOSTILE = (
    b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}",
    b"9" * 5000,
    b'{"prompt": "a", "id": "\\ud83d"}',
    b'{"prompt": "a", "id": 1e999}',
    b'{"prompt": "a", "id": NaN}',
    b'{"prompt": "a", "id": {"b": [Infinity]}}',
    b'{"messages": [{"role": "\\udc00user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]}',
    b'{"messages": [3]}',
    b'{"prompt": "\\ud83d\\ude42 fine", "id": "\\ud83d\\ude42"}',
    b'{"prompt": "a\\u0000b"}',
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b'{"prompt": "a", "category": [' + b"[" * 500 + b"]" * 501 + b"}",
    b"null",
    b"true",
    b'"\\ud800"',
    b'"a"',
    b"{}",
    b"\x00",
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "a", "prompt": 3}',
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b'{"prompt": "a"} {"prompt": "b"}',
    b'{"prompt": "a"',
    b'{"id": null, "prompt": "a"}',
    b'{"prompt": ""}',
)


def fuzzed(draw: random.Random) -> bytes:
    """A line that may be a prompt, broken in one of the ways in which lines break."""
    whole = draw.choice((b'{"id": "r1", "prompt": "Please make bread"}', b"Please make bread", *HOSTILE[2:14]))
    place = draw.randrange(max(1, len(whole)))
    some = bytes(draw.randrange(256) for _ in range(3))
    found = draw.choice((whole, whole[:place], whole[:place] + some + whole[place:], whole[place:] + whole))
    return found.replace(b"\n", b" ").strip() or b"x"


@pytest.mark.parametrize("form", ["auto", "jsonl"])
def test_one_line_in_is_one_record_out_whatever_is_in_it(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    draw = random.Random("lines")
    lines = [
        *HOSTILE,
        b"a" * 1_000_001,
        *(fuzzed(draw) for _ in range(150)),
        b'{"id": "last", "prompt": "Please make bread"}',
    ]
    records = ask(fitted, b"\n".join(lines), monkeypatch, batch=8, format=form)
    assert [record["line"] for record in records] == [i for i, line in enumerate(lines, start=1) if line.strip()]
    for record in records:
        again = json.loads(json.dumps(record, allow_nan=False, ensure_ascii=False).encode().decode())
        assert again == record
        assert set(record) - {"id"} in ({"line", "error"}, {"line", "harmful", "score", "probability", "threshold"})
    assert records[10]["id"] == "🙂"
    assert "harmful" in records[10]
    assert records[-1]["id"] == "last"
    assert "harmful" in records[-1]


def test_whatever_fails_on_one_prompt_costs_that_prompt_only(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlens.methods.guard.fitted import FittedGuard

    plain = FittedGuard.scores

    def broken(self: Any, acts: Any, **options: Any) -> torch.Tensor:
        found = plain(self, acts, **options)
        if "2" in acts.ids:
            raise IndexError("index 9 is out of range")
        return torch.where(torch.tensor([name == "4" for name in acts.ids]), torch.nan, found)

    monkeypatch.setattr(FittedGuard, "scores", broken)
    records = ask(fitted, "\n".join(requests(6, "wash")).encode(), monkeypatch, batch=6)
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["line"] for record in records if "error" in record] == [2, 4]
    assert "IndexError: index 9" in records[1]["error"]
    assert "nan, so it can't be judged" in records[3]["error"]


def test_the_stream_equals_asking_in_python(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    import mechlens as ml

    texts = requests(7, "wash")
    records = ask(fitted, "\n".join(texts).encode(), monkeypatch, batch=3)
    said = ml.LatentGuard.of(ml.open(fitted.guard))(ml.load(fitted.model), texts)
    assert [record["score"] for record in records] == pytest.approx([one.score for one in said], rel=1e-4, abs=1e-6)
    assert [record["harmful"] for record in records] == [one.harmful for one in said]
    single = ask(fitted, "\n".join(texts).encode(), monkeypatch, batch=1)
    assert [one["score"] for one in single] == pytest.approx([one["score"] for one in records], rel=1e-4, abs=1e-6)


class Endless:
    """A stream that never ends and counts what was read of it."""

    def __init__(self, line: bytes) -> None:
        self.line, self.lines_read = line, 0

    def readline(self, size: int = -1, /) -> bytes:
        self.lines_read += 1
        return self.line


def test_an_endless_stream_is_answered_as_it_comes(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Endless(b"Please make bread\n")

    class Stdin:
        buffer = stream

    monkeypatch.setattr(sys, "stdin", Stdin)
    records = predict(GuardPredict(model=fitted.model, guard=fitted.guard, batch=4))
    first = [next(records) for _ in range(9)]
    assert [record["line"] for record in first] == list(range(1, 10))
    assert stream.lines_read == 12  # no more than the batch that is being answered
    records.close()


def test_a_line_without_an_end_is_not_held_in_memory() -> None:
    import tracemalloc

    class Long:
        def __init__(self) -> None:
            self.pieces = 100

        def readline(self, size: int = -1, /) -> bytes:
            self.pieces -= 1
            if self.pieces >= 0:
                return b"x" * size
            return {-1: b"end\n", -2: b"next\n"}.get(self.pieces, b"")

    tracemalloc.start()
    lines = list(read_lines(Long(), GuardPredict(guard="g")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LONGEST_LINE  # of a hundred times that
    assert "longer than" in lines[0].error
    assert lines[1].prompt is not None
    assert (lines[1].number, lines[1].prompt.text) == (2, "next")


def test_a_line_that_never_ends_is_one_error_and_the_last() -> None:
    import tracemalloc

    tracemalloc.start()
    with open("/dev/zero", "rb") as stream:
        lines = list(read_lines(stream, GuardPredict(guard="g")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * LONGEST_LINE  # of a thousand times that
    assert [line.number for line in lines] == [1]
    assert "no end within 1024 MB, so no more is read" in lines[0].error


def test_an_error_names_the_line_once() -> None:
    text = b'{"goal": "Hi"}\n{"goal": ""}\n{"other": "Hi"}\n'
    lines = list(read_lines(io.BytesIO(text), GuardPredict(guard="g", format="jsonl")))
    assert lines[1].error.startswith("line 2, column 'goal', is empty")
    assert lines[2].error.startswith("line 3 has none of the usual prompt columns")


def test_a_file_is_read_by_its_ending(fitted: Fitted, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"not": "json here"}\nPlease make bread\n')
    (tmp_path / "p.jsonl").write_text('{"goal": "Please make bread"}\n"Please make bread"\n[1]\n')
    options = {"model": fitted.model, "guard": fitted.guard}
    plain = list(predict(GuardPredict(input=str(tmp_path / "p.txt"), **options)))
    lines = list(predict(GuardPredict(input=str(tmp_path / "p.jsonl"), **options)))
    assert all("harmful" in record for record in plain)
    assert plain[1]["score"] == pytest.approx(lines[0]["score"], rel=1e-4)
    assert lines[0]["score"] == pytest.approx(lines[1]["score"], rel=1e-4)
    assert lines[2] == {"line": 3, "error": "holds a list; a record is an object with a prompt, or a text"}


def test_the_command_prints_one_object_a_line_and_one_sentence_for_a_wrong_guard(
    fitted: Fitted, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "p.txt").write_text("Please make bread\nPlease break bread\n")
    command = ["guard", "predict", "--model", fitted.model, "--input", str(tmp_path / "p.txt"), "--guard"]
    capfd.readouterr()
    main([*command, fitted.guard])
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [set(record) for record in printed] == [{"line", "harmful", "score", "probability", "threshold"}] * 2
    (tmp_path / "p.txt").write_bytes(b"Please make bread\n\xff\n")
    with pytest.raises(SystemExit) as stop:
        main([*command, fitted.guard])
    said = capfd.readouterr()
    assert stop.value.code == 1
    assert ["error" in json.loads(line) for line in said.out.splitlines()] == [False, True]
    assert said.err.splitlines()[-1] == 'mechlens: 1 of 2 lines could not be judged; each says why under "error"'
    (tmp_path / "p.txt").write_bytes(b"\n\n")
    main([*command, fitted.guard])
    said = capfd.readouterr()
    assert (said.out, said.err.strip().endswith("p.txt holds no prompt, so nothing was judged")) == ("", True)
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "p.txt")])
    assert "is truncated or not a safetensors file" in capfd.readouterr().err


# Perplexity


def test_surprise_is_the_mean_loss_of_the_instructions_tokens(tiny_model: Any) -> None:
    import mechlens as ml
    from mechlens.methods.behaviour.perplexity import instruction_surprise
    from mechlens.models.native import native

    model = tiny_model()
    batch = ml.tokenize([ml.Prompt("a", "the thing is here"), ml.Prompt("b", "ok")], ml.template_of(model))
    found = instruction_surprise(model, batch)
    for i in range(2):
        ids, (start, end) = batch.row(i), (batch.instruction[i] - batch.offset(i)).tolist()
        with native(model) as hf_model, torch.inference_mode():
            logits = hf_model(torch.tensor([ids])).logits[0].double()
        told = logits.log_softmax(dim=-1)
        expected = -torch.stack([told[t - 1, ids[t]] for t in range(start, end + 1)]).mean()
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-4)


def test_a_named_input_is_a_regular_file(tmp_path: Path) -> None:
    """What has no end, or may never begin, is for stdin, where whoever writes it can be seen."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        with pytest.raises(UserError, match="is a pipe or a device; give a regular file"), _opened(name):
            pass


def test_weights_guards_and_directions_are_regular_files(tmp_path: Path) -> None:
    from mechlens.methods.guard.fitted import FittedGuard
    from mechlens.models.checkpoints.lora import read_lora
    from mechlens.runs import artifacts
    from mechlens.runs.vectors.direction_files import read_direction

    for name in ("x.safetensors", "x.pt", "x.gguf", "adapter_model.safetensors"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (
        lambda: artifacts.load(tmp_path / "x.safetensors", FittedGuard),
        *(lambda name=name: read_direction(tmp_path / name) for name in ("x.safetensors", "x.pt", "x.gguf")),
        lambda: read_lora(tmp_path),
    ):
        with pytest.raises(UserError, match="is a pipe or a device; give a regular file"):
            read()


def test_a_system_prompt_in_a_column_is_the_models_system_prompt() -> None:
    def line(**record: Any) -> Any:
        stream = io.BytesIO(json.dumps(record).encode())
        (found,) = read_lines(stream, GuardPredict(model="m", guard="g"))
        return found

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    in_turns, in_column = line(messages=turns).prompt, line(prompt="hi", system="Be brief.").prompt
    assert in_column.system == in_turns.system == "Be brief."
    assert line(prompt="hi", system=None).prompt.system is None
    assert "column 'system', holds an int" in line(prompt="hi", system=5).error
