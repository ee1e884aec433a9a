"""`mechlens patch` on a circuit that refuses: the verdict names the planted places, and the record holds together."""

import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import test_patching_truth as truth
import torch
from saved import REFUSAL, left_unfinished
from sentence import require_one_sentence
from tiny import tiny_tokenizer

from mechlens.cli import main
from mechlens.methods.patching.result import PatchResult
from mechlens.models.load import load
from mechlens.runs import artifacts
from mechlens.runs.privacy import PrivateTexts, figure_without_text
from mechlens.runs.run import read_run

LETTERS = "cdefghjk"
WAYS = ("denoising", "noising")
SWEEPS = [f"{kind}{way}{null}" for kind in ("", "heads.") for way in WAYS for null in ("", ".random")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy circuit of two heads as a chat model on disk: at `A` it says "I cannot", at `B` it says "y"."""
    root = tmp_path_factory.mktemp("circuit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth, "bridged", lambda hf_model, name: hf_model)
        hf_model = truth.circuit.__wrapped__(True)
    tokenizer = tiny_tokenizer(truth.SHORT)
    tokenizer.add_tokens([REFUSAL])
    with torch.no_grad():
        hf_model.lm_head.weight.zero_()
        hf_model.lm_head.weight[tokenizer.convert_tokens_to_ids(REFUSAL)] = 3 * truth.feature(truth.A2)
        hf_model.lm_head.weight[tokenizer.convert_tokens_to_ids("y")] = 3 * truth.feature(truth.B2)
    hf_model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    rows = [{"clean": f"{x}yAz!", "corrupt": f"{x}yBz!"} for x in LETTERS]
    rows.insert(2, {"clean": "tyBz!", "corrupt": "tyAz!"})  # refused on the other side: not to be chosen
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def command(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "2", "--wandb.mode", "disabled", "--site", "resid_post", *more]
    return ["patch", "--model", str(folder), "--pairs", str(folder / "pairs.jsonl"), "--out", str(out), *fixed]


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    main(command(folder, out, "--keep-cache"))
    return out


def test_the_verdict_names_the_planted_places(recorded: Path) -> None:
    """A or B stands at instruction[-3]; head 0.1 brings it to instruction[-1], head 1.2 to the last token."""
    run = require_one_sentence(recorded)
    assert run.status == "success"
    for way in WAYS:
        assert run.metrics[f"{way}.recovery.best_before_last"].value == pytest.approx(1.0, abs=1e-3)
        assert run.metrics[f"{way}.layer.leaves_source"].value == 0
        assert run.metrics[f"{way}.layer.arrives_last"].value == 1
        assert run.metrics[f"{way}.recovery.top_head"].value == pytest.approx(1.0, abs=1e-3)
        assert run.metrics[f"{way}.recovery.top_head_random"].value < 0.9
        best = f"when {way}, the best place before the last token is instruction[-1] (recovery 1.00 [1.00, 1.00]"
        assert best.lower() in str(run.verdict).lower()
        assert f"when {way} 1.2 (1.00" in str(run.verdict)
    assert str(run.verdict).count(". ") == 1  # two sentences
    heads = pd.read_parquet(recorded / "tables" / "heads.parquet")
    found = heads[heads["p_corrected"] < 0.05]
    assert {(row.mode, row.layer, row.head) for row in found.itertuples()} == {
        ("denoising", 1, 2),
        ("noising", 1, 2),
    }
    pairs = pd.read_parquet(recorded / "tables" / "pairs.parquet")
    assert sorted(pairs["clean"]) == sorted(f"{x}yAz!" for x in LETTERS)


def test_roles_are_means_over_their_positions(recorded: Path) -> None:
    table = pd.read_parquet(recorded / "tables" / "recovery_by_role.parquet").set_index(["sweep", "role", "layer"])
    roles = ["instruction", "end of the instruction", "template before the last token", "last token"]
    assert list(dict.fromkeys(table.index.get_level_values("role"))) == roles
    for way in WAYS:
        recovery = table.loc[way]["recovery"]
        assert recovery["end of the instruction", 0] == pytest.approx(1.0, abs=1e-3)
        assert recovery["last token", 1] == pytest.approx(1.0, abs=1e-3)
        assert recovery["instruction"].abs().max() < 1e-3
        sweep = artifacts.load(recorded / f"patching_{way}.random.safetensors", PatchResult)
        words = [k for k, position in enumerate(sweep.positions) if re.fullmatch(r"instruction\[-[2-9]\]", position)]
        assert len(words) == 4
        mean = sweep.effect()[:, 0, words].mean() / (sweep.target - sweep.start).mean()
        assert table.loc[f"{way}.random", "instruction", 0]["recovery"] == pytest.approx(float(mean), abs=1e-6)


def test_the_record_holds_every_sweep_and_figure(recorded: Path) -> None:
    for name in (*SWEEPS, "attribution"):
        sweep = artifacts.load(recorded / f"patching_{name}.safetensors", PatchResult)
        assert sweep.source == ("random" if name.endswith("random") else "other prompt")
        assert sweep.mode == ("noising" if "noising" in name.split(".") else "denoising")
        assert sweep.site == ("z" if name.startswith("heads") else "resid_post")
        assert len(pd.read_parquet(recorded / "tables" / f"patching_{name}.parquet")) == sweep.values[0].numel()
    page = (recorded / "report.html").read_text(encoding="utf-8")
    for words in ("Which heads move it", "corrected over the whole grid", "control: random vectors"):
        assert words in page


def test_a_grid_shows_tokens_intervals_and_stars_and_its_control_beside_it(recorded: Path) -> None:
    figure = json.loads((recorded / "figures" / "grid_denoising.json").read_text())
    result, control = figure["data"]
    assert result["x"] == control["x"]
    assert not any("<" in label for label in result["x"])  # escaped: plotly reads HTML
    labels = [html.unescape(label) for label in result["x"]]
    assert labels[-3:] == ["instruction[-1] '!'", "post[0] '<|im_end|>'", "post[1] '<|im_start|>'"]
    table = pd.read_parquet(recorded / "tables" / "patching_denoising.parquet")
    at = labels.index("instruction[-1] '!'")
    row = table[(table["layer"] == 0) & (table["position"] == "instruction[-1]")].iloc[0]
    assert result["z"][0][at] == pytest.approx(row["recovery"])
    assert result["customdata"][0][at] == pytest.approx([row["low"], row["high"], row["p_corrected"]])
    assert "customdata[0]" in result["hovertemplate"]
    stars = {(y, x) for y, line in enumerate(result["text"]) for x, star in enumerate(line) if star}
    assert stars == {(0, at), (1, len(labels) - 1)}
    assert figure["layout"]["xaxis2"]["domain"][0] > figure["layout"]["xaxis"]["domain"][1]
    assert figure_without_text(figure, PrivateTexts()) is None  # its axis holds words of a prompt
    for name in ("heads", "by_role_denoising", "by_role_noising"):
        other = json.loads((recorded / "figures" / f"{name}.json").read_text())
        assert figure_without_text(other, PrivateTexts()) is not None


def test_given_again_it_computes_nothing_and_says_the_same(
    recorded: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_run(recorded)
    left_unfinished(recorded)
    monkeypatch.setattr("mechlens.methods.patching.sweep.edited_logits", None)
    main(command(folder, recorded, "--keep-cache"))
    after = read_run(recorded)
    assert (after.id, after.verdict, after.metrics) == (before.id, before.verdict, before.metrics)


def test_without_refusals_it_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = tmp_path / "pairs.jsonl"
    rows = [{"clean": f"{x}yBz!", "corrupt": f"{x}yAz!"} for x in LETTERS]
    swapped.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*command(folder, tmp_path / "out"), "--pairs", str(swapped)])
    assert "refuses one side and accepts the other in 0 of 8 pairs" in capsys.readouterr().err


def test_the_model_on_disk_is_the_circuit(folder: Path) -> None:
    model = load(str(folder))
    tokens = torch.tensor([tiny_tokenizer(truth.SHORT).encode("xyAz!<|im_end|><|im_start|>")])
    with torch.inference_mode():
        best = int(model(tokens)[0, -1].argmax())
    assert model.mechlens.tokenizer.convert_ids_to_tokens(best) == REFUSAL
