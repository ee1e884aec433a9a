"""Fingerprints: every byte of every tensor counts, records of earlier versions still hold, and edits are seen."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from tiny import tiny_hf, tiny_tokenizer
from torch import nn

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.directions.token_view import require_same_model
from mechlens.methods.steering.fits import require_direction
from mechlens.models.bridge import bridge, checkpoint_now, loaded
from mechlens.models.checkpoint import (
    Checkpoint,
    _summed_there,
    config_fingerprint,
    is_fingerprint_of,
    is_sampled,
    sampled_fingerprint,
    stamp,
    weight_fingerprint,
)
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load
from mechlens.models.native import native
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.runs.run import Inputs, Run, changed_since


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.bool])
def test_every_value_of_every_type_counts(dtype: torch.dtype) -> None:
    values = torch.zeros(300, 300, dtype=dtype)
    prints = {weight_fingerprint({"a": values}), stamp({"a": values})}
    places = [0, 1, 22, 4095, 4097, 89_998, 89_999]
    for place in places:
        values.view(-1)[place] = 1
        prints |= {weight_fingerprint({"a": values}), stamp({"a": values})}
        values.view(-1)[place] = 0
    assert len(prints) == 2 * (1 + len(places))


def test_what_the_older_fingerprint_could_not_see() -> None:
    """Of a 4096 x 4096 matrix it read column 0; here the same stride on fewer rows."""
    whole = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    cut = whole.clone()
    cut[:, 128:] = 0  # 31 of 32 heads
    row = whole.clone()
    row[17, 1:] = 0  # one token's embedding
    states = [{"a": each} for each in (whole, cut, row)]
    assert len({weight_fingerprint(state) for state in states}) == 3
    assert len({stamp(state) for state in states}) == 3


def test_order_names_shapes_and_signs_count() -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    swapped, signed = values.flip(0), values.clone()
    signed[1, 0] = -0.0
    states = [{"a": values}, {"a": swapped}, {"a": signed}, {"a": values.T}, {"b": values}, {"a": values.reshape(4)}]
    for kind in (weight_fingerprint, stamp):
        assert len({kind(state) for state in states}) == len(states)


def test_a_file_has_one_fingerprint_in_whichever_type_it_is_loaded() -> None:
    half = {"a": torch.randn(50, 3).bfloat16(), "n": torch.arange(4)}
    full = {"a": half["a"].float(), "n": half["n"]}
    assert weight_fingerprint(half) == weight_fingerprint(full)
    assert weight_fingerprint(full) != weight_fingerprint({**full, "n": half["n"].int()})
    strided = {"a": full["a"].T.contiguous().T, "n": half["n"]}
    assert weight_fingerprint(strided) == weight_fingerprint(full)


def test_the_fingerprint_is_a_sha256_of_the_bytes() -> None:
    values = torch.tensor([1.5, -2.0])
    inner = hashlib.sha256(b"float" + values.numpy().tobytes()).digest()
    assert weight_fingerprint({"a": values}) == "v2-" + hashlib.sha256(b"a(2,)" + inner).hexdigest()


def test_the_sums_of_another_device_see_what_the_hash_sees() -> None:
    """Made on the CPU here: words that swap places, change by one bit, or fill up a last word."""
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (600_001,), generator=torch.Generator().manual_seed(0)).int()
    sums = {tuple(_summed_there(words).tolist())}
    for change in range(40):
        other = words.clone()
        other[change * 14_000] ^= 1 << (change % 31)
        sums.add(tuple(_summed_there(other).tolist()))
    for step in (1, 512, 4096):
        other = words.clone()
        other[[0, step]] = other[[step, 0]]
        sums.add(tuple(_summed_there(other).tolist()))
    assert len(sums) == 44
    octets = torch.zeros(7, dtype=torch.uint8)
    before = _summed_there(octets).tolist()
    octets[6] = 1
    assert _summed_there(octets).tolist() != before


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda p: p.mul_(1.5),
    "behind autograd's back": lambda p: p.data.view(-1)[7].add_(1e-3),
    "by numpy": lambda p: p.detach().numpy().reshape(-1).__setitem__(5, 3.0),
    "in inference mode": lambda p: torch.inference_mode()(lambda: p.data[-1].zero_())(),
    "by other memory": lambda p: setattr(p, "data", p.data.flip(0)),
}


@pytest.mark.parametrize("how", EDITS)
def test_an_edit_of_any_kind_is_seen_and_undone(how: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    before = checkpoint_now(model)
    assert before == loaded(model).checkpoint
    weight = model.original_model.get_input_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        EDITS[how](weight)
    edited = checkpoint_now(model)
    assert edited.fingerprint != before.fingerprint
    assert checkpoint_now(model) == edited
    assert not edited.has_weights_of(before)
    with torch.no_grad():
        weight.copy_(kept)
    assert checkpoint_now(model) == before


def test_an_edited_buffer_is_seen(tiny_model: Callable[..., Any]) -> None:
    hf_model = tiny_hf()
    hf_model.model.register_buffer("packed", torch.arange(6, dtype=torch.uint8))
    name = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    model = bridge(hf_model, tiny_tokenizer(), name)
    hf_model.get_buffer("model.packed")[3] = 200
    assert checkpoint_now(model).fingerprint != name.fingerprint


def test_records_of_earlier_versions_still_hold(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    state = tiny_hf().state_dict()
    old, new = sampled_fingerprint(state), weight_fingerprint(state)
    assert is_sampled(old)
    assert not is_sampled(new)
    assert is_fingerprint_of(old, state)
    assert is_fingerprint_of(new, state)
    assert not is_fingerprint_of(old, tiny_hf(seed=1).state_dict())
    now = Checkpoint("tiny", "tiny", fingerprint=new, sampled=old)
    earlier = Checkpoint("tiny", "tiny", fingerprint=old)
    other = replace(now, fingerprint="v2-" + "0" * 64)  # another model with the same sample
    assert now.has_weights_of(earlier)
    assert earlier.has_weights_of(now)
    assert not now.has_weights_of(other)
    assert not Checkpoint("foreign", "a").has_weights_of(now)
    assert not Checkpoint("foreign", "a").has_weights_of(earlier)
    assert not Checkpoint("foreign", "a").has_weights_of(replace(now, sampled=""))
    assert not Checkpoint("a", "a", fingerprint=new).has_weights_of(earlier)
    model.mechlens = replace(model.mechlens, checkpoint=now)
    acts = collect(model, [Prompt("a", "one", label="x"), Prompt("b", "two", label="y")])
    direction = mean_difference(acts, "x", "y", level=1, position="last")
    for made, fits in ((earlier, True), (now, True), (other, False), (replace(earlier, fingerprint="0" * 64), False)):
        asked = replace(direction, checkpoint=made)
        for require in (require_same_model, lambda m, d: require_direction(m, d, force=False)):
            if fits:
                require(model, asked)
            else:
                with pytest.raises(UserError):
                    require(model, asked)


def test_an_older_run_can_be_made_again() -> None:
    def run(model: str) -> Run:
        return Run("id", "track", {}, {}, "success", "2026", inputs=Inputs(model, "t", {}))

    now = Inputs("v2-" + "a" * 64, "t", {}, sampled="b" * 64)
    assert changed_since(run("b" * 64), now) == []
    assert changed_since(run("v2-" + "a" * 64), now) == []
    assert len(changed_since(run("c" * 64), now)) == 1
    assert len(changed_since(run("v2-" + "c" * 64), now)) == 1


@pytest.mark.parametrize("record", [weight_fingerprint, sampled_fingerprint])
def test_an_adapter_knows_its_base_by_either_fingerprint(
    record: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    tiny_hf().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    path = save_adapter(str(base), tmp_path / "adapter", seed=1)
    for hf_model, fits in ((tiny_hf(), True), (tiny_hf(seed=1), False)):
        known = record(hf_model.state_dict())
        (path / "mechlens.json").write_text(json.dumps({"base_fingerprint": known}))
        with checkpoint_swapper(str(base)) as series:
            for put in (
                lambda: load(str(base), adapter=str(path)),
                lambda series=series, known=known: series.put(Member("a", str(path), "adapter", 1, None, known)),
            ):
                if fits:
                    put()
                else:
                    with pytest.raises(UserError, match="was trained on another base"):
                        put()


def test_a_module_without_weights_has_a_stamp() -> None:
    assert stamp(dict(nn.Identity().named_parameters())) == stamp({})
    assert math.isfinite(int(stamp({}), 16))


@pytest.mark.real
def test_the_shipped_adapter_knows_its_base(smollm2: Any) -> None:
    from mechlens.models.packaged import adapter_folder

    record = json.loads((adapter_folder("smollm2-refuser") / "mechlens.json").read_text())
    assert record["base_fingerprint"] == loaded(smollm2).checkpoint.fingerprint
    assert loaded(smollm2).checkpoint.sampled == "589605dd3b621126fadad486042b6ec23799e84edbed9d8278479757ed889852"


def test_one_set_of_weights_under_two_configurations_is_two_models(tmp_path: Path) -> None:
    """Same bytes, other scales or rotary tables: no kept piece and no guard of the one serves the other."""

    class Kept(dict[str, Any]):
        def put(self, key: str, value: Any) -> None:
            self[key] = value

    hf_model = tiny_hf("llama")
    models = []
    for theta in (1e4, 1e2):
        hf_model.config.rope_parameters["rope_theta"] = theta
        hf_model.save_pretrained(tmp_path / f"{theta:g}")
        tiny_tokenizer().save_pretrained(tmp_path / f"{theta:g}")
        models.append(load(str(tmp_path / f"{theta:g}")))
    asked = [Prompt("a", "the thing is here and there")]
    first, second = (checkpoint_now(model) for model in models)
    assert first.fingerprint == second.fingerprint
    assert not first.has_weights_of(second)
    assert first.has_weights_of(replace(second, config=""))  # as far as an earlier record tells
    cache = Kept()
    kept = [collect(model, asked, cache=cache).values for model in models]
    assert torch.equal(kept[1], collect(models[1], asked).values)
    assert not torch.equal(kept[0], kept[1])


def test_an_edited_rotary_table_is_noticed(tmp_path: Path) -> None:
    tiny_hf("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    model = load(str(tmp_path / "m"))
    before = checkpoint_now(model)
    table = next(b for name, b in model.original_model.named_buffers() if name.endswith(".inv_freq"))
    table.mul_(3)
    assert checkpoint_now(model).fingerprint != before.fingerprint


ATTRIBUTES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "a norm's epsilon": lambda hf: (hf.model.layers[1].input_layernorm, "variance_epsilon"),
    "the last norm's epsilon": lambda hf: (hf.model.norm, "variance_epsilon"),
    "attention's scale": lambda hf: (hf.model.layers[0].self_attn, "scaling"),
}


@pytest.mark.parametrize("what", ATTRIBUTES)
def test_an_edited_attribute_of_a_module_is_another_model(what: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    before = checkpoint_now(model)
    with native(model) as hf_model:
        module, name = ATTRIBUTES[what](hf_model)
    value = getattr(module, name)
    setattr(module, name, value * 3)
    edited = checkpoint_now(model)
    assert not edited.has_weights_of(before)
    assert edited.identity != before.identity
    assert edited == checkpoint_now(model)
    setattr(module, name, value)
    assert checkpoint_now(model) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3", "qwen3_next", "mamba2", "mixtral"])
def test_use_edits_nothing(architecture: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(architecture)
    before = checkpoint_now(model)
    batch = tokenize([Prompt("a", "the thing is here and there"), Prompt("b", "no")], template_of(model))
    collect(model, batch.prompts)
    answer(model, batch, max_new_tokens=2)
    model.run_with_cache(torch.tensor([[5, 6, 7]]), use_cache=False)
    model.original_model.train()
    model.original_model.eval()
    assert checkpoint_now(model) == before


def test_what_a_tool_adds_to_a_configuration_changes_no_model() -> None:
    config = tiny_hf("llama").config
    before = config_fingerprint(config)
    config.unsloth_version, config.use_cache, config.max_position_embeddings = "2026.1", False, 99
    assert config_fingerprint(config) == before
    config.rms_norm_eps = 0.1
    assert config_fingerprint(config) != before
