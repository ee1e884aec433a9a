"""Every kind of adapter is merged as peft computes it, alone and in a series, or refused in one sentence."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapted_logits, save_peft
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load, load_hf, type_without_loss
from mechlens.models.native import native

TOKENS = torch.arange(5, 45)[None]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    tiny_hf(architecture, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def lora(*modules: str, **options: Any) -> Any:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(modules) or "all-linear", **options)


ADAPTERS: dict[str, tuple[str, Any]] = {
    "dora": ("llama", lambda: lora(use_dora=True)),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa")),
    "pissa, approximately": ("llama", lambda: lora(init_lora_weights="pissa_niter_4")),
    "pissa on joint matrices": ("gpt2", lambda: lora(init_lora_weights="pissa", fan_in_fan_out=True)),
    "olora": ("llama", lambda: lora(init_lora_weights="olora")),
    "orthogonal": ("llama", lambda: lora(init_lora_weights="orthogonal")),
    "mica": ("llama", lambda: lora(init_lora_weights="mica")),
    "biases": ("qwen2", lambda: lora("q_proj", "v_proj", bias="all")),
    "biases of its own": ("qwen2", lambda: lora("q_proj", "v_proj", lora_bias=True)),
    "a whole end": ("llama", lambda: lora("q_proj", modules_to_save=["lm_head"])),
    "a whole tied end": ("gemma3", lambda: lora("q_proj", modules_to_save=["lm_head"])),
    "whole embeddings": ("llama", lambda: lora("q_proj", modules_to_save=["embed_tokens"])),
    "end": ("llama", lambda: lora("q_proj", "lm_head")),
    "embeddings": ("llama", lambda: lora("q_proj", "embed_tokens")),
    "tied end": ("gemma3", lambda: lora("q_proj", "lm_head")),
    "tied embeddings": ("gemma3", lambda: lora("q_proj", "embed_tokens")),
    "both tied": ("gemma2", lambda: lora("lm_head", "embed_tokens")),
    "both tied, and kept tied": ("gemma2", lambda: lora("q_proj", "embed_tokens", ensure_weight_tying=True)),
    "tied end of joint matrices": ("gpt2", lambda: lora("c_attn", "lm_head")),
    "pissa on a tied end": ("gemma3", lambda: lora("lm_head", init_lora_weights="pissa")),
    "some tokens": ("llama", lambda: lora("q_proj", trainable_token_indices=[3, 40, 200])),
    "some tied tokens": ("gemma3", lambda: lora("q_proj", trainable_token_indices=[3, 40, 200])),
    "experts": ("mixtral", lambda: lora("q_proj", target_parameters=["mlp.experts.gate_up_proj"])),
    "ia3": ("llama", lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": ("llama", lambda: LoHaConfig(r=4, target_modules=["q_proj", "up_proj"])),
    "oft": ("llama", lambda: OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "up_proj"])),
    "vera": ("llama", lambda: VeraConfig(r=4, target_modules=["q_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_any_kind_gives_pefts_logits_alone_and_in_a_series(kind: str, tmp_path: Path) -> None:
    architecture, config = ADAPTERS[kind]
    base = saved(tmp_path / "base", architecture)
    path = str(save_peft(base, tmp_path / "adapter", config()))
    right = adapted_logits(base, path, TOKENS)
    tolerance = 1e-4 * float(right.abs().max())
    alone = load(base, adapter=path)
    assert float((alone(TOKENS) - right).abs().max()) < tolerance
    untouched = load_hf(base)[0]
    with checkpoint_swapper(base) as series, torch.inference_mode():
        for _ in range(2):  # and again after the base
            turned = series.put(Member("one", path, "adapter", 1))
            with native(turned) as hf_model, native(alone) as other:
                state = {name: value for name, value in hf_model.state_dict().items() if "original" not in name}
                assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
            assert float((turned(TOKENS) - right).abs().max()) < tolerance
            assert turned.mechlens.checkpoint.fingerprint == alone.mechlens.checkpoint.fingerprint
            model = series.put(Member("base", base, "base", 0))
            assert float((model(TOKENS) - untouched(TOKENS).logits).abs().max()) < 1e-5 * float(right.abs().max())
    assert float((right - untouched(TOKENS).logits).abs().max()) > 10 * tolerance


@pytest.mark.parametrize("kind", ["dora", "pissa", "tied end", "biases", "embeddings", "experts"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_half_precision_each_layer_is_merged_in_float32_and_rounded_once(
    kind: str, stored: torch.dtype, tmp_path: Path
) -> None:
    architecture, config = ADAPTERS[kind]
    base = saved(tmp_path / "base", architecture, stored)
    path = str(save_peft(base, tmp_path / "adapter", config()))
    exact, rounded = (load(base, adapter=path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    with native(exact) as one, native(rounded) as other, checkpoint_swapper(base, dtype="bfloat16") as series:
        for name, value in other.named_parameters():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, one.get_parameter(name).bfloat16()), name
        with native(series.put(Member("one", path, "adapter", 1))) as turned:
            for name, value in other.named_parameters():
                assert torch.equal(value, turned.get_parameter(name)), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_base_is_read_in_the_type_asked_for_only_where_nothing_is_lost(stored: str, tmp_path: Path) -> None:
    """Half the memory for the bfloat16 file; the float32 one would be rounded before the adapter is added."""
    base = saved(tmp_path / "base", dtype=getattr(torch, stored))
    assert type_without_loss(base, "bfloat16") == stored
    assert type_without_loss(base, "float16") == "float32"
    assert type_without_loss(base, "float32") == "float32"


def test_replicated_blocks_are_merged_apart(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    path = str(save_peft(base, tmp_path / "adapter", lora("q_proj", layer_replication=[[0, 2], [1, 3]])))
    right = adapted_logits(base, path, TOKENS)
    model = load(base, adapter=path)
    assert model.cfg.n_layers == 4
    assert float((model(TOKENS) - right).abs().max()) < 1e-4 * float(right.abs().max())
    with checkpoint_swapper(base) as series, pytest.raises(UserError, match="a series has one architecture"):
        series.put(Member("one", path, "adapter", 1))


REFUSED: dict[str, tuple[Any, str]] = {
    "prompt tuning": (
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "is of type PROMPT_TUNING, which adds prompts of its own",
    ),
    "prefix tuning": (
        lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "is of type PREFIX_TUNING, which adds prompts of its own",
    ),
    "a bias where there is none": (lambda: lora("q_proj", lora_bias=True), r"can't be merged .*no bias"),
    "activated": (lambda: lora("q_proj", alora_invocation_tokens=[1, 2]), "can't be merged|gives other logits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    config, words = REFUSED[kind]
    base = saved(tmp_path / "base")
    path = str(save_peft(base, tmp_path / "adapter", config()))
    with checkpoint_swapper(base) as series:
        for put in (
            lambda: load(base, adapter=path),
            lambda: load(base, adapter=path, dtype="bfloat16"),
            lambda: series.put(Member("one", path, "adapter", 1)),
        ):
            with pytest.raises(UserError, match=words) as caught:
                put()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["corda", "loftq"])
def test_what_changes_the_base_by_more_than_the_adapter_holds_is_refused(start: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    path = save_peft(base, tmp_path / "adapter", lora("q_proj"))
    settings = json.loads((path / "adapter_config.json").read_text())
    settings |= {"init_lora_weights": start, "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with checkpoint_swapper(base) as series:
        for put in (lambda: load(base, adapter=str(path)), lambda: series.put(Member("x", str(path), "adapter", 1))):
            with pytest.raises(UserError, match=f"init_lora_weights='{start}' the base's own weights are changed"):
                put()
