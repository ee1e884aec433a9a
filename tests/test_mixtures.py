"""Adapters added up and mixed by token: one alone is itself, and what peft gives; shared factors of a series."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter, save_peft
from peft import LoraConfig, PeftModel
from saved import save_model
from tiny import tiny_hf, tiny_tokenizer

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.geometry.tucker import shared_factors
from mechlens.models.checkpoints.lora import read_lora
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper, checkpoint_swapper
from mechlens.models.load import load, load_hf
from mechlens.models.mixtures.by_token import TokenGate, mixed_by_token
from mechlens.models.mixtures.summed import put_mixture

TOKENS = torch.arange(5, 17)[None]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with adapters of three kinds."""
    root = tmp_path_factory.mktemp("mixtures")
    base = str(save_model(root / "base"))
    save_adapter(base, root / "lora", seed=1)
    save_adapter(base, root / "rslora", seed=2, rank=2, use_rslora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_peft(base, root / "dora", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True))
    return root


@pytest.fixture(scope="module")
def swapper(folder: Path) -> Iterator[CheckpointSwapper]:
    with checkpoint_swapper(str(folder / "base")) as one:
        yield one


def member(folder: Path, name: str) -> Member:
    return Member(name, str(folder / name), "adapter", 1)


def said(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS)
    return found


# --- added up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_one_alone_is_that_checkpoint_and_two_halves_of_one_too(
    name: str, folder: Path, swapper: CheckpointSwapper
) -> None:
    one, again = member(folder, name), Member("again", str(folder / name), "adapter", 2)
    alone = said(swapper.put(one))
    other = member(folder, "lora" if name == "rslora" else "rslora")
    assert torch.allclose(said(put_mixture(swapper, {one: 1.0, other: 0.0})), alone, atol=1e-6)
    assert torch.allclose(said(put_mixture(swapper, {one: 0.5, again: 0.5})), alone, atol=1e-5)
    base = said(swapper.put(Member("base", str(folder / "base"), "base", 0)))
    assert torch.equal(said(put_mixture(swapper, {one: 0.0})), base)
    assert float((alone - base).abs().max()) > 0.01


def test_a_sum_is_what_peft_concatenates(folder: Path, swapper: CheckpointSwapper) -> None:
    hf_model, _ = load_hf(str(folder / "base"))
    adapted = PeftModel.from_pretrained(hf_model, str(folder / "lora"), adapter_name="lora")
    adapted.load_adapter(str(folder / "rslora"), adapter_name="rslora")
    adapted.add_weighted_adapter(["lora", "rslora"], [0.7, 0.4], "both", combination_type="cat")
    adapted.set_adapter("both")
    with torch.inference_mode():
        theirs = adapted.eval()(input_ids=TOKENS).logits
    model = put_mixture(swapper, {member(folder, "lora"): 0.7, member(folder, "rslora"): 0.4})
    assert torch.allclose(said(model), theirs, atol=1e-5)
    assert model.mechlens.checkpoint.name == "0.7 lora + 0.4 rslora"
    with pytest.raises(UserError, match="no checkpoint is to be mixed"):
        put_mixture(swapper, {})


# --- by token --------------------------------------------------------------------------------------------------------


def test_shares_of_one_are_that_adapter_at_every_token_until_they_change(folder: Path) -> None:
    base = load(str(folder / "base"))
    adapters = [found for name in ("lora", "rslora") if (found := read_lora(folder / name)) is not None]
    alone = [said(load(str(folder / "base"), adapter=str(folder / name))) for name in ("lora", "rslora")]
    before = said(base)

    def later(residual: torch.Tensor, block: int) -> torch.Tensor:
        """The first adapter up to the fifth token, the second from there on."""
        first = (torch.arange(residual.shape[1]) < 5).float().expand(residual.shape[:2])
        return torch.stack([first, 1 - first], dim=-1)

    def second(residual: torch.Tensor, block: int) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]).expand(*residual.shape[:2], 2)

    with mixed_by_token(base, adapters, second) as mixed:
        assert torch.allclose(said(mixed), alone[1], atol=1e-5)
    with mixed_by_token(base, adapters, later) as mixed:
        found = said(mixed)
    assert torch.allclose(found[:, :5], alone[0][:, :5], atol=1e-5)
    assert float((found - alone[0])[:, 5:].abs().max()) > 0.01
    with mixed_by_token(base, [adapters[0]] * 2, TokenGate(torch.randn(2, base.cfg.d_model), torch.zeros(2))) as mixed:
        assert torch.allclose(said(mixed), alone[0], atol=1e-5)  # shares of one adapter add up to it
    assert torch.equal(said(base), before)


def test_what_is_collected_from_a_mixture_is_that_of_the_adapter(folder: Path) -> None:
    base, changes = load(str(folder / "base")), read_lora(folder / "lora")
    assert changes is not None
    with mixed_by_token(base, [changes], TokenGate(torch.zeros(1, base.cfg.d_model), torch.zeros(1))) as mixed:
        found = ml.collect(mixed, ["one", "two and three"], positions=["last"])
    alone = ml.collect(load(str(folder / "base"), adapter=str(folder / "lora")), ["one", "two and three"],
                       positions=["last"])  # fmt: skip
    assert torch.allclose(found.values, alone.values, atol=1e-5)


def test_matrices_that_do_not_run_by_themselves_are_refused(folder: Path, tmp_path: Path) -> None:
    gpt2 = tmp_path / "gpt2"
    tiny_hf("gpt2").save_pretrained(gpt2)
    tiny_tokenizer().save_pretrained(gpt2)
    adapter = read_lora(save_adapter(str(gpt2), tmp_path / "adapter", seed=1))
    llama = read_lora(folder / "lora")
    assert adapter is not None
    assert llama is not None
    gate = TokenGate(torch.zeros(1, 32), torch.zeros(1))
    with pytest.raises(UserError, match="isn't run by itself"), mixed_by_token(load(str(gpt2)), [adapter], gate):
        pass
    with pytest.raises(UserError, match="doesn't have"), mixed_by_token(load(str(gpt2)), [llama], gate):
        pass
    model = load(str(folder / "base"))
    with pytest.raises(UserError, match="gives 1 shares and there are 2"), mixed_by_token(model, [llama] * 2, gate):
        said(model)


# --- shared factors --------------------------------------------------------------------------------------------------


def test_full_rank_reproduces_a_series_and_shared_directions_are_found(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    series = torch.randn(4, 7, 5, generator=draw, dtype=torch.float64)
    whole = shared_factors(series, rank=7)
    assert torch.allclose(whole.product(), series, atol=1e-12)
    assert whole.kept == pytest.approx(1)
    outputs, inputs = (torch.linalg.qr(torch.randn(n, 2, generator=draw, dtype=torch.float64)).Q for n in (7, 5))
    planted = outputs @ torch.randn(4, 2, 2, generator=draw, dtype=torch.float64) @ inputs.T
    found = shared_factors(planted, rank=2)
    assert torch.allclose(found.product(), planted, atol=1e-12)
    assert float((found.outputs.T @ outputs).det().abs()) == pytest.approx(1)  # the same plane
    parts = [shared_factors(series, rank=k).kept for k in range(1, 8)]
    assert parts == sorted(parts)
    lora = read_lora(folder / "lora")
    assert lora is not None
    product = lora["model.layers.0.mlp.down_proj"].product().double()
    assert shared_factors(torch.stack([product, 2 * product]), rank=4).kept == pytest.approx(1)  # of rank 4
