"""The Bigram-Backcopy task: what is drawn, what no model can beat, and what attention makes of a head's idle hours."""

from collections.abc import Callable

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.sinks.backcopy.task import START, backcopy_task
from mechlens.methods.sinks.backcopy.training import BackcopyRun, BackcopyTraining, train_backcopy
from mechlens.methods.sinks.backcopy.transformer import AttentionKind, BackcopyShape, BackcopyTransformer


def test_every_trigger_is_followed_by_the_letter_before_it() -> None:
    task = backcopy_task()
    tokens, trigger, oracle = task.draw(400, 48, seed=3)
    assert torch.equal(trigger, torch.isin(tokens, torch.tensor(task.triggers)))
    copied = trigger[:, 1:-1]
    assert torch.equal(tokens[:, 2:][copied], tokens[:, :-2][copied])
    assert bool((tokens[:, 0] == START).all())
    assert bool((tokens[:, 1:] != START).all())
    assert not bool(trigger[:, 1].any())  # so that there is always a letter before
    assert not bool((trigger[:, 1:] & trigger[:, :-1]).any())
    assert bool((oracle[trigger] == 0).all())
    assert bool((oracle[~trigger] > 0).all())


def test_other_letters_are_drawn_from_the_table() -> None:
    task = backcopy_task()
    tokens, trigger, _ = task.draw(3000, 48, seed=5)
    now, after = tokens[:, 1:-1][~trigger[:, 1:-1]], tokens[:, 2:][~trigger[:, 1:-1]]
    counts = torch.bincount(now * task.n_tokens + after, minlength=task.n_tokens**2).view(task.n_tokens, -1).double()
    often = counts.sum(dim=1) > 2000
    found = counts[often] / counts[often].sum(dim=1, keepdim=True)
    assert float((found - task.bigram[often]).abs().max()) < 0.03
    first = torch.bincount(tokens[:, 1], minlength=task.n_tokens) / len(tokens)
    assert float((first - task.marginal).abs().max()) < 0.03


def test_the_oracle_is_the_loss_of_one_who_knows_the_table() -> None:
    task = backcopy_task()
    tokens, trigger, oracle = task.draw(3000, 48, seed=7)
    told = task.bigram[tokens[:, 1:-1], tokens[:, 2:]]
    rest = ~trigger[:, 1:-1]
    assert float(-told[rest].log().mean()) == pytest.approx(float(oracle[:, 1:-1][rest].mean()), rel=0.01)


def test_the_same_seed_draws_the_same_and_too_many_triggers_are_refused() -> None:
    task = backcopy_task()
    assert torch.equal(task.draw(4, 20, seed=1).tokens, task.draw(4, 20, seed=1).tokens)
    assert not torch.equal(task.draw(4, 20, seed=1).tokens, task.draw(4, 20, seed=2).tokens)
    with pytest.raises(UserError, match="2 of the text's 3 letters can't be triggers; choose 1 to 1"):
        backcopy_task("abcabc", triggers=2)


@pytest.mark.parametrize("attention", ["softmax", "relu", "gated"])
def test_no_token_sees_a_later_one(attention: AttentionKind) -> None:
    model = BackcopyTransformer(BackcopyShape(layers=2, attention=attention, width=16, length=12), n_tokens=9, seed=0)
    tokens = torch.randint(1, 9, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = 1
    with torch.no_grad():
        assert torch.allclose(model(tokens)[:, :8], model(changed)[:, :8], atol=1e-6)
    pattern = model.watched(tokens).pattern
    assert float(pattern.triu(1).abs().max()) == 0
    if attention != "relu":
        assert torch.allclose(pattern.sum(dim=-1), torch.ones(2, 2, 12), atol=1e-5)


def trained(attention: AttentionKind) -> BackcopyRun:
    """The authors' smallest model that has all three phenomena, of 32 dimensions: a head between two MLPs."""
    shape = BackcopyShape(layers=3, attention=attention, width=32, length=32, headless=(0, 2))
    return train_backcopy(backcopy_task(), shape, BackcopyTraining(steps=500, every=500))


@pytest.fixture(scope="module")
def softmax() -> BackcopyRun:
    return trained("softmax")


def test_what_can_be_copied_is_learnt_and_the_rest_to_its_entropy(softmax: BackcopyRun) -> None:
    first, last = softmax.losses.iloc[0], softmax.losses.iloc[-1]
    assert first["copy"] > 3
    assert last["copy"] < 0.1
    assert first["rest"] > last["entropy"] + 1
    assert last["entropy"] < last["rest"] < last["entropy"] + 0.1


def test_softmax_and_adam_make_a_sink_and_drain_its_values(softmax: BackcopyRun) -> None:
    first, last = softmax.heads.iloc[0], softmax.heads.iloc[-1]
    assert first["mass"] < 0.15
    assert first["value"] == pytest.approx(1.0, abs=0.3)
    assert last["mass"] > 0.6
    assert last["value"] < 0.3
    assert last["mass_at_triggers"] < 0.05  # where there is work, the head is awake


def test_relu_attention_makes_neither(softmax: BackcopyRun) -> None:
    run = trained("relu")
    assert run.losses.iloc[-1]["copy"] < 0.25
    assert run.heads.iloc[-1]["mass"] < 0.05
    assert run.heads.iloc[-1]["value"] > 2 * softmax.heads.iloc[-1]["value"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: BackcopyTraining(steps=-1), "`steps` must be at least 1, and is -1"),
        (lambda: BackcopyTraining(stepz=1), r"has no option 'stepz' \(did you mean 'steps'\?\)"),
        (lambda: BackcopyTraining(steps=1, optimiser="adamw"), r"no optimiser 'adamw' \(did you mean 'adam'\?\)"),
        (lambda: BackcopyTraining(steps=1, learning_rate=0.0), "`learning_rate` must be above 0"),
        (lambda: BackcopyShape(attention="softmx"), r"no attention 'softmx' \(did you mean 'softmax'\?\)"),
        (lambda: BackcopyShape(attention=None), "no attention None; choose from softmax, relu, gated"),
        (lambda: BackcopyShape(length=3), "`length` must be at least 4, and is 3"),
        (lambda: BackcopyShape(layers=0), "`layers` must be at least 1, and is 0"),
        (lambda: BackcopyShape(headless=(7,)), "there is no block 7; the transformer has blocks 0 to 0"),
        (lambda: BackcopyShape(headless=(0,)), "every block is headless; leave one with a head"),
        (lambda: backcopy_task("abab"), "the text has 2 letters, and 3 are needed"),
        (lambda: backcopy_task(["a", "b"]), "text is a list; give one text"),
        (lambda: backcopy_task().draw(2, 0, seed=0), "length is 0; draw at least 1 sequence of at least 1 token"),
        (lambda: small()(torch.zeros(1, 9).long()), "the tokens are 1 x 9; give rows of at most 8"),
        (lambda: small()(torch.full((1, 4), 9)), "there is no token 9; choose from 0 to 8"),
    ],
)  # fmt: skip
def test_what_can_not_be_trained_is_said(wrong: Callable[[], object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        wrong()


def small() -> BackcopyTransformer:
    return BackcopyTransformer(BackcopyShape(width=8, length=8), n_tokens=9, seed=0)
