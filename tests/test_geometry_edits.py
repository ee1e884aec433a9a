"""What a training changed in a matrix: a planted edit is read back, inputs are those that the model computes with."""

from typing import Any

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.activations.module_inputs import module_inputs
from mechlens.methods.geometry.edits import edit_table, matrix_edit
from mechlens.models.checkpoints.lora import LowRank
from mechlens.models.native import native
from mechlens.prompts.batch import tokenize

N, OUT, IN = 40, 12, 9
FAMILIES = [str(i) for i in range(N)]
HARM = torch.arange(N) < N // 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_planted_gate_is_read_back() -> None:
    written, gate = draw(OUT, seed=1), torch.nn.functional.normalize(draw(IN, seed=2), dim=0)
    given = draw(N, IN) + 8 * HARM[:, None] * gate
    edit = matrix_edit(LowRank(written[:, None], gate[None], 3.0))
    found = edit_table(edit, {"harm": -written, "other": draw(OUT, seed=3)}, given, {"harm": HARM}, FAMILIES)
    assert len(found) == 1
    row = found.iloc[0]
    assert (row["share"], row["cos_harm"], row["auroc_harm"]) == pytest.approx((1, 1, 1))
    assert row["cos_other"] < 0.8


def test_components_are_sorted_and_what_is_written_elsewhere_has_no_cosine() -> None:
    edit = matrix_edit(draw(OUT, IN))
    found = edit_table(edit, {"harm": draw(OUT + 1)}, draw(N, IN, seed=4), {"harm": HARM}, FAMILIES)
    assert list(found["share"]) == sorted(found["share"], reverse=True)
    assert found["share"].sum() < 1
    assert found["cos_harm"].isna().all()
    assert found["auroc_harm"].between(0.5, 1).all()
    with pytest.raises(UserError, match="8 dimensions and the matrix reads 9"):
        edit_table(edit, {}, draw(N, IN - 1), {}, FAMILIES)


def test_inputs_times_the_matrix_are_what_the_module_puts_out(tiny_model: Any) -> None:
    model, name = tiny_model("llama"), "model.layers.1.self_attn.o_proj"
    batch = tokenize(["Say hello.", "How do I bake a small cake?"], template_of(model))
    found = module_inputs(model, batch, [name])[name]
    with native(model) as hf_model:
        weight = hf_model.get_submodule(name).get_parameter("weight").detach()
    truth = collect(model, batch, positions=["last"], site="attn_out").at(1, "last")
    assert torch.allclose(found @ weight.T, truth, atol=1e-5)
