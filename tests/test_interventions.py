"""Interventions as values: what they may hold, which numbers they become, and which models they are refused on."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from tiny import words

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.directions.direction import Direction, direction_grid, mean_difference
from mechlens.methods.directions.methods import grid_by
from mechlens.methods.steering.fits import require_fits
from mechlens.methods.steering.interventions import (
    ALL,
    EVERYWHERE,
    Ablate,
    Add,
    ReplaceComponent,
    replacement,
    residual_norms,
)
from mechlens.methods.steering.placed import Placement
from mechlens.methods.steering.steering import answer_under, applied, logits_under
from mechlens.models.engine.intervene.changed import AddAlong, Change, SetVector
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.results.opened import open as open_saved
from mechlens.runs.results.saved import save


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def batch(model: Any) -> TokenBatch:
    prompts = [Prompt(id=f"p{i}", text=text, label="ab"[i % 2]) for i, text in enumerate(words(6))]
    return tokenize(prompts, template_of(model), padding_side="left")


@pytest.fixture(scope="module")
def acts(model: Any, batch: TokenBatch) -> Activations:
    return collect(model, batch, positions=("inst", "post[*]"))


@pytest.fixture(scope="module")
def v(acts: Activations) -> Direction:
    return mean_difference(acts, "a", "b", level=1, position="inst")


def add(v: Direction, **options: Any) -> Add:
    return Add(
        v, **({"strength": 2.0, "unit": "raw", "layers": (1,), "positions": ALL, "phase": "prompt"} | options)
    )  # fmt: skip


def only(placed: list[Change]) -> Change:
    assert len(placed) == 1
    return placed[0]


def test_residual_norms_are_medians_with_the_first_token_left_out(acts: Activations) -> None:
    norms = residual_norms(acts)
    assert norms.positions == acts.positions
    assert norms.ids == acts.ids
    for level in acts.levels:
        lengths = acts.at(level, "inst").norm(dim=-1)
        assert norms.at(level, "inst") == pytest.approx(float(lengths.quantile(0.5)))
        everyone = acts.values[:, level].norm(dim=-1).flatten()
        assert norms.at(level, ALL) == pytest.approx(float(everyone.quantile(0.5)))
    # A sink at the first token would move the pooled median a long way.
    first = acts.values[:, :, :1] * 1000
    sink = replace(acts, values=torch.cat([first, acts.values], dim=2), positions=("token[0]", *acts.positions))
    assert torch.equal(residual_norms(sink).pooled, norms.pooled)
    with pytest.raises(UserError, match="beside the first token"):
        residual_norms(replace(acts, values=first, positions=("token[0]",)))
    with pytest.raises(UserError, match="of level 9 isn't known"):
        norms.at(9, "inst")


def test_strengths_are_raw_or_unit_or_shares(acts: Activations, batch: TokenBatch, v: Direction) -> None:
    norms, placement = residual_norms(acts), Placement(3, batch)

    def amount(one: Add | ReplaceComponent) -> float:
        what = only(placement.changes(0, [one])).what
        assert isinstance(what, AddAlong)
        assert torch.allclose(what.unit, v.unit)
        assert what.erases == isinstance(one, ReplaceComponent)
        return what.amount

    assert amount(add(v)) == pytest.approx(2 * v.norm)
    assert amount(add(v, unit="unit")) == 2.0
    assert amount(add(v, unit="share", norms=norms)) == pytest.approx(2 * norms.at(1, ALL))
    at_inst = {"unit": "share", "norms": norms, "positions": ("inst",)}
    assert amount(add(v, **at_inst)) == pytest.approx(2 * norms.at(1, "inst"))
    place = {"layers": (1,), "positions": ALL, "phase": "both"}
    assert amount(ReplaceComponent(v, value=-3.0, unit="unit", **place)) == -3.0  # type: ignore[arg-type]
    # Shares differ from layer to layer and from position to position.
    shares = placement.changes(0, [add(v, **(at_inst | {"layers": (0, 2), "positions": ("inst", "last")}))])
    assert [(change.layers, change.what.amount) for change in shares] == [  # type: ignore[union-attr]
        ((layer,), pytest.approx(2 * norms.at(layer, name)))
        for layer in (0, 2)
        for name in ("inst", acts.positions[-1])
    ]


def test_named_positions_become_tokens_of_each_row(batch: TokenBatch, v: Direction) -> None:
    placement = Placement(3, batch)
    for row in range(6):
        length, roles = len(batch.row(row)), batch.roles(row)
        start = roles.index("instruction[0]")
        inst = roles.index("inst")

        def tokens(*names: str, row: int = row) -> tuple[int, ...] | None:
            return only(placement.changes(row, [add(v, positions=names)])).tokens

        assert tokens("inst") == (inst,)
        assert tokens("last") == tokens("post[-1]", "last") == (length - 1,)
        assert tokens("post[*]") == tuple(range(inst + 1, length))
        assert tokens("instruction[*]") == tuple(range(start, inst + 1))
        assert tokens("instruction[0]", "token[0]") == (start, 0)
        assert tokens("token[2:5]") == (2, 3, 4)
        assert tokens("token[:]") == tokens("token[0:999]") == tuple(range(length))
        assert tokens("inst", "token[0:]") == (inst, *range(inst), *range(inst + 1, length))
    with pytest.raises(UserError, match="there is no position 'middle'"):
        placement.changes(0, [add(v, positions=("middle",))])


def test_a_token_that_only_long_prompts_have_can_be_named_for_those(
    model: Any, batch: TokenBatch, v: Direction
) -> None:
    longest = int(batch.lengths.argmax())
    last = int(batch.lengths[longest]) - 1
    given = [[add(v, positions=(f"token[{last}]",))] if i == longest else [] for i in range(6)]
    assert logits_under(model, batch, given).shape[0] == 6
    with pytest.raises(UserError, match=r"is too short to have a token"):
        logits_under(model, batch, given[longest])


def test_phases_and_sites_become_changes(batch: TokenBatch, v: Direction) -> None:
    placement = Placement(3, batch)
    found = {
        phase: only(placement.changes(0, [add(v, phase=phase)])) for phase in ("prompt", "generation", "both")
    }  # fmt: skip
    assert {phase: (change.tokens, change.generation) for phase, change in found.items()} == {
        "prompt": (None, False),
        "generation": ((), True),
        "both": (None, True),
    }
    one = only(placement.changes(0, [Ablate(v, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)]))
    assert (one.sites, one.layers) == (("resid_pre", "attn_out", "mlp_out"), (0, 1, 2))
    assert isinstance(one.what, AddAlong)
    assert (one.what.amount, one.what.erases) == (0.0, True)


def test_a_replacement_holds_another_prompts_residuals(acts: Activations, batch: TokenBatch) -> None:
    one = replacement(acts, "p2", layers=(0, 2), positions=("inst", "post[0]"))
    assert torch.equal(one.values[1, 0], acts.at(2, "inst")[2])
    assert one.phase == "prompt"
    first, second = Placement(3, batch).changes(1, [one])
    assert (first.layers, second.layers) == ((0,), (2,))
    inst = batch.roles(1).index("inst")
    assert first.tokens == (inst, inst + 1)
    assert isinstance(second.what, SetVector)
    assert torch.equal(second.what.values, one.values[1])
    with pytest.raises(UserError, match="'p9' was not collected"):
        replacement(acts, "p9", layers=(0,), positions=("inst",))
    with pytest.raises(UserError, match="are 1 different tokens and there are 2 vectors"):
        Placement(3, batch).changes(0, [replace(one, positions=("inst", "inst"))])
    with pytest.raises(UserError, match="give one vector each"):
        replace(one, layers=(0,))
    with pytest.raises(UserError, match="not finite"):
        replace(one, values=one.values / 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"positions": ()}, "at least one layer, one position"),
        ({"strength": float("nan")}, "the strength is nan"),
        ({"unit": "share", "layers": (2,)}, "needs norms=residual_norms.*carries that of level 1 only"),
        ({"unit": "share", "layers": (1,), "site": "resid_post"}, "carries that of level 1 only"),
        ({"unit": "share", "layers": ALL}, "carries that of level 1 only"),
        ({"site": "z"}, "there is no site 'z'; choose from resid_pre, resid_post, attn_out, mlp_out"),
        ({"positions": ("inst",), "phase": "both"}, "inst lie in the prompt, and the phase is 'both'"),
        ({"positions": ("inst",), "phase": "generation"}, "lie in the prompt"),
        ({"phase": "prompt", "answer_tokens": 2}, "changes no answer; choose phase='both'"),
        ({"answer_tokens": 0}, "answer_tokens is 0; give at least 1"),
    ],
)
def test_values_that_mean_nothing_are_refused(v: Direction, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        add(v, **options)


def test_a_direction_carries_the_norm_that_its_shares_are_shares_of(
    acts: Activations, batch: TokenBatch, v: Direction, tmp_path: Path
) -> None:
    """A file of it is enough to steer by shares, also in another process; one from before that needs the norms."""
    assert v.residual_norm == pytest.approx(float(acts.at(1, "inst").norm(dim=-1).quantile(0.5)))
    grid = direction_grid(acts, "a", "b")
    assert grid.at(1, "inst").residual_norm == v.residual_norm
    assert grid_by(acts, "a", "b", "lda").at(1, "inst").residual_norm == v.residual_norm
    assert direction_grid(replace(acts, labels=("a", "b", *"cccc")), "a", "b").at(1, "inst").residual_norm == (
        pytest.approx(float(acts.at(1, "inst")[:2].norm(dim=-1).quantile(0.5)))
    )

    def changes(direction: Direction, **norms: Any) -> list[Change]:
        return Placement(3, batch).changes(0, [add(direction, unit="share", **norms)])

    save(v, tmp_path / "v.safetensors")
    save(grid, tmp_path / "grid.safetensors")
    again = (open_saved(tmp_path / "v.safetensors"), open_saved(tmp_path / "grid.safetensors").at(1, "inst"))
    own = only(changes(v)).what
    assert isinstance(own, AddAlong)
    assert own.amount == pytest.approx(2 * v.residual_norm)
    assert [only(changes(one)).what.amount for one in again] == [own.amount] * 2  # type: ignore[union-attr]
    assert torch.equal(again[0].vector, v.vector)
    old = replace(v, residual_norm=None)
    assert only(changes(old, norms=residual_norms(acts))).what.amount > 0  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"needs norms=residual_norms.*the direction doesn't carry any"):
        changes(old)


def test_directions_that_point_nowhere_are_refused(v: Direction) -> None:
    for vector in (torch.zeros_like(v.vector), v.vector / 0):
        with pytest.raises(UserError, match="it points nowhere"):
            add(replace(v, vector=vector))


def test_other_types_are_refused_in_a_sentence(v: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for whoever uses the package
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        r"give a tuple, such as layers=\(9,\)": (v, {"layers": 9}),
        r"give a tuple, such as positions=\('last',\)": (v, {"positions": "last"}),
        r"a Tensor was given as the direction; give the Direction, not its vector": (v.vector, {}),
        r"a SimpleNamespace was given as the direction; give one of its: \.best\.direction, or": (
            SimpleNamespace(detection=None),
            {},
        ),
        r"a SimpleNamespace was given as the direction; give its .direction": (SimpleNamespace(direction=v), {}),
        r"a NoneType was given as the direction; give one; where a concept's best is None": (None, {}),
    }
    for said, (direction, options) in wrong.items():
        with pytest.raises(UserError, match=said):
            add(direction, **options)


def test_values_are_frozen(v: Direction) -> None:
    with pytest.raises(FrozenInstanceError):
        add(v).strength = 3.0  # type: ignore[misc]


def test_interventions_of_another_model_are_refused_unless_forced(
    model: Any, batch: TokenBatch, acts: Activations, v: Direction, tiny_model: Callable[..., Any]
) -> None:
    norms = residual_norms(acts)
    moved = add(v, unit="share", norms=norms)
    put = replacement(acts, "p1", layers=(1,), positions=("inst",))
    require_fits(model, [moved, put], batch.template, force=False)

    other = replace(v.checkpoint, fingerprint="f" * 64)
    processed = replace(v.checkpoint, regime="processed")
    for said, wrong in {
        "made with processed weights, the model is one with raw ones": {"checkpoint": processed},
        r"made with other weights of tiny-llama .* \(its fingerprint was ffffffffffff and is": {"checkpoint": other},
        r"made under another chat template \(000000000000\) than the prompts": {"template": "0" * 64},
    }.items():
        for one in (
            add(replace(v, **wrong)),
            Ablate(replace(v, **wrong), layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE),
            replace(moved, norms=replace(norms, **wrong)),
            replace(put, **wrong),
        ):
            with pytest.raises(UserError, match=rf"^the .* {said}.*or pass --force \(force=True in Python\)$"):
                logits_under(model, batch, [one])
            with pytest.raises(UserError, match=said):
                answer_under(model, batch, [[one]] + [[]] * 5, max_new_tokens=1)
            with pytest.raises(UserError, match=said), applied(model, [one], batch):
                pass
            forced = logits_under(model, batch, [one], force=True)
            assert not torch.equal(forced, logits_under(model, batch, []))
    # The same value on another model, and on prompts under another template.
    with pytest.raises(UserError, match="made with other weights of tiny-llama"):
        logits_under(tiny_model("llama", seed=1), batch, [add(v)])
    paper = tokenize(list(batch.prompts), ChatTemplate(template_of(model).tokenizer, kind="paper:qwen2"))
    with pytest.raises(UserError, match="under another chat template"):
        logits_under(model, paper, [add(v)])


def test_what_has_no_place_in_the_model_is_refused_even_if_forced(model: Any, batch: TokenBatch, v: Direction) -> None:
    for layer in (3, 4, -1):
        with pytest.raises(UserError, match=f"no layer {layer} to intervene at, only 0 to 2"):
            logits_under(model, batch, [add(v, layers=(0, layer))], force=True)
    with pytest.raises(UserError, match="the last level is layer 2 with site='resid_post'"):
        logits_under(model, batch, [add(v, layers=(3,))], force=True)
    with pytest.raises(UserError, match=r"has 31 numbers \(from .*\) and a vector of this model \(tiny-llama\) has 32"):
        logits_under(model, batch, [add(replace(v, vector=v.vector[:31]))], force=True)


def test_weights_edited_since_refuse_their_old_directions(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", seed=2)
    acts = collect(model, [Prompt(f"p{i}", text, label="ab"[i % 2]) for i, text in enumerate(words(4))])
    one = add(mean_difference(acts, "a", "b", level=1, position="inst"))
    prompts = [Prompt("q", "the thing")]
    logits_under(model, prompts, [one])
    model.original_model.get_output_embeddings().weight.data *= 2
    with pytest.raises(UserError, match="make it anew, or pass --force"):
        logits_under(model, prompts, [one])
