"""The untrained floor: blocks are drawn anew and nothing else changes, and what was there comes back bit for bit."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from peft import LoraConfig, get_peft_model
from test_swap import adapter, same, saved, weights
from tiny import ARCHITECTURES, tiny_hf

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.models.checkpoints.random_blocks import random_blocks, randomise_blocks
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.native import blocks_of
from mechlens.prompts.prompt import Prompt

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(("one the thing", "two", "and a third the thing in the end"))]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outside(state: dict[str, Any], blocks: set[str]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in blocks}


def of_blocks(module: Any) -> set[str]:
    inside = {id(parameter) for block in blocks_of(module) for parameter in block.parameters()}
    return {name for name, parameter in module.named_parameters() if id(parameter) in inside}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_the_blocks_is_drawn_and_nothing_else(architecture: str) -> None:
    module = tiny_hf(architecture)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    names = of_blocks(module)
    randomise_blocks(module, list(blocks_of(module)), 0)
    after = {name: value.clone() for name, value in module.state_dict().items()}
    matrices = [name for name in names if before[name].ndim > 1 and before[name].std() > 0]
    assert matrices
    assert not [name for name in matrices if torch.equal(before[name], after[name])]
    assert same(outside(before, names), outside(after, names))
    # The model's own scale: what a fresh model of this configuration has.
    fresh = type(module)(module.config).state_dict()
    for name in matrices:
        if "router" not in name and "gate.weight" not in name:
            assert float(after[name].std()) == pytest.approx(float(fresh[name].std()), rel=0.35), name
    other = tiny_hf(architecture, seed=5)
    randomise_blocks(other, list(blocks_of(other)), 0)  # the weights before don't matter, the seed does
    assert same({n: after[n] for n in names}, {n: other.state_dict()[n] for n in names})
    randomise_blocks(other, list(blocks_of(other)), 1)
    assert not same({n: after[n] for n in names}, {n: other.state_dict()[n] for n in names})


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral", "phi3"])
def test_a_swapper_takes_its_turn_with_random_blocks(architecture: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture)
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        trained = collect(series.model, PROMPTS).values
        if architecture != "mixtral":
            series.put(adapter(str(save_adapter(base, tmp_path / "a", seed=1))))
        model = series.put_random_blocks(3)
        read = collect(model, PROMPTS).values
        assert torch.equal(read[:, 0], trained[:, 0])  # the words are there as before
        assert not torch.allclose(read[:, 1:], trained[:, 1:], atol=1e-2)
        assert model.mechlens.checkpoint.fingerprint != series.base.fingerprint
        tokens = torch.arange(5, 14)[None]
        mended = model(tokens)  # TransformerLens' own modules see them too
        assert torch.allclose(mended, model.original_model(tokens).logits, atol=1e-4)
        assert torch.equal(collect(series.put_random_blocks(3), PROMPTS).values, read)
        assert not torch.equal(collect(series.put_random_blocks(4), PROMPTS).values, read)
        assert same(weights(series.put(Member("base", base, "base", 0))), before)
        assert torch.equal(collect(series.model, PROMPTS).values, trained)


def test_a_model_in_training_gets_its_own_tensors_back() -> None:
    module = get_peft_model(tiny_hf(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.get_rng_state()
    changed = []
    with contextlib.suppress(RuntimeError), random_blocks(module, 0):
        changed = [n for n, value in module.state_dict().items() if not torch.equal(value, before[n])]
        raise RuntimeError
    assert changed
    assert all(".layers." in name for name in changed)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == places
    assert same(dict(module.state_dict()), before)


def test_a_matrix_that_no_initialiser_knows_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A floor that keeps some of the training would call trained models untrained."""
    module = tiny_hf()

    def forgetful(self: Any, part: Any) -> None:
        if isinstance(part, torch.nn.Linear) and part.out_features != 64:
            part.weight.normal_()

    monkeypatch.setattr(type(module), "_init_weights", forgetful)
    with pytest.raises(UserError, match=r"no initialiser for 0.mlp.gate_proj.weight"):
        randomise_blocks(module, list(blocks_of(module)), 0)
    base = saved(tmp_path / "base")
    with checkpoint_swapper(base) as series:
        before = weights(series.model)
        with pytest.raises(UserError, match="no initialiser"):
            series.put_random_blocks(0)
        assert same(weights(series.model), before)
