"""The faster matrix product is a matrix product, whatever it is given, and no module keeps it."""

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_hf
from torch import nn

from mechlens.models.engine import products
from mechlens.models.engine.products import quick_products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN to multiply with"
)


@pytest.fixture(autouse=True)
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where the other library is slow."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


def plain_and_quick(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        plain = module(x)
        with quick_products(module):
            return plain, module(x)


INPUTS = {
    "a batch": torch.randn(3, 5, 40),
    "one row": torch.randn(1, 40),
    "a vector": torch.randn(40),
    "no rows": torch.randn(0, 40),
    "every second row": torch.randn(16, 40)[::2],
    "columns of something wider": torch.randn(9, 80)[:, :40],
    "turned round": torch.randn(40, 12).T,
    "expanded": torch.randn(1, 40).expand(7, 40),
    "not finite": torch.tensor([[float("inf")] * 40, [float("nan")] * 40, [1.0] * 40, [0.0] * 40]),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_any_input_gives_the_same(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    plain, quick = plain_and_quick(nn.Linear(40, 24, bias=bias), INPUTS[kind])
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_weight_that_is_part_of_another_or_turned_round() -> None:
    torch.manual_seed(0)
    module = nn.Linear(40, 24)
    for weight in (torch.randn(100, 40)[10:34], torch.randn(40, 24).T, torch.randn(24, 80)[:, ::2]):
        module.weight = nn.Parameter(weight)
        plain, quick = plain_and_quick(module, torch.randn(6, 40))
        torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)


def test_it_follows_a_weight_that_is_changed_inside() -> None:
    module, x = nn.Linear(40, 24, bias=False), torch.randn(6, 40)
    with torch.inference_mode(), quick_products(module):
        module(x)
        module.weight.zero_()
        assert not bool(module(x).any())


class Doubled(nn.Linear):
    """Somebody's own linear module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_modules_of_another_kind_are_left_alone() -> None:
    own, half, wrapped = Doubled(40, 24), nn.Linear(40, 24).bfloat16(), nn.Linear(40, 24)
    wrapped.forward = lambda x: x  # type: ignore[method-assign]  # as accelerate wraps what it moves
    with quick_products(nn.ModuleList([own, half, wrapped])):
        assert "forward" not in own.__dict__
        assert "forward" not in half.__dict__
        x = torch.randn(3, 40)
        assert wrapped(x) is x


def test_gradients_take_pytorchs_own_way() -> None:
    module, x = nn.Linear(40, 24), torch.randn(6, 40)
    with quick_products(module):
        module(x).sum().backward()
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, x.sum(dim=0).expand(24, 40))


def test_no_module_keeps_it_also_after_an_error_and_inside_itself() -> None:
    hf_model: Any = tiny_hf("llama")
    before = {name: dict(module.__dict__) for name, module in hf_model.named_modules()}
    with pytest.raises(ZeroDivisionError), quick_products(hf_model), quick_products(hf_model):
        raise ZeroDivisionError
    assert {name: dict(module.__dict__) for name, module in hf_model.named_modules()} == before


@torch.inference_mode()
def test_a_model_gives_the_same_logits() -> None:
    hf_model = tiny_hf("llama")
    plain = copy.deepcopy(hf_model)
    tokens = torch.arange(5, 45).view(2, 20)
    with quick_products(hf_model):
        torch.testing.assert_close(hf_model(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)
