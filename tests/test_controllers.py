"""Laws of steering controllers: the gate learns, what is trained is what steers, and a closed gate changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import DictShelf, Killed
from test_steering import batch_of, made
from tiny import tiny_hf, tiny_tokenizer

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.damage import answer_losses
from mechlens.methods.steering.controllers.controller import Controlled, Controller
from mechlens.methods.steering.controllers.fit import Taught, _trained, fit_controller, read_values
from mechlens.methods.steering.controllers.plan import PUBLISHED, ControllerPlan
from mechlens.methods.steering.controllers.steered_loss import steered_logits
from mechlens.methods.steering.steering import answer_under, applied, logits_under
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.sites import level_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.studies.controllers.config import RivalsPlan

NEW = 5


def prompts(n: int = 12) -> list[Prompt]:
    """Requests of two classes that differ in a word, as many of each."""
    return [
        Prompt(f"{label}{i}", f"Number {i * 7}: {word}", label=label)
        for i in range(n) for label, word in (("harmful", "XXXX"), ("harmless", "mmmm"))
    ]  # fmt: skip


def fitted(architecture: str, **options: Any) -> Controller:
    plan = ControllerPlan(**{"reads": (1,), "layers": (1, 2), "hidden": 8, "epochs": 1, **options})
    return fit_controller(made(architecture), prompts(), plan)


def opened(controller: Controller, gate: float) -> Controller:
    """The same with a gate that says one and the same of every prompt."""
    outer, bias = controller.network.outer.clone(), controller.network.outer_bias.clone()
    outer[0], bias[0] = 0.0, gate
    return replace(controller, network=replace(controller.network, outer=outer, outer_bias=bias))


@pytest.mark.parametrize("published", [True, False])
def test_the_gate_learns_two_clusters(published: bool) -> None:
    """As published it says 1 and 0 nearly; ours squashes it. On values that it wasn't taught."""
    model, asked = made("llama"), prompts(32)
    batch = tokenize(asked, template_of(model))
    base = PUBLISHED if published else ControllerPlan(trained_strength=0.0)
    # As many steps as the toy needs: the published rate is for a thousand prompts.
    plan = replace(base, reads=(1,), layers=(1, 2), hidden=64, epochs=60, learning_rate=3e-3)
    harmful = torch.tensor([one.label == "harmful" for one in asked])
    drawn = torch.Generator().manual_seed(0)
    centre = torch.randn(32, generator=drawn)

    def cluster(own: torch.Tensor) -> torch.Tensor:
        noise = 0.2 * torch.randn(len(own), 1, 32, generator=drawn)
        return noise + torch.where(own, 1.0, -1.0)[:, None, None] * centre

    ids = tuple(tuple(batch.row(i)) for i in range(len(asked)))
    bare = None if published else logits_under(model, batch, [])
    start = fit_controller(model, asked, replace(plan, epochs=1))
    values = cluster(harmful)
    spread, mean = (values.flatten(1).std(dim=0), values.flatten(1).mean(dim=0))
    if not published:
        start = replace(start, network=replace(start.network, centre=mean, spread=spread))
    network = _trained(model, start, Taught(values, harmful, ids, bare, (17,)), plan, None)
    gate, _ = replace(start, network=network).decide(cluster(harmful))
    assert float(gate[harmful].min()) > 0.9
    assert float(gate[~harmful].max()) < 0.1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "neox", "opt"])
def test_what_is_trained_is_what_steers(architecture: str) -> None:
    model = made(architecture)
    controller = opened(fitted(architecture), 0.7)
    batch = tokenize(prompts(4), template_of(model))
    said = controller.network(read_values(model, batch, controller))
    ids = [batch.row(i) for i in range(len(batch.prompts))]
    trained = steered_logits(model, controller, said, 0.4, ids).detach().cpu()
    steered = logits_under(model, batch, [Controlled(controller, strength=0.4)])
    bare = logits_under(model, batch, [])
    assert float((trained - steered).abs().max()) < 1e-4 * float(steered.abs().max())
    assert float((bare - steered).abs().max()) > 0.01 * float(bare.abs().max())


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "neox", "bloom", "opt"])
def test_a_closed_gate_changes_nothing_to_the_bit(architecture: str, published: bool) -> None:
    model, batch = made(architecture), batch_of(architecture)
    where: dict[str, Any] = {"reads": (), "layers": ()} if published else {}
    controller = opened(fitted(architecture, published=published, **where), 0.0 if published else -1e9)
    shut = [Controlled(controller, strength=5.0)]
    one = batch.select([0])
    assert torch.equal(logits_under(model, one, shut), logits_under(model, one, []))
    assert (
        answer_under(model, batch, shut, max_new_tokens=NEW).tokens == answer(model, batch, max_new_tokens=NEW).tokens
    )
    said = answer(model, one, max_new_tokens=NEW)  # as published nothing but the answer's tokens is ever steered
    (loss, kl), (bare, _) = (answer_losses(model, [given], one, said)[0] for given in (shut, []))
    assert torch.equal(loss, bare)
    assert not kl.any()


def test_as_published_the_prompt_is_left_alone_and_answers_are_steered_at_all_layers() -> None:
    model, batch = made("llama"), batch_of("llama")
    controller = opened(fitted("llama", published=True, reads=(), layers=()), 1.0)
    assert (controller.layers, controller.reads) == ((0, 1, 2), ((3, "last"),))
    steered = [Controlled(controller, strength=3.0)]
    said, bare = answer_under(model, batch, steered, max_new_tokens=NEW), answer(model, batch, max_new_tokens=NEW)
    assert torch.allclose(logits_under(model, batch, steered), logits_under(model, batch, []), atol=1e-5)
    assert [own[0] for own in said.tokens] == [own[0] for own in bare.tokens]
    assert said.tokens != bare.tokens
    # By hand: the same additions at every answer token, one prompt at a time.
    _, weights = controller.decide(read_values(model, batch, controller))
    for i in range(len(batch.prompts)):
        by_hand = [replace(act, strength=act.strength * float(weights[i, share])) for act, share in steered[0].acts]
        alone = answer_under(model, batch.select([i]), by_hand, max_new_tokens=NEW)
        assert alone.tokens[0] == said.tokens[i]


def seen(model: Any, batch: TokenBatch, given: list[Any], level: int) -> torch.Tensor:
    name = level_hook(model, level)
    with applied(model, given, batch), torch.inference_mode():
        _, cache = model.run_with_cache(
            batch.tokens, attention_mask=batch.mask.long(), names_filter=lambda own: own == name
        )
    found: torch.Tensor = cache[name]
    return found


@pytest.mark.parametrize("published", [True, False])
def test_answers_that_are_given_are_steered_as_those_that_are_written(published: bool) -> None:
    """The loss of an answer's tokens in one pass is what they had when they were written, token by token."""
    model, batch = made("llama"), batch_of("llama")
    where: dict[str, Any] = {"reads": (), "layers": ()} if published else {}
    given = [Controlled(opened(fitted("llama", published=published, **where), 1.0), strength=1.5)]
    said = answer_under(model, batch, given, max_new_tokens=NEW)
    loss = answer_losses(model, [given, []], batch, said)[:, 0]
    by_hand = []
    for i, tokens in enumerate(said.tokens):
        if tokens:
            one = batch.select([i])
            gate, weights = given[0].controller.decide(read_values(model, one, given[0].controller))
            acts = [
                replace(act, strength=act.strength * float(gate[0] * weights[0, share])) for act, share in given[0].acts
            ]
            by_hand.append(float(answer_losses(model, [acts], one, said.select([i]))[0, 0, 0]))
    assert torch.allclose(loss[0], torch.tensor(by_hand, dtype=loss.dtype), atol=1e-5)
    assert float((loss[0] - loss[1]).abs().max()) > 1e-3


def linear_model() -> Any:
    """A llama whose blocks but the first add nothing: what is put into the residual stream arrives as it is."""
    hf_model = tiny_hf("llama")
    with torch.no_grad():
        for block in hf_model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    checkpoint = Checkpoint("linear", "tests/linear", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


def test_what_arrives_is_strength_times_gate_times_the_weighted_directions() -> None:
    model = linear_model()
    batch = tokenize(prompts(3), template_of(model))
    plan = ControllerPlan(reads=(0, 1), layers=(1, 2), hidden=8, epochs=1)
    controller = opened(fit_controller(model, prompts(), plan), 0.3)
    gate, weights = controller.decide(read_values(model, batch, controller))
    assert torch.allclose(gate, torch.tensor(0.3).sigmoid().expand(6))
    assert torch.allclose(weights.mean(dim=1), torch.tensor(0.5).expand(6))  # the budget
    along = torch.randn(32, generator=torch.Generator().manual_seed(1))
    given = [Controlled(controller, strength=0.8)]
    moved = (seen(model, batch, given, 3) - seen(model, batch, [], 3)) @ along
    expected = 0.8 * gate * (weights * controller.lengths * (controller.directions @ along)).sum(dim=1)
    assert torch.allclose(
        moved[batch.mask.bool()], expected.unsqueeze(1).expand_as(moved)[batch.mask.bool()], atol=1e-4
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_below_the_first_steered_layer_nothing_changes(architecture: str) -> None:
    model = made(architecture)
    batch = tokenize(prompts(3), template_of(model))
    given = [Controlled(opened(fitted(architecture, layers=(2,)), 2.0), strength=1.0)]
    for level, changes in ((0, False), (1, False), (2, True), (3, True)):
        # At level 2 the hook itself sees what was added there.
        assert torch.equal(seen(model, batch, given, level), seen(model, batch, [], level)) is not changes


def test_a_layer_that_alone_carries_refusal_gets_the_weight() -> None:
    """All layers but one add what the unembedding can't hear; as published the weights stay where they were."""
    model = linear_model()
    refusal = 17
    heard = model.original_model.get_output_embeddings().weight[refusal].detach().clone()
    plan = ControllerPlan(reads=(1,), layers=(1, 2), hidden=16, epochs=40, learning_rate=1e-2, trained_strength=1.0)
    for which in (0, 1):
        start = fit_controller(model, prompts(), replace(plan, epochs=1, trained_strength=0.0))
        deaf = torch.zeros_like(heard)
        directions = torch.stack([heard / heard.norm() if i == which else deaf for i in range(2)])
        taught = fit_controller(model, prompts(), plan, refusal_tokens=(refusal,), directions=directions)
        batch = tokenize(prompts(4), template_of(model))
        _, weights = taught.decide(read_values(model, batch, taught))
        harmful = torch.tensor([one.label == "harmful" for one in batch.prompts])
        assert float(weights[harmful, which].min()) > 0.9
        assert abs(float(start.decide(read_values(model, batch, start))[1].mean()) - 0.5) < 1e-5


def test_a_killed_fit_goes_on_and_is_the_same_to_the_bit() -> None:
    model, plan = made("llama"), ControllerPlan(reads=(1,), layers=(1, 2), hidden=8, epochs=3)
    whole = fit_controller(model, prompts(), plan)
    full = DictShelf()
    assert fit_controller(model, prompts(), plan, cache=full) == whole
    for room in range(1, len(full.pieces)):
        shelf = DictShelf(room)
        with pytest.raises(Killed):
            fit_controller(model, prompts(), plan, cache=shelf)
        shelf.room = 1000
        assert fit_controller(model, prompts(), plan, cache=shelf) == whole
    # Nor is an epoch done again for what has no part in it: how many come after, or a study's other options.
    longer = RivalsPlan(reads=(1,), layers=(1, 2), hidden=8, epochs=4, strengths=(0.3,))
    before = set(full.pieces)
    assert fit_controller(model, prompts(), longer, cache=full) != whole
    assert len(set(full.pieces) - before) == 1


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_is_fitted_where_a_notebook_has_turned_gradients_off(off: Any) -> None:
    whole = fitted("llama")
    with off():
        assert fitted("llama") == whole


def test_one_file_holds_it(tmp_path: Path) -> None:
    model, batch = made("llama"), batch_of("llama")
    controller = replace(fitted("llama"), evidence={"auroc": 0.9})
    path = ml.save(controller, tmp_path / "controller.safetensors")
    again = ml.open(path)
    assert again == controller
    one, other = (logits_under(model, batch, [Controlled(own, strength=1.0)]) for own in (controller, again))
    assert torch.equal(one, other)


def test_what_can_not_be_fitted_or_used_is_said() -> None:
    model = made("llama")
    with pytest.raises(UserError, match="12 of 12 prompts are harmful; a controller needs both classes"):
        fit_controller(model, [one for one in prompts() if one.label == "harmful"], ControllerPlan())
    with pytest.raises(UserError, match=r"level 2 is to be read and layer 1 steered.*read at levels up to 1"):
        fitted("llama", reads=(2,), layers=(1,))
    with pytest.raises(UserError, match="the model has levels 0 to 3 and layers 0 to 2, and 9 was asked for"):
        fitted("llama", reads=(9,))
    with pytest.raises(UserError, match="controller"):
        logits_under(made("gpt2"), batch_of("gpt2"), [Controlled(fitted("llama"), strength=1.0)])


def test_a_plan_that_leaves_no_layer_or_names_no_token_is_said() -> None:
    with pytest.raises(UserError, match="level 3 is to be read and none of the layers 0 to 2 is above"):
        fitted("llama", reads=(3,), layers=())
    for name in ("layer", "level"):
        with pytest.raises(UserError, match=f"{name} 1 is named twice; name each {name} once"):
            fitted("llama", **{"layers" if name == "layer" else "reads": (1, 1)})
    with pytest.raises(UserError, match="there is no token 99999, only 0 to 269"):
        fit_controller(made("llama"), prompts(), ControllerPlan(reads=(1,), epochs=1), refusal_tokens=(99999,))
    with pytest.raises(UserError, match="the strength is nan"):
        Controlled(fitted("llama"), strength=float("nan"))


def test_a_file_that_was_tampered_with_is_refused() -> None:
    """Whatever number or size in it doesn't fit, before it steers."""
    controller = fitted("llama")
    own = controller.network
    narrow = replace(own, centre=own.centre[:-1], spread=own.spread[:-1], inner=own.inner[:, :-1])
    for changed, said in (
        ({"directions": controller.directions * float("nan")}, "not finite"),
        ({"network": replace(own, outer=own.outer * float("inf"))}, "not finite"),
        ({"network": narrow}, "isn't made for 2 layers and 1 places of 32"),
        ({"reads": ((0, "last"), (1, "last"))}, "isn't made for 2 layers and 2 places"),
        ({"network": replace(own, outer=own.outer.bfloat16())}, "numbers of type bfloat16, and it decides in float32"),
        ({"lengths": controller.lengths.double()}, "numbers of type float64"),
        ({"layers": (2, 2)}, "steers layers 2, 2, one of them twice"),
    ):
        with pytest.raises(UserError, match=said):
            replace(controller, **changed)


def test_a_number_that_all_training_prompts_share_does_not_drown_the_rest() -> None:
    """In half precision one that is large and hardly moves is often the same in all of them, and not in the next."""
    controller = fitted("llama", reads=(0, 1))  # at level 0 the template's last token is one and the same
    assert torch.equal(controller.network.spread[:32], torch.ones(32))
    assert float(controller.network.spread[32:].max()) != 1.0


@pytest.mark.parametrize("published", [True, False])
def test_its_constant_part_is_what_it_adds_with_an_open_gate_and_even_weights(published: bool) -> None:
    model, batch = made("llama"), batch_of("llama")
    controller = fitted("llama", published=published)
    even = replace(opened(controller, 1.0 if published else 1e9), fixed=torch.full((2,), 0.5))
    directions = controller.constant(0.8)
    assert [one.level for one in directions] == [2, 3] if published else [1, 2]
    pushes = [
        ml.Add(one, strength=1.0, unit="raw", layers=(layer,), site=controller.site, phase=controller.phase)
        for one, layer in zip(directions, controller.layers, strict=True)
    ]
    said = answer_under(model, batch, pushes, max_new_tokens=NEW)
    assert said.tokens == answer_under(model, batch, [Controlled(even, strength=0.8)], max_new_tokens=NEW).tokens
