"""Nothing is computed with weights that are damaged or elsewhere, and logits that mean nothing are no answer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward, reference
from mechlens.models.engine.probes import require_finite_logits, require_finite_weights
from mechlens.models.load import load
from mechlens.prompts.prompt import Prompt

PROMPTS = [Prompt(id="p0", text="the thing")]


def bridged(hf_model: Any) -> Any:
    return bridge(hf_model, tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))


def saved(hf_model: Any, folder: Path) -> str:
    hf_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_damaged_weight_is_named_at_load(tmp_path: Path, value: float, dtype: str) -> None:
    hf_model = tiny_hf()
    hf_model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    folder = saved(hf_model, tmp_path / "model")
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of the model 'model' .*1 of 2048 values"
    ):
        load(folder, dtype=dtype)


def test_every_weight_is_looked_at_and_sound_ones_pass() -> None:
    hf_model = tiny_hf()
    require_finite_weights(hf_model, "tiny")
    for name, parameter in hf_model.named_parameters():
        kept = parameter.data.flatten()[-1].item()
        parameter.data.flatten()[-1] = math.nan
        with pytest.raises(UserError, match=name.replace("lm_head.weight", r"(lm_head|model\.embed_tokens)\.weight")):
            require_finite_weights(hf_model, "tiny")
        parameter.data.flatten()[-1] = kept
    require_finite_weights(hf_model, "tiny")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(4, 4)
    module.weight = torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    require_finite_weights(module, "tiny")
    module.weight.data[2, 1] = torch.tensor(math.nan).to(dtype)
    with pytest.raises(UserError, match="weight of the model 'tiny' holds NaN"):
        require_finite_weights(module, "tiny")


@pytest.mark.parametrize("where", [{"device": "meta"}, {"device_map": "meta"}])
def test_weights_that_are_not_in_memory_are_refused(
    tmp_path: Path, where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tiny_hf(), tmp_path / "model")
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight of the model .*has no values|on 'meta', and this machine has 0"
    ):
        load(folder, **where)
    assert load(folder, device_map="cpu").mechlens.parity_gap < 1e-5


def test_a_model_partly_on_disk_is_bridged(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    hf_model = tiny_hf()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    dispatch_model(hf_model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert bridged(hf_model).mechlens.parity_gap < 1e-5


# --- logits ----------------------------------------------------------------------------------------------------------


def overflowing(dtype: torch.dtype) -> Any:
    hf_model = tiny_hf(dtype=dtype)
    scale = 1e4 if dtype == torch.float16 else 1e30
    hf_model.model.layers[1].post_attention_layernorm.weight.data.mul_(scale)
    hf_model.model.layers[1].mlp.down_proj.weight.data.mul_(scale)
    with pytest.warns(UserWarning, match="logits of tiny are not finite on a short prompt"):
        return bridged(hf_model)


ENGINES = ("fast", "plain", "native", "uncached")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float16, "float16 overflows, so load the model in bfloat16"), (torch.float32, "float32 rarely overflows")],
)
def test_answers_without_finite_logits_are_an_error(
    engine: str, dtype: torch.dtype, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: engine == "fast")
    monkeypatch.setattr(reference, "reference_engine", lambda model: engine)
    model = overflowing(dtype)
    with pytest.raises(UserError, match=f"logits are not finite; {advice}"):
        answer(model, PROMPTS, max_new_tokens=3)
    for under in (lambda: answer_under(model, PROMPTS, [], max_new_tokens=3), lambda: logits_under(model, PROMPTS, [])):
        with pytest.raises(UserError, match=f"logits are not finite; {advice}"):
            under()


def test_a_model_in_training_mode_is_refused() -> None:
    """GPT-2's dropout would make residuals random, and they would be kept as this checkpoint's."""
    model = bridged(tiny_hf("gpt2"))
    right = collect(model, PROMPTS).values
    model.train()
    for run in (lambda: collect(model, PROMPTS), lambda: answer(model, PROMPTS, max_new_tokens=2)):
        with pytest.raises(UserError, match="training mode"):
            run()
    model.eval()
    assert torch.equal(collect(model, PROMPTS).values, right)


def test_losses_without_finite_logits_are_an_error() -> None:
    with pytest.raises(UserError, match="logits are not finite; float32"):
        text_loss(overflowing(torch.float32), ["the thing is"])


def test_activations_that_are_not_finite_blame_the_type_that_they_have() -> None:
    with pytest.raises(UserError, match=r"level 2 are not finite .*float32 rarely overflows") as error:
        collect(overflowing(torch.float32), PROMPTS)
    assert "float16" not in str(error.value)


def test_tokens_that_are_ruled_out_are_no_damage() -> None:
    require_finite_logits(torch.tensor([[0.0, -math.inf, 2.0]]))
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="not finite"):
            require_finite_logits(torch.tensor([[0.0, -math.inf, 2.0], [1.0, bad, 0.0]]))
    with pytest.raises(UserError, match="not finite"):
        require_finite_logits(torch.full((1, 3), -math.inf))
