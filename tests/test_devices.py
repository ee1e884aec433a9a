"""A model in parts on two devices gives what it gives on one: nothing is indexed with a tensor from another device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import FIRST, SECOND, counted, place, two_devices
from tiny import tiny_hf, tiny_tokenizer, words

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.damage import damage
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.directions.direction import Direction
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add, Intervention, replacement
from mechlens.methods.steering.steering import answer_under, applied, logits_under
from mechlens.models.bridge import bridge, checkpoint_now, device_of, unembed
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import reference
from mechlens.models.engine.edits import Edit
from mechlens.models.engine.forward import Row, reference_batch
from mechlens.models.engine.growing import edited_logits, record
from mechlens.models.native import native, native_blocks
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt, PromptPair


def prompts() -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(6))]


def bridged() -> Any:
    hf_model = tiny_hf()
    for parameter in hf_model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    # Tokens that some answers hold early and others late, so that rows leave the batch.
    hf_model.generation_config.eos_token_id = [4, 257, 127]
    return bridge(hf_model, tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))


def split(model: Any) -> Any:
    """The embedding and the first block on one device, the rest on another."""
    with native(model) as hf_model:
        first = [hf_model.model.embed_tokens, hf_model.model.rotary_emb, native_blocks(model)[0]]
        for part in (*first, *native_blocks(model)[1:], hf_model.model.norm, hf_model.lm_head):
            place(part, FIRST if part in first else SECOND)
    return model


def interventions(model: Any) -> list[list[Intervention]]:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    one = Direction(
        vector=vector, level=1, position="inst", site="resid", method="random", contrast=("a", "b"), train_ids=(),
        checkpoint=checkpoint_now(model), template=template_of(model).fingerprint,
    )  # fmt: skip
    add = Add(one, strength=1.0, unit="raw", layers=(1, 2), positions=ALL, phase="both")
    late = Add(one, strength=1.0, unit="raw", layers=(2,), positions=("last",), phase="prompt", site="mlp_out")
    ablate = Ablate(one, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    acts: Activations = collect(model, prompts(), positions=["inst"])
    put = replacement(acts, "p1", layers=(1,), positions=("inst",))
    return [[add], [ablate], [put], [late], [add, ablate], []]


def under(model: Any) -> torch.Tensor:
    with applied(model, interventions(model)[1]):
        return collect(model, prompts()).values


def patched(model: Any) -> torch.Tensor:
    ids = tuple(range(5, 17))
    start = record(model, ids, 11, "z", (0, 2))
    edits = [Edit(layer, 9, start.values[layer][4, 1], head=1) for layer in (0, 2)]
    return edited_logits(model, start, "z", edits, 11)


def swept(site: str) -> Callable[[Any], torch.Tensor]:
    pair = PromptPair(Prompt("c", "a b c"), Prompt("d", "a d c"))
    plan = PatchPlan(site, positions=("inst", "last"))
    return lambda model: patch_sweep(model, [pair, pair], LogitDifference(40, 41), plan).values


def damaged(model: Any) -> torch.Tensor:
    batch = tokenize(prompts()[:2], template_of(model))
    add = interventions(model)[0][0]
    found = damage(model, add, batch, answer(model, batch, max_new_tokens=3), ["the thing is"])  # type: ignore[arg-type]
    return torch.cat([found.plain, found.own, found.kl])


CASES: dict[str, Callable[[Any], Any]] = {
    "collect": lambda model: collect(model, prompts(), positions=["inst", "last"]).values,
    "plain pass": lambda model: reference_batch(
        model, [Row((5, 6, 7, 8), (1, 3)), Row((9, 8, 7, 6), (0, 3))], [0, 1, 3]
    ),
    "answer": lambda model: answer(model, prompts(), max_new_tokens=8).tokens,
    "recomputed": lambda model: reference.recomputed_greedy(model, [Row((5, 6, 7), (2,))] * 2, 4, None, None),
    "answer under": lambda model: answer_under(model, prompts(), interventions(model), max_new_tokens=6).tokens,
    "logits under": lambda model: logits_under(model, prompts(), interventions(model)),
    "hook points": under,
    "unembed": lambda model: unembed(model, torch.linspace(-1, 1, 64).reshape(2, 32)),
    "text loss": lambda model: text_loss(model, ["the thing is"]),
    "patch": patched,
    "damage": damaged,
    "patch sweep": swept("z"),
    "patch sweep of patterns": swept("pattern"),
    "collect z": lambda model: collect(model, prompts(), positions=["inst"], site="z").values,
}


@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_what_one_gives(case: str) -> None:
    right = CASES[case](bridged())
    model = bridged()
    with torch.inference_mode(), two_devices():
        split(model)
        assert device_of(model) == FIRST
        got = CASES[case](model)
    if isinstance(right, torch.Tensor):
        # Rounding is of the largest values that are added; some machines are four units in the last place of these off.
        torch.testing.assert_close(got, right, rtol=1e-5, atol=max(1e-5, 1e-6 * float(right.abs().max())))
    else:
        assert got == right


def answered(tokens: int) -> Callable[[Any], Any]:
    return lambda model: answer_under(model, prompts(), interventions(model), max_new_tokens=tokens)


# By case, with two devices: how often anything waits for a GPU, beside one wait a device for the weights' stamp.
WAITS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "collect": (lambda model: collect(model, prompts(), positions=["inst", "last"]), 2),
    "answer 4": (lambda model: answer(model, prompts(), max_new_tokens=4), 4 + 3),
    "answer 8": (lambda model: answer(model, prompts(), max_new_tokens=8), 8 + 7),
    "answer 4 under": (answered(4), 2 + 4 + 3),
    "answer 8 under": (answered(8), 2 + 8 + 7),
    "logits under": (lambda model: logits_under(model, prompts(), interventions(model)), 2 + 2),
    "patch": (patched, 2),
}


def test_how_often_a_gpu_is_waited_for() -> None:
    """Once a pass and device for what is read; twice an answer token of padded rows: for the token, and by
    transformers, which looks whether the mask hides anything. In `interventions` something is collected too."""
    sent = {}
    with torch.inference_mode(), two_devices():
        model = split(bridged())
        model.original_model.generation_config.eos_token_id = None
        for case, (work, most) in WAITS.items():
            work(model)  # with the trials, which are made once for a model
            with counted() as traffic:
                work(model)
            waits = {place: n for (kind, place), n in traffic.items() if kind == "wait"}
            assert sum(waits.values()) - waits.pop("checkpoint.py stamp", 0) <= most, (case, waits)
            sent[case] = sum(n for (kind, _), n in traffic.items() if kind == "send")
    # No more is sent for an answer of twice the length.
    assert sent["answer 8"] == sent["answer 4"]
    assert sent["answer 8 under"] <= sent["answer 4 under"]


def test_tensors_of_two_devices_refuse_to_meet() -> None:
    with torch.inference_mode(), two_devices():
        a, b = torch.zeros(3, device=FIRST), torch.tensor([1, 2], device=SECOND)
        with pytest.raises(RuntimeError, match="same device"):
            a + torch.zeros(3, device=SECOND)
        with pytest.raises(RuntimeError, match="same device"):
            a[b]
        assert a[b.cpu()].device == a[b.to(FIRST)].device == FIRST
        assert b.tolist() == [1, 2]
