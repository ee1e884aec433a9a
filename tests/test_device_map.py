"""A model in parts, some of them on the disk, gives what it gives whole; maps that can't be carried out are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import save_model
from tiny import tiny_hf, tiny_tokenizer, words

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction
from mechlens.methods.patching.metrics import LogProbability
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add
from mechlens.methods.steering.steering import answer_under, logits_under, without_direction
from mechlens.models import bridge as bridging
from mechlens.models.bridge import checkpoint_now, device_of, dtype_of, token_embeddings, unembed
from mechlens.models.checkpoints.merge import merge_adapter
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.engine import products
from mechlens.models.load import load
from mechlens.models.native import native
from mechlens.prompts.prompt import Prompt, PromptPair

PROMPTS = [Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(4))]
"""Of different lengths, with a start in common."""


def saved(architecture: str, folder: Path) -> str:
    tiny_hf(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def parted(architecture: str) -> dict[str, str]:
    """A map with the first and last block on the disk and the one between them in memory; so are the two ends.

    Falcon's blocks get another `forward` from TransformerLens, and Bamba's mixers read weights without a call.
    """
    model = tiny_hf(architecture)
    places = {name: "cpu" for name, part in model.named_modules() if name.count(".") <= 1 and not list(part.children())}
    blocks = [name for name, _ in model.named_modules() if name.split(".")[-1].isdigit() and name.count(".") == 2]
    return places | {block: "disk" if i % 2 == 0 else "cpu" for i, block in enumerate(blocks)}


def direction(model: Any) -> Direction:
    return Direction(
        vector=torch.randn(32, generator=torch.Generator().manual_seed(0)), level=1, position="inst", site="resid",
        method="random", contrast=("a", "b"), train_ids=(), checkpoint=checkpoint_now(model),
        template=template_of(model).fingerprint,
    )  # fmt: skip


def steered(model: Any) -> list[Any]:
    one = direction(model)
    twice = Add(one, strength=1.0, unit="raw", layers=(0, 2), positions=ALL, phase="both")
    rows = [[twice], [Ablate(one, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)], [], [twice]]
    return [
        logits_under(model, PROMPTS, rows),
        answer_under(model, PROMPTS, rows, max_new_tokens=4).tokens,
    ]


def patched(site: str, positions: tuple[str, ...]) -> Callable[[Any], torch.Tensor]:
    pair = PromptPair(Prompt("c", "the thing"), Prompt("d", "the ring?"))
    plan = PatchPlan(site, positions=positions)
    return lambda model: patch_sweep(model, [pair], LogProbability(40), plan).values


CASES: dict[str, Callable[[Any], Any]] = {
    "collect": lambda model: collect(model, PROMPTS, positions=["inst", "last"]).values,
    "collect z": lambda model: collect(model, PROMPTS, positions=["inst"], site="z").values,
    "answer": lambda model: answer(model, PROMPTS, max_new_tokens=6).tokens,
    "steer": steered,
    "patch heads": patched("z", ("last",)),
    "patch": patched("resid_pre", ("inst", "last")),
    "unembed": lambda model: unembed(model, torch.linspace(-1, 1, 64).reshape(2, 32)),
    "embedding": lambda model: token_embeddings(model, torch.tensor([7, 9])),
    "who": lambda model: (checkpoint_now(model).fingerprint, device_of(model), dtype_of(model)),
}


def equal(found: Any, right: Any) -> bool:
    if isinstance(right, torch.Tensor):
        return torch.equal(found, right)
    if isinstance(right, list):
        return all(map(equal, found, right))
    return bool(found == right)


@pytest.fixture(autouse=True)
def on_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that accelerate fetches are multiplied by PyTorch's own choice of library, which rounds otherwise."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "falcon", "bamba"])
def test_parts_on_the_disk_change_no_bit(architecture: str, tmp_path: Path) -> None:
    folder = saved(architecture, tmp_path / "model")
    whole, parts = load(folder), load(folder, device_map=parted(architecture))
    few = (
        ("collect", "steer", "who")
        if architecture in ("falcon", "bamba")
        else ("collect", "steer", "patch heads", "who")
    )
    for name in CASES if architecture == "llama" else few:
        assert equal(CASES[name](parts), CASES[name](whole)), name
    with native(parts) as hf_model:
        away = {name.split(".")[2] for name, weight in hf_model.named_parameters() if weight.is_meta}
    assert away == {"0", "2"}, "they were let go again"


def test_weights_that_nobody_fetched_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch multiplies by weights without values, and gives any numbers."""
    monkeypatch.setattr(bridging, "fetch_by_block", lambda hf_model: None)
    for architecture in ("falcon", "rwkv"):  # one that is computed with, one that the first pass rescales in place
        with pytest.raises(
            UserError, match=r"can't be run in parts: \w+ is run with weights that are on the disk; load it"
        ):
            load(saved(architecture, tmp_path / architecture), device_map=parted(architecture))


def test_tied_ends_lie_together(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    both = {"transformer.wte": "disk", "lm_head": "disk"}
    whole, parts = load(folder), load(folder, device_map=parted("gpt2") | both)
    for name in ("answer", "unembed", "embedding"):
        assert equal(CASES[name](parts), CASES[name](whole)), name
    one = {name: place for name, place in (parted("gpt2") | both).items() if name != "lm_head"}
    assert equal(CASES["unembed"](load(folder, device_map=one)), CASES["unembed"](whole))
    for end in both:
        with pytest.raises(UserError, match=r"lm_head and transformer\.wte in different places, and their weights"):
            load(folder, device_map=parted("gpt2") | {end: "disk"})


def test_a_whole_model_on_the_disk(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    whole, parts = load(folder), load(folder, device_map="disk")
    assert equal(CASES["answer"](parts), CASES["answer"](whole))


def test_a_map_from_a_file(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    (path := tmp_path / "map.json").write_text(json.dumps(parted("llama")))
    assert load(folder, device_map=str(path)).mechlens.parity_gap < 1e-5
    assert load(folder, device_map="auto").mechlens.parity_gap < 1e-5


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ({"model": "cpu", "lm_heads": "disk"}, "names 'lm_heads', and LlamaForCausalLM has no such module"),
        ({"model": "cpu"}, r"says of 1 weights nothing, such as lm_head\.weight"),
        ({"": "cuda:7"}, "puts the model on 'cuda:7', and this machine has 0 of that kind"),
        ({"model": "cpu", "lm_head": 0}, "puts lm_head on 0, and this machine has 0"),
        ({"": "gpu"}, "puts the model on 'gpu', which is no device"),
        ({}, "must be a JSON object of module names and devices"),
        ([1, 2], "must be a JSON object of module names and devices"),
        ("{", "can't be read as JSON"),
    ],
)
def test_a_map_that_cant_be_carried_out(places: Any, sentence: str, tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    (path := tmp_path / "map.json").write_text(places if isinstance(places, str) else json.dumps(places))
    with pytest.raises(UserError, match=sentence):
        load(folder, device_map=str(path))


def test_a_map_and_a_device_or_no_map_at_all(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    with pytest.raises(UserError, match="a device and a device map are given"):
        load(folder, device="cpu", device_map="auto")
    with pytest.raises(UserError, match=r"there is no device map 'no/such\.json'"):
        load(folder, device_map="no/such.json")


def test_gpus_and_the_disk_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_model(tmp_path / "model"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(UserError, match="has parts on GPUs and others on the CPU or the disk"):
        load(folder, device_map={"model": "disk", "lm_head": 0})


def test_weights_on_the_disk_are_not_written(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    with pytest.raises(UserError, match="int8 weights can't lie on the disk"):
        load(folder, dtype="int8", device_map=parted("llama"))
    with pytest.raises(UserError, match=r"layers\.0.* is off-loaded, so checkpoints can't take turns in it"):
        checkpoint_swapper(folder, device_map=parted("llama"))
    model = load(folder, device_map=parted("llama"))
    with (
        pytest.raises(UserError, match="is off-loaded, so it can't be made orthogonal"),
        without_direction(model, direction(model)),
    ):
        pass
    with pytest.raises(UserError, match="is off-loaded, so no adapter can be merged into it"):
        merge_adapter(model.original_model, str(tmp_path))
    with checkpoint_swapper(folder, device_map="cpu") as swapper:
        assert swapper.model.mechlens.parity_gap < 1e-5
