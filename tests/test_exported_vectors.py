"""An exported direction steers in the other tool as it does here, and comes back as it went.

Each tool's rule is written out here by its documentation, on a plain Hugging Face model. Where the tools themselves are
on the path, as `scripts/conformance` puts them there, their own readers do the steering.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tiny import tiny_hf, tiny_tokenizer, words

import mechlens as ml
from mechlens.cli import main
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.side_by_side import addition_at
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint

FORMATS = {"gguf": "v.gguf", "lm-eval": "v.pt", "steering-vectors": "v.pt"}
PROMPTS = [ml.Prompt(str(i), text, label="ab"[i % 2]) for i, text in enumerate(words(4))]
STRENGTH = 4.0


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, list[Direction]]:
    """A plain model, the same behind a bridge, and a direction of each of its levels."""
    model = bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny", fingerprint="v2-tiny"))
    acts = ml.collect(model, PROMPTS)
    return tiny_hf(), model, [ml.mean_difference(acts, "a", "b", level=level, position="last") for level in range(4)]


@contextmanager
def adding(module: torch.nn.Module, vector: torch.Tensor) -> Iterator[None]:
    """What all three tools do: the vector is added to a module's output, at every token."""

    def add(module: Any, given: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = module.register_forward_hook(add)
    yield
    handle.remove()


def by_lm_eval(hf_model: Any, path: Path) -> Any:
    """hf_steered.py: modules of `base_model` by name; vector times coefficient."""
    ((name, done),) = torch.load(path, weights_only=True).items()
    assert (done["action"], done["bias"], done["head_index"]) == ("add", None, None)
    module = dict(hf_model.base_model.named_modules())[name]
    return adding(module, done["steering_vector"] * done["steering_coefficient"])


def by_steering_vectors(hf_model: Any, path: Path) -> Any:
    """steering_vector.py: decoder blocks counted from 0."""
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"layer_activations", "layer_type"}
    assert saved["layer_type"] == "decoder_block"
    ((layer, vector),) = saved["layer_activations"].items()
    return adding(hf_model.model.layers[layer], vector)


def by_llama_cpp(hf_model: Any, path: Path) -> Any:
    """common_control_vector_load_one: rows of float32 named direction.K, K from 1, added to block K's output."""
    (tensor,) = GGUFReader(path).tensors
    assert tensor.tensor_type.name == "F32"
    assert tensor.data.ndim == 1
    name, layer = tensor.name.split(".")
    assert (name, int(layer) > 0) == ("direction", True)
    return adding(hf_model.model.layers[int(layer)], torch.from_numpy(np.array(tensor.data)))


def steered_here(model: Any, directions: tuple[Direction, ...]) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    """First-token logits, and answers, under what was exported."""
    template = ml.template_of(model)
    batch = ml.tokenize(PROMPTS, template)
    given = [addition_at(model, one, STRENGTH, "raw", one.level, template) for one in directions]
    return ml.logits_under(model, batch, given), ml.answer_under(model, batch, given, max_new_tokens=4).tokens


def require_same_steering(hf_model: Any, model: Any, direction: Any, steered: Callable[[], Any]) -> None:
    logits, answers = steered_here(model, direction if isinstance(direction, tuple) else (direction,))
    batch = ml.tokenize(PROMPTS, ml.template_of(model))
    clean = ml.logits_under(model, batch, [])
    assert float((logits - clean).abs().max()) > 0.1  # it does something
    for i in range(len(PROMPTS)):
        ids = torch.tensor([batch.row(i)])
        with torch.inference_mode(), steered():
            there = hf_model(ids).logits[0, -1]
            said = hf_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
            )[0, ids.shape[1] :]
        assert torch.allclose(logits[i], there, atol=2e-4)
        assert [token for token in said.tolist() if token not in (0, 4)] == list(answers[i])


RULES = {"gguf": by_llama_cpp, "lm-eval": by_lm_eval, "steering-vectors": by_steering_vectors}
PLACES = [(name, level) for name in FORMATS for level in (1, 2, 3) if (name, level) != ("gguf", 1)]


@pytest.mark.exact
@pytest.mark.parametrize(("format", "level"), PLACES)
def test_by_the_tools_rule_it_steers_as_here(world: Any, format: Any, level: int, tmp_path: Path) -> None:
    hf_model, model, directions = world
    path = ml.export_direction(directions[level], tmp_path / FORMATS[format], format, strength=STRENGTH)
    require_same_steering(hf_model, model, directions[level], lambda: RULES[format](hf_model, path))


@pytest.mark.parametrize(("format", "level"), PLACES)
def test_what_went_out_comes_back(world: Any, format: Any, level: int, tmp_path: Path) -> None:
    direction = world[2][level]
    path = ml.export_direction(direction, tmp_path / FORMATS[format], format)
    again = ml.open(path)
    assert torch.equal(again.vector, direction.vector)
    assert (again.level, again.site, again.checkpoint.name) == (level, "resid", "foreign")
    twice = ml.export_direction(again, tmp_path / f"again{path.suffix}", format)
    assert torch.equal(ml.open(twice).vector, direction.vector)


@pytest.mark.parametrize("format", FORMATS)
def test_strengths_count_as_they_do_here(world: Any, format: Any, tmp_path: Path) -> None:
    direction = world[2][2]
    for strength, unit, length in ((-2.0, "raw", 2 * direction.norm), (3.0, "unit", 3.0), (0.5, "share", 0.0)):
        expected = length or 0.5 * (direction.residual_norm or 0)
        path = ml.export_direction(direction, tmp_path / FORMATS[format], format, strength=strength, unit=unit)  # type: ignore[arg-type]
        again = ml.open(path)
        assert again.norm == pytest.approx(expected)
        assert float(again.unit @ direction.unit) == pytest.approx(1 if strength > 0 else -1)


@pytest.mark.parametrize("format", ["gguf", "steering-vectors"])
def test_several_levels_go_into_one_file(world: Any, format: Any, tmp_path: Path) -> None:
    path = ml.export_direction(world[2][2:], tmp_path / FORMATS[format], format)
    grid = ml.open(path)
    assert grid.levels == (2, 3)
    assert all(torch.equal(grid.at(level, "last").vector, world[2][level].vector) for level in (2, 3))


def other_tool(module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool's own module; skipped where it isn't on the path, which `scripts/conformance` doesn't allow."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it, NumPy 2 has it no more
    if os.environ.get("MECHLENS_CONFORMANCE"):
        return importlib.import_module(module)
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.mark.exact
@pytest.mark.parametrize("level", [1, 3])
def test_steering_vectors_own_reader(world: Any, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = other_tool("steering_vectors", monkeypatch)
    hf_model, model, directions = world
    path = ml.export_direction(directions[level], tmp_path / "v.pt", "steering-vectors", strength=STRENGTH)
    vector = tool.SteeringVector(**torch.load(path, weights_only=True))
    require_same_steering(hf_model, model, directions[level], lambda: vector.apply(hf_model))


@pytest.mark.exact
@pytest.mark.parametrize("level", [2, 3])
def test_repengs_own_reader(world: Any, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = other_tool("repeng", monkeypatch)
    _, model, directions = world
    path = ml.export_direction(directions[level], tmp_path / "v.gguf", "gguf")
    vector = tool.ControlVector.import_gguf(path)
    assert list(vector.directions) == [level - 1]
    hf_model = tiny_hf()
    controlled = tool.ControlModel(hf_model, [level - 1])

    @contextmanager
    def steered() -> Iterator[None]:
        controlled.set_control(vector, STRENGTH)
        yield
        controlled.reset()

    require_same_steering(controlled, model, directions[level], steered)
    # And what it writes is read here.
    vector.export_gguf(tmp_path / "theirs.gguf")
    assert torch.equal(ml.open(tmp_path / "theirs.gguf").vector, directions[level].vector)


@pytest.mark.exact
@pytest.mark.parametrize("format", ["gguf", "steering-vectors"])
def test_a_controllers_layers_in_one_file_by_the_tools_own_readers(
    world: Any, format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = other_tool("repeng" if format == "gguf" else "steering_vectors", monkeypatch)
    _, model, _ = world
    controller = ml.fit_controller(
        model, [replace(one, label={"a": "harmful", "b": "harmless"}[one.label]) for one in PROMPTS],
        ml.ControllerPlan(reads=(1,), layers=(2,), epochs=1, hidden=8, published=True),
    )  # fmt: skip
    parts = (controller.constant(0.1)[0], world[2][2])  # at levels 3 and 2
    hf_model, path = tiny_hf(), ml.export_direction(parts, tmp_path / FORMATS[format], format, strength=STRENGTH)
    if format == "steering-vectors":
        vector = tool.SteeringVector(**torch.load(path, weights_only=True))
        require_same_steering(hf_model, model, parts, lambda: vector.apply(hf_model))
        return
    controlled = tool.ControlModel(hf_model, [1, 2])

    @contextmanager
    def steered() -> Iterator[None]:
        controlled.set_control(tool.ControlVector.import_gguf(path), 1.0)
        yield
        controlled.reset()

    require_same_steering(controlled, model, parts, steered)


@pytest.mark.exact
@pytest.mark.parametrize("level", [1, 3])
def test_lm_evals_own_reader(world: Any, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = other_tool("lm_eval.models.hf_steered", monkeypatch)
    hf_model, model, directions = world
    path = ml.export_direction(directions[level], tmp_path / "v.pt", "lm-eval", strength=STRENGTH)
    there = tool.SteeredModel(hf_model, str(path), device="cpu", tokenizer=tiny_tokenizer(), batch_size=1)
    require_same_steering(hf_model, model, directions[level], lambda: tool.steer(there.model, there.hook_to_steer))


@pytest.mark.parametrize(
    ("format", "change", "said"),
    [
        ("gguf", {"level": 1}, "of level 1, and gguf adds to the outputs of blocks, from level 2 on"),
        ("lm-eval", {"level": 0}, "of level 0, and lm-eval adds to the outputs of blocks, from level 1 on"),
        ("gguf", {"site": "attn_out"}, "read at attn_out, and gguf adds to the residual stream"),
        ("lm-eval", {"checkpoint": Checkpoint("t", "t", regime="processed")}, "weights that TransformerLens folded"),
        ("steering-vectors", {"vector": torch.zeros(32)}, "has length 0"),
    ],
)
def test_what_no_tool_could_use_is_refused(
    world: Any, format: Any, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / FORMATS[format]
    with pytest.raises(ml.UserError, match=said):
        ml.export_direction(replace(world[2][2], **change), path, format)
    assert not path.exists()


def test_endings_several_and_shares_are_told(world: Any, tmp_path: Path) -> None:
    two, three = world[2][2:]
    with pytest.raises(ml.UserError, match=r"doesn't end as a file of gguf does; name it v\.gguf"):
        ml.export_direction(two, tmp_path / "v.pt", "gguf")
    with pytest.raises(ml.UserError, match="2 directions were given, and a file of lm-eval holds one"):
        ml.export_direction([two, three], tmp_path / "v.pt", "lm-eval")
    with pytest.raises(ml.UserError, match="two of the directions are of one level"):
        ml.export_direction([two, two], tmp_path / "v.gguf", "gguf")
    with pytest.raises(ml.UserError, match="doesn't carry the residual norm"):
        ml.export_direction(replace(two, residual_norm=None), tmp_path / "v.gguf", "gguf", unit="share")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"layers.1": {"action": "clamp"}}, r"its action is 'clamp'"),
        ({"layers.1": {"action": "add", "head_index": 2}}, "does more at layers.1"),
        ({"layers.1": {"action": "add", "bias": torch.ones(4)}}, "does more at layers.1"),
        ({"layers.1": {"action": "add", "steering_coefficient": "2"}}, "has the coefficient '2'"),
        ({"layers.1.mlp": {"action": "add"}}, "steers at 'layers.1.mlp', which is no block"),
        ({"layers.1": {"action": "add", "steering_vector": [1.0]}}, "holds a list where a plain tensor is needed"),
        ({"layers.1": {"action": "add", "steering_vector": torch.ones(2, 4)}}, "where one vector of d_model"),
        (
            {"layers.1": {"action": "add", "steering_vector": torch.ones(4, dtype=torch.int8)}},
            "real numbers are needed",
        ),
    ],
)
def test_what_lm_eval_does_otherwise_is_no_direction(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    filled = {name: {"steering_vector": torch.ones(4), **done} for name, done in content.items()}
    torch.save(filled, tmp_path / "v.pt")
    with pytest.raises(ml.UserError, match=said):
        ml.open(tmp_path / "v.pt")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_vectors_of_any_floats_are_read(kind: torch.dtype, tmp_path: Path) -> None:
    vector = torch.arange(1.0, 5.0).to(kind)
    torch.save(
        {"layers.1": {"steering_vector": vector, "action": "add", "steering_coefficient": 0.5}}, tmp_path / "v.pt"
    )
    assert torch.equal(ml.open(tmp_path / "v.pt").vector, torch.arange(1.0, 5.0) / 2)


def test_other_hook_points_and_rows_of_one_are_read(tmp_path: Path) -> None:
    done = {"steering_vector": torch.ones(1, 4), "steering_coefficient": 3.0, "action": "add"}
    torch.save({"base_model.model.layers.7": done, "h.9": done}, tmp_path / "v.pt")
    grid = ml.open(tmp_path / "v.pt")
    assert grid.levels == (8, 10)
    assert torch.equal(grid.at(8, "last").vector, 3 * torch.ones(4))


@pytest.mark.parametrize("format", FORMATS)
def test_the_commands_take_it_out_and_in(
    world: Any, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direction = world[2][2]
    ml.save(direction, tmp_path / "own.safetensors")
    out, back = tmp_path / FORMATS[format], tmp_path / "back.safetensors"
    main(
        [
            "directions",
            "export",
            "--direction",
            str(tmp_path / "own.safetensors"),
            "--format",
            format,
            "--out",
            str(out),
        ]
    )
    assert "to be added to the output of block 1" in capsys.readouterr().out
    main(["directions", "import", "--direction", str(out), "--out", str(back)])
    assert torch.equal(ml.open(back).vector, direction.vector)


def test_a_strength_that_no_file_can_hold_is_refused(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    for strength, said in ((0.0, "is 0, with which"), (float("nan"), "is nan, with which"), (1e300, "too long for")):
        with pytest.raises(ml.UserError, match=said):
            ml.export_direction(world[2][2], path, "lm-eval", strength=strength)
        assert not path.exists()
    with pytest.raises(ml.UserError, match="blocks is ''; give what the model calls its list of blocks"):
        ml.export_direction(world[2][2], path, "lm-eval", blocks="")


def test_a_controllers_constant_part_goes_out(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model, _ = world
    prompts = [replace(one, label={"a": "harmful", "b": "harmless"}[one.label]) for one in PROMPTS]
    plan = ml.ControllerPlan(reads=(1,), layers=(1, 2), epochs=1, hidden=8)
    controller = replace(ml.fit_controller(model, prompts, plan), evidence={"strength": 0.3})
    (tmp_path / "run").mkdir()
    ml.save(controller, tmp_path / "run" / "controller.safetensors")
    given = ["directions", "export", "--direction", str(tmp_path / "run"), "--format"]
    main([*given, "steering-vectors", "--strength", "2", "--out", str(tmp_path / "v.pt")])
    assert "to be added to the output of block 1" in capsys.readouterr().out
    grid = ml.open(tmp_path / "v.pt")
    for one in controller.constant(0.6):
        assert torch.allclose(grid.at(one.level, "last").vector, one.vector, atol=1e-6)
    main([*given, "gguf", "--layer", "2", "--out", str(tmp_path / "v.gguf")])
    assert ml.open(tmp_path / "v.gguf").level == 2
    with pytest.raises(SystemExit):
        main([*given, "gguf", "--layer", "3", "--out", str(tmp_path / "w.gguf")])
    assert "the controller adds at levels [1, 2], and not at 3" in capsys.readouterr().err
