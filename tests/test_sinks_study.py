"""Sinks as a study: heads that sleep on one kind of text, the verdict, named positions, experiments and a whole run."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from planted_sink_domains import WORLDS, planted
from planted_sinks import SINK_HEADS, planted_sinks
from saved import save_model
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.sinks.contrast import domain_contrast
from mechlens.methods.sinks.interventions import away_from
from mechlens.methods.sinks.positions import FIRST, TEMPLATE, WORDS, position_mass
from mechlens.methods.sinks.result import HEAD_MEASURES, LEVEL_MEASURES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.attention.watch import watch
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import tokenize
from mechlens.settings import WandbSettings
from mechlens.studies.driver import run
from mechlens.studies.shared.sink_positions import Asked
from mechlens.studies.sinks.config import FindSinks
from mechlens.studies.sinks.passes import _turned
from mechlens.studies.sinks.texts import domain_prompts
from mechlens.studies.sinks.verdict import (
    ALIKE,
    IDLE,
    INCONCLUSIVE,
    NONE,
    NOT_MEASURABLE,
    SWITCH,
    _word,
    sinks_verdict,
)
from mechlens.views import show_attention

OFF = WandbSettings(mode="disabled")
IDS = [5, 9, 11, 7, 30, 8, 4, 17, 22, 6, 12, 25, 3, 28, 10, 14]


# --- hidden tokens and named positions -------------------------------------------------------------------------------


@pytest.mark.exact
@pytest.mark.parametrize(
    ("architecture", "sharp"),
    [("llama", 1.0), ("gemma3", 1.0), ("gpt_oss", 1.0), ("llama", 1000.0), ("gpt_oss", 50.0), ("gpt_oss", 1000.0)],
)
def test_a_hidden_token_is_one_that_a_mask_hides(architecture: str, sharp: float) -> None:
    """Of one that took all but 1e-12 of the attention, or of which float32 leaves nothing, too: in float64 by masks."""
    hf_model, places = tiny_hf(architecture), [0, 4]
    for layer in hf_model.model.layers:
        for part in layer.self_attn.q_proj.parameters():
            part.data *= sharp
    plain = copy.deepcopy(hf_model).double()
    plain.set_attn_implementation("eager")
    plain.config.update({"_experts_implementation": "eager"})  # the other one has no float64
    n, least = len(IDS), torch.finfo(torch.float32).min
    window = getattr(hf_model.config, "sliding_window", None) or n
    masks: dict[str, torch.Tensor] = {}
    for name, width in (("full_attention", n), ("sliding_attention", window)):
        own, key = torch.arange(n)[:, None], torch.arange(n)
        there = (key <= own) & (own - key < width)
        for place in places:
            there[place + 1 :, place] = False
        masks[name] = torch.zeros(n, n).double().masked_fill(~there, least)[None, None]
    kinds = getattr(hf_model.config, "layer_types", None)
    given: Any = masks if kinds else masks["full_attention"]
    with torch.no_grad():
        hidden = plain(torch.tensor([IDS]), attention_mask=given, output_hidden_states=True).hidden_states[2][0]
        as_it_is = plain(torch.tensor([IDS]), output_hidden_states=True).hidden_states[2][0]
    model = bridge(hf_model, tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
    levels: dict[int, torch.Tensor] = {}
    gaps: list[float] = []
    watch(model, IDS, lambda one: gaps.append(float((one.logits[:, 2:, 0] - one.logits[:, 2:, 1]).max())))
    assert sharp == 1 or max(gaps) > 20  # below exp(-20) a row of float32 misses its sum by more than is left
    watch(model, IDS, residual=lambda level, x: levels.__setitem__(level, x), change=away_from(places))
    assert torch.allclose(levels[2].double(), hidden, atol=2e-5)
    assert not torch.allclose(hidden, as_it_is, atol=1e-3)


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_attention_of_answers_is_what_transformers_puts_out(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    batch = tokenize(["How do I bake a cake?", "Say hello to them."], template_of(model))
    answers = [[5, 9, 11, 7], [3, 8]]
    found = position_mass(model, batch, answers)
    plain = tiny_hf(architecture)
    plain.set_attn_implementation("eager")
    for i, own in enumerate(answers):
        row = batch.row(i)
        with torch.no_grad():
            patterns = plain(torch.tensor([[*row, *own]]), output_attentions=True).attentions
        asked = torch.stack([one[0, :, len(row) :] for one in patterns])  # layer head query key
        start, end = (batch.instruction[i] - batch.offset(i)).tolist()
        named = {name: [int(batch.at(name)[i]) - batch.offset(i)] for name in batch.positions}
        words = [place for place in range(start, end) if [place] not in named.values()]
        groups = {FIRST: [0], TEMPLATE: list(range(1, start)), WORDS: words} | named
        assert found.positions == tuple(groups)
        for column, group in enumerate(groups.values()):
            right = torch.stack([_to_places(layer, group) for layer in asked]).nanmean(dim=0)
            assert found.values[:, i, column].tolist() == pytest.approx(right.tolist(), rel=1e-4, abs=1e-7, nan_ok=True)


def _to_places(pattern: torch.Tensor, group: list[int]) -> torch.Tensor:
    """Of one layer: attention, even attention and the share of heads above .3, by place; then their means."""
    each = []
    for place in group:
        seen = pattern[0, :, place] > 0  # by queries of the answer, whose window may have moved on
        if not seen.any():
            each.append([math.nan] * 3)
            continue
        shares = pattern[:, seen, place].mean(dim=1)
        evenly = 1 / (pattern[0, seen] > 0).sum(dim=1)
        each.append([float(shares.mean()), float(evenly.mean()), float((shares > 0.3).float().mean())])
    return torch.tensor(each).nanmean(dim=0) if each else torch.full((3,), math.nan)


def test_a_planted_sink_gets_the_answers_attention() -> None:
    model = planted_sinks("x")
    batch = tokenize(["the x stands here near the start"], template_of(model, None))
    found = position_mass(model, batch, [[5, 9, 11, 7]])
    heads = len(SINK_HEADS) / 4
    rest = found.of("mass")[0, found.positions.index(WORDS)]
    # The template is raw: x is one of the words, beside which a mean is taken; sink heads look nowhere else.
    words = float(rest) * (len(batch.row(0)) - 2)
    assert words > heads * 0.99
    assert float(found.of("mass")[0, found.positions.index(FIRST)]) < 0.1
    table = position_mass(model, tokenize(["the x stands here", "say"], template_of(model, None)), [[5, 9], []])
    assert table.table(0, 20).set_index("position")["n"].to_dict() == {FIRST: 1, TEMPLATE: 0, WORDS: 1, "last": 1}
    with pytest.raises(UserError, match="no prompt has an answer"):
        position_mass(model, batch, [[]])


def test_the_picture_is_the_attention_that_transformers_puts_out(tiny_model: Any) -> None:
    model, text = tiny_model("llama"), "How do I bake a </script> small cake?"
    view = show_attention(model, text, [(0, 1), (2, 3)])
    arguments = view.html.rpartition("CircuitsVis.AttentionHeads,")[2]
    assert arguments.count("<") == 1  # the end of the script itself
    shown = torch.tensor(json.loads(re.search(r'"attention": (\[\[\[.*?\]\]\])', arguments)[1]))  # type: ignore[index]
    plain = tiny_hf("llama")
    plain.set_attn_implementation("eager")
    ids = tokenize([text], template_of(model)).row(0)
    with torch.no_grad():
        patterns = plain(torch.tensor([ids]), output_attentions=True).attentions
    assert torch.allclose(shown[0], patterns[0][0, 1], atol=1e-3)
    assert torch.allclose(shown[1], patterns[2][0, 3], atol=1e-3)
    picture = ElementTree.fromstring(view.svg)
    assert {part.tag.rpartition("}")[2] for part in picture.iter()} == {"svg", "rect", "text"}
    with pytest.raises(UserError, match=r"heads has \(7, 0\); give \(layer, head\) with a layer of 0, 1, 2"):
        show_attention(model, text, [(7, 0)])


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_no_planted_world_gets_a_wrong_word_often(name: str) -> None:
    world, right = WORLDS[name]
    words = [planted(world, seed, 16).word for seed in range(6)]
    assert sum(word not in (right, INCONCLUSIVE) for word in words) <= 1
    assert words.count(right) > 3 or world["gap"] == 0.02


@pytest.mark.parametrize(
    ("share", "difference", "p", "low", "high", "chance", "word"),
    [
        (0.49, 0.5, 0.01, 0.1, 0.2, 0.01, NONE),
        (0.5, 0.0999, 0.01, 0.1, 0.2, 0.01, ALIKE),
        (0.5, 0.1, 0.05, 0.1, 0.2, 0.01, SWITCH),
        (1.0, 0.5, 0.06, 0.1, 0.2, 0.01, INCONCLUSIVE),
        (1.0, 0.5, 0.01, 0.1, 0.2, 0.1, INCONCLUSIVE),  # no more than a random head
        (1.0, 0.5, 0.01, -0.1, 0.01, 0.01, IDLE),
        (1.0, 0.5, 0.01, -0.1, 0.02, 0.01, INCONCLUSIVE),  # perhaps more than a random head
        (1.0, 0.5, 0.01, -0.1, 0.06, 0.1, INCONCLUSIVE),  # random heads are loud, and it may be worth 0.05
        (1.0, 0.5, 0.01, 0.1, 0.2, math.nan, INCONCLUSIVE),
    ],
)
def test_the_word_is_that_of_the_rule(
    share: float, difference: float, p: float, low: float, high: float, chance: float, word: str
) -> None:
    gap = Estimate((low + high) / 2, low, high, 30)
    assert _word(Estimate.exact(share, 30), difference, p, gap, chance) == word


def test_where_every_head_is_chosen_nothing_is_held_against_chance() -> None:
    mass = torch.rand(24, 1, 2, generator=torch.Generator().manual_seed(0)) / 10
    mass[:12] += 0.5
    kinds = ["a"] * 12 + ["b"] * 12
    found = domain_contrast(mass, kinds, shuffles=99, seed=0)
    worth = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) + torch.tensor([0.0] * 12 + [3.0] * 12)
    both = sinks_verdict([True] * 24, mass, found, found.strongest(4), worth, 2, kinds, resamples=50, seed=0)
    assert both.word == INCONCLUSIVE
    assert "no other head to draw" in str(both.headline)
    assert "0.000" not in str(both.headline)
    worth[1, 12:] = -3.0  # worth less where it is active: as loud as if more
    held = sinks_verdict([True] * 24, mass, found, [(0, 0), (0, 1)], worth, 1, kinds, resamples=50, seed=0)
    assert 3 < held.random < 4


def test_few_texts_are_not_measurable() -> None:
    assert planted(WORLDS["no sinks"][0], 0, 10).word == NONE
    found = planted(WORLDS["no sinks"][0], 0, 9)
    assert found.word == NOT_MEASURABLE
    assert "at least 10 of each" in str(found.headline)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sinks")
    save_model(folder / "model")
    config = FindSinks(
        model=str(folder / "model"), texts=4, tokens=24, heads=1, random_heads=1, random_sets=1, shuffles=19,
        resamples=20, n=10, max_new_tokens=2, out=folder / "run", wandb=OFF,
    )  # fmt: skip
    return folder / "run", run(config)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def test_a_whole_run_leaves_its_numbers(finished: tuple[Path, Any]) -> None:
    out, found = finished
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "success"
    assert found.sentence.lower().startswith(NOT_MEASURABLE)
    heads = table(out, "heads")
    spread = heads[["mass.prose", "mass.code", "mass.chat"]]
    assert list(heads["difference"]) == pytest.approx(list(spread.max(axis=1) - spread.min(axis=1)), abs=1e-5)
    for name, keys in (("heads", HEAD_MEASURES), ("levels", LEVEL_MEASURES)):
        own = table(out, name)
        for one in [f"{key}.{kind}" for key in keys for kind in ("prose", "code")] if name == "heads" else keys:
            assert ((own[f"{one}_low"] <= own[one] + 1e-9) & (own[one] <= own[f"{one}_high"] + 1e-9)).all()
            assert (own[f"{one}_n"] == 4).all()
    assert (heads["mass.prose_low"] < heads["mass.prose_high"]).all()
    worth = table(out, "importance")
    assert worth.groupby(["heads_or_dimensions", "what", "domain"]).size().eq(1).all()
    first = heads.sort_values("difference", ascending=False).iloc[0]
    assert worth.iloc[0]["heads_or_dimensions"] == f"{first['layer']}.{first['head']}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Attention sinks in" in page
    assert "sink " in page


def test_positions_stand_beside_what_is_read_there(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    positions = table(out, "positions").set_index("position")
    assert list(positions.index)[:4] == ["first token", "template before", "words", "inst"]
    last = positions.index[-1]
    assert positions["auroc_harmful"].notna()[["inst", last]].all()
    assert positions["auroc_harmful"].isna()[["first token", "words"]].all()
    # The last token is what refusal is read at, so that nothing after it can be kept from it.
    assert positions["hidden_gap"].isna()[last]
    assert positions["hidden_gap"].notna()["inst"]
    assert positions["mass"].between(0, 1).all()


def test_experiments_stand_beside_random_ones_and_the_model_as_it_is(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    effects = table(out, "requests")
    plain = effects.iloc[0]
    assert plain["which"] == "none"
    assert plain["change_gap"] == 0
    assert plain[["cosine_harmful", "cosine_harmful_low", "cosine_harmful_high"]].tolist() == pytest.approx([1, 1, 1])
    assert effects["cosine_harmful"].between(effects["cosine_harmful_low"] - 1e-9, effects["cosine_harmful_high"]).all()
    assert effects["reliability_harmful"].between(-1, 1).all()
    assert set(effects["what"]) == {"", "off", "all on the sink", "at 0"}
    for _, own in effects[effects["what"] != ""].groupby("what"):
        assert "random" in set(own["which"])
    assert (effects["gap"] - plain["gap"]).tolist() == pytest.approx(effects["change_gap"].tolist(), abs=1e-6)


def test_a_turned_direction_has_its_cosine_in_the_interval_and_noise_has_no_reliability() -> None:
    positive = torch.arange(48) % 2 == 0
    asked = Asked("harmful", list(range(48)), positive, tuple(str(i // 2) for i in range(48)))
    found = []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        before, after, noise = torch.randn(3, 48, 16, generator=draw)
        sign = positive.float() * 2 - 1
        before[:, 0] += 3 * sign
        after[:, 0] += 3 * 0.6 * sign
        after[:, 1] += 3 * 0.8 * sign
        found.append((_turned(asked, before, after, 0), _turned(asked, before, noise, 0)))
    right = [one["cosine_harmful_low"] <= 0.6 <= one["cosine_harmful_high"] for one, _ in found]
    assert sum(right) >= 10
    assert all(one["cosine_harmful_high"] - one["cosine_harmful_low"] < 0.5 for one, _ in found)
    assert min(one["reliability_harmful"] for one, _ in found) > 0.8
    assert max(one["reliability_harmful"] for _, one in found) < 0.3


VERSE = "a line that is long enough to be read\nanother line of the same poem, later\n"


def test_a_base_model_is_asked_nothing_and_a_file_in_a_folder_is_a_kind(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "verse.txt").write_text(VERSE)
    config = FindSinks(
        model=str(tmp_path / "model"), template="none", domains=("prose", str(tmp_path / "verse.txt")), texts=2,
        tokens=24, heads=1, random_heads=1, random_sets=1, shuffles=9, resamples=10, out=tmp_path / "run", wandb=OFF,
    )  # fmt: skip
    found = run(config)
    assert found.sentence.lower().startswith(NOT_MEASURABLE)
    assert not (tmp_path / "run" / "tables" / "positions.parquet").exists()
    assert "mass.verse.txt" in table(tmp_path / "run", "heads")
    with pytest.raises(UserError, match=r"chat template, and `template` none leaves it out"):
        run(replace(config, domains=("prose", "chat"), out=tmp_path / "other"))


def test_a_file_of_texts_is_a_kind_and_what_can_not_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "verse.txt", tmp_path / "other" / "verse.txt", tmp_path / "chat"]
    for path in paths:
        path.write_text(VERSE)
    verse, again, chat = map(str, paths)
    kinds = domain_prompts(FindSinks(out=tmp_path, domains=("prose", verse), texts=2))
    assert {name: len(own) for name, own in kinds.items()} == {"prose": 2, "verse.txt": 2}
    with pytest.raises(UserError, match=r"two kinds of text are called 'verse.txt'; rename one of the files"):
        domain_prompts(FindSinks(out=tmp_path, domains=(verse, again), texts=2))
    with pytest.raises(UserError, match="would be called chat, as a kind that is built in"):
        domain_prompts(FindSinks(out=tmp_path, domains=("prose", chat)))
    with pytest.raises(UserError, match=r"tokens.* is 8, and at least 16 are needed"):
        domain_prompts(FindSinks(out=tmp_path, tokens=8))
    with pytest.raises(UserError, match="the kinds of text are prose; give two or more"):
        domain_prompts(FindSinks(out=tmp_path, domains=("prose",)))
    with pytest.raises(UserError, match=r"could not be read|there is no"):
        domain_prompts(FindSinks(out=tmp_path, domains=("prose", "./no.txt")))
    with pytest.raises(UserError, match="prose has 1 text, and at least 2"):
        domain_prompts(FindSinks(out=tmp_path, texts=1))
    single, wide = tmp_path / "single.txt", tmp_path / "wide.csv"
    single.write_text("a line that is long enough to be read\n")
    wide.write_text("number,line\n" + "".join(f"{i},line {i} of a poem\n" for i in range(12)))
    with pytest.raises(UserError, match="has 1 text, and at least 2 of each kind are needed"):
        domain_prompts(FindSinks(out=tmp_path, domains=("prose", str(single))))
    kinds = domain_prompts(FindSinks(out=tmp_path, domains=(verse, str(wide)), column="line", family_column="number"))
    assert {name: len(own) for name, own in kinds.items()} == {"verse.txt": 2, "wide.csv": 12}  # all that there are
    assert kinds["wide.csv"][3].text == "line 3 of a poem"
    for mistyped in ("pros", "poems"):
        with pytest.raises(
            UserError, match=r"no kind of text .* \(did you mean 'prose'\?\); choose from prose, code, c"
        ):
            domain_prompts(FindSinks(out=tmp_path, domains=(mistyped, "code")))
