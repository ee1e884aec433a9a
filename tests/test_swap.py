"""Checkpoints that take turns in one module: the same bits as loading each of them, and the base back bit for bit."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.models.checkpoints.lora import WEIGHTS
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.checkpoints.weight_store import WeightStore
from mechlens.models.load import load
from mechlens.models.native import native
from mechlens.prompts.prompt import Prompt

pytestmark = pytest.mark.exact

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(("one the thing", "two", "and a third the thing in the end"))]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(folder: Path, architecture: str = "llama", seed: int = 0) -> str:
    tiny_hf(architecture, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def weights(model: Any) -> dict[str, torch.Tensor]:
    with native(model) as hf_model:
        return {name: value.clone() for name, value in hf_model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def adapter(path: str, step: int = 1) -> Member:
    return Member(f"checkpoint-{step}", path, "adapter", step)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mixtral"])
def test_an_adapter_in_place_has_the_bits_of_a_loaded_one(architecture: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture)
    paths = [str(save_adapter(base, tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2)]
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        for path in paths:  # the second on top of the first
            model = series.put(adapter(path))
            loaded = load(base, adapter=path)
            assert same(weights(model), weights(loaded))
            assert not same(weights(model), before)
            assert model.mechlens.checkpoint.fingerprint == loaded.mechlens.checkpoint.fingerprint
            fast, slow = (collect(m, PROMPTS, positions=["inst", "last"]).values for m in (model, loaded))
            assert torch.equal(fast, slow)
            tokens = torch.arange(5, 14)[None]
            assert torch.equal(model(tokens), loaded(tokens))  # TransformerLens' own modules see the swap too
        series.put(Member("base", base, "base", 0))
        assert same(weights(series.model), before)
        assert series.model.mechlens.checkpoint.fingerprint == load(base).mechlens.checkpoint.fingerprint


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"k_proj": 2}}]
)
def test_scales_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    path = str(save_adapter(base, tmp_path / "a", seed=1, **options))
    with checkpoint_swapper(base) as series:
        assert same(weights(series.put(adapter(path))), weights(load(base, adapter=path)))


def test_half_precision_is_rounded_after_the_change_as_load_does(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    path = str(save_adapter(base, tmp_path / "a", seed=1))
    with checkpoint_swapper(base, dtype="bfloat16") as series:
        assert same(weights(series.put(adapter(path))), weights(load(base, adapter=path, dtype="bfloat16")))
        assert same(weights(series.put(Member("base", base, "base", 0))), weights(load(base, dtype="bfloat16")))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_full_checkpoint_takes_its_turn(architecture: str, tmp_path: Path) -> None:
    base, later = (saved(tmp_path / name, architecture, seed) for name, seed in (("base", 0), ("later", 1)))
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        model = series.put(Member("later", later, "full", 10))
        assert same(weights(model), weights(load(later)))
        assert model.mechlens.checkpoint.step == 10
        tokens = torch.arange(5, 14)[None]
        assert torch.equal(model(tokens), load(later)(tokens))
        assert same(weights(series.put(Member("base", base, "base", 0))), before)


def test_what_does_not_fit_is_refused_and_the_base_is_in_place(tmp_path: Path) -> None:
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", "gpt2")
    fits, odd = (str(save_adapter(b, tmp_path / f"a{i}", seed=1)) for i, b in enumerate((base, other)))
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        for member, words in (
            (adapter(odd), "which base doesn't have"),
            (Member("other", other, "full", 1), "one architecture"),
            (Member("x", fits, "adapter", 1, base_fingerprint="0" * 64), "another base"),
        ):
            series.put(adapter(fits))
            with pytest.raises(UserError, match=words):
                series.put(member)
            assert same(weights(series.model), before)
            assert series.model.mechlens.checkpoint.step == 0


def test_the_vault_gives_back_every_bit_and_leaves_no_file(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor([float("nan"), -0.0])}
    with (tmp_path / "file").open("w+b") as file:
        store = WeightStore(file)
        for name, value in values.items():
            store.put(name, value)
        for name, value in values.items():
            assert torch.equal(store.get(name).reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    with checkpoint_swapper(saved(tmp_path / "base")):
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_a_member_with_nan_weights_is_refused_by_name_and_the_base_is_back(name: str, tmp_path: Path) -> None:
    """Attention may swallow NaN in its queries and keys, so that every number looks sound."""
    base = saved(tmp_path / "base")
    hf_model = tiny_hf("llama", seed=3)
    with torch.no_grad():
        hf_model.get_parameter(f"model.layers.0.{name}.weight")[0, 0] = float("nan")
    hf_model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        with pytest.raises(UserError, match=rf"{name}.* holds NaN or infinity \(1 of"):
            series.put(Member("checkpoint-1", str(tmp_path / "nan"), "full", 1))
        assert same(weights(series.model), before)


def test_an_adapter_with_nan_is_refused_before_its_turn(tmp_path: Path) -> None:
    """As the first thing that a study does, not after the checkpoints before it."""
    base = saved(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "adapter", seed=1)
    values = load_file(folder / WEIGHTS)
    first = min(values)
    values[first][0, 0] = float("nan")
    save_file(values, folder / WEIGHTS)
    with checkpoint_swapper(base) as series, pytest.raises(UserError, match=r"layers.* holds NaN or infinity"):
        series.changes(adapter(str(folder)))
