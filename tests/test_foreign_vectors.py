"""Other tools' files are read for what they are, and nothing that could run code is."""

import json
import os
import pickle
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from mechlens.errors import UserError
from mechlens.methods.directions.direction import Direction, direction_cosine, direction_grid
from mechlens.methods.probing.beliefs import beliefs, centroids
from mechlens.runs.artifacts import load, save
from mechlens.runs.vectors.direction_files import (
    read_direction,
    read_mean_differences,
    read_stack,
    read_stacked_centroids,
    read_states,
)
from mechlens.runs.vectors.foreign_vectors import is_foreign, read_refusal_direction, read_repeng, read_steering_vectors

D_MODEL = 16


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refusal_run(folder: Path, direction: Any = None, metadata: Any = None) -> Path:
    """A folder as refusal_direction's run_pipeline leaves it: the chosen slice of all candidates, in float64."""
    candidates = torch.randn(5, 18, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.save(candidates[-2, 10] if direction is None else direction, folder / "direction.pt")
    written = {"pos": -2, "layer": 10} if metadata is None else metadata
    (folder / "direction_metadata.json").write_text(json.dumps(written, indent=4), encoding="utf-8")
    return folder


def control_vector(path: Path, tensors: dict[str, Any], arch: str = "controlvector") -> Path:
    """A file as repeng's export_gguf writes it."""
    writer = GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "mistral")
    writer.add_uint32(f"{arch}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def require_foreign(direction: Direction) -> None:
    assert is_foreign(direction)
    assert (direction.checkpoint.name, direction.checkpoint.fingerprint) == ("foreign", "")
    assert (direction.template, direction.train_ids, direction.site) == ("", (), "resid")
    assert direction.checkpoint.regime == "raw"
    assert direction.vector.dtype == torch.float32


def test_refusal_direction_is_read_with_its_place(tmp_path: Path) -> None:
    folder = refusal_run(tmp_path)
    direction = read_refusal_direction(folder)
    require_foreign(direction)
    expected = torch.load(folder / "direction.pt", weights_only=True)
    assert torch.equal(direction.vector, expected.float())
    # Their layer is a block's input (level 10), their -2 the last token but one.
    assert (direction.level, direction.position) == (10, "post[-2]")
    assert direction.contrast == ("harmful", "harmless")
    assert direction.vector.untyped_storage().nbytes() == 4 * D_MODEL  # not all candidates
    same = read_refusal_direction(folder / "direction.pt")
    assert torch.equal(same.vector, direction.vector)


def test_their_position_is_one_of_ours(tmp_path: Path) -> None:
    from mechlens.prompts.batch import TokenBatch

    position = read_refusal_direction(refusal_run(tmp_path)).position
    batch = TokenBatch(
        prompts=(),
        tokens=torch.zeros(0, 9, dtype=torch.long),
        mask=torch.zeros(0, 9, dtype=torch.bool),
        positions=("inst", *(f"post[{k}]" for k in range(5))),
        index=torch.zeros(0, 6, dtype=torch.long),
        instruction=torch.zeros(0, 2, dtype=torch.long),
        merged=torch.zeros(0, dtype=torch.bool),
        template="",
    )
    assert batch.resolve([position]) == ("post[3]",)


def test_a_foreign_direction_is_an_ordinary_one(tmp_path: Path) -> None:
    direction = read_refusal_direction(refusal_run(tmp_path))
    save(direction, tmp_path / "ours.safetensors")
    loaded = load(tmp_path / "ours.safetensors", Direction)
    assert is_foreign(loaded)
    assert direction_cosine(loaded, direction) == pytest.approx(1)


@pytest.mark.parametrize(
    "metadata",
    [
        {"layer": 10},
        {"pos": 2, "layer": 10},
        {"pos": 0, "layer": 10},
        {"pos": -2, "layer": -1},
        {"pos": -2, "layer": True},
        {"pos": -2, "layer": 10.0},
        {"pos": "-2", "layer": 10},
        [-2, 10],
        7,
    ],
)
def test_metadata_without_a_place_are_refused(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(UserError, match=r"direction_metadata\.json holds .*; it needs"):
        read_refusal_direction(refusal_run(tmp_path, metadata=metadata))


def test_missing_and_broken_metadata_are_named(tmp_path: Path) -> None:
    folder = refusal_run(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b""):
        (folder / "direction_metadata.json").write_bytes(content)
        with pytest.raises(UserError, match=r"direction_metadata\.json is not JSON"):
            read_refusal_direction(folder)
    (folder / "direction_metadata.json").unlink()
    with pytest.raises(UserError, match=r"there is no file .*direction_metadata\.json"):
        read_refusal_direction(folder)
    (folder / "direction.pt").unlink()
    with pytest.raises(UserError, match=r"there is no file .*direction\.pt"):
        read_refusal_direction(folder)


@pytest.mark.parametrize(
    "saved",
    [
        torch.ones(5, 18, D_MODEL),  # mean_diffs.pt in its place
        torch.ones(D_MODEL, dtype=torch.long),
        torch.ones(D_MODEL, dtype=torch.complex64),
        torch.ones(()),
        torch.ones(0),
        torch.ones(1).expand(1 << 40),  # a few bytes that claim a terabyte
        torch.ones(D_MODEL).to_sparse(),
        torch.ones(D_MODEL, device="meta"),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1e300], dtype=torch.float64),
        {"direction": torch.ones(D_MODEL)},
        [1.0, 2.0],
        None,
    ],
    ids=lambda saved: type(saved).__name__,
)
def test_what_is_no_vector_is_refused(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "direction.pt")
    refusal_run(tmp_path, direction=saved if saved is not None else {})
    with pytest.raises(UserError, match=r"direction\.pt"):
        read_refusal_direction(tmp_path)


class Trap:
    """A pickle that runs code when it is read: here it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@dataclass
class SteeringVector:
    """As the steering-vectors library's own class."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("read", [read_refusal_direction, read_steering_vectors])
@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, read: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # This setting opens every torch.load that doesn't say weights_only itself.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal_run(tmp_path)
    file, sprung = tmp_path / "direction.pt", tmp_path / "sprung"
    trap = {0: Trap(sprung)} if read is read_steering_vectors else Trap(sprung)
    if how == "pickle":
        file.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, file, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(UserError, match=r"code in it was not run"):
        read(file)
    assert not sprung.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert sprung.exists()  # so the trap was a real one


def test_steering_vectors_are_read_by_level(tmp_path: Path) -> None:
    layers = {4: vector(4).float(), 2: vector(2).half()}
    file = tmp_path / "vector.pt"
    for saved in (layers, {"layer_activations": layers, "layer_type": "decoder_block"}, {"layer_activations": layers}):
        torch.save(saved, file)
        found = read_steering_vectors(file)
        # Their layer is a block's output: the next level.
        assert [direction.level for direction in found] == [3, 5]
        for direction, layer in zip(found, (2, 4), strict=True):
            require_foreign(direction)
            assert direction.position == "last"
            assert torch.equal(direction.vector, layers[layer].float())


def test_a_pickled_steering_vector_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save(SteeringVector({0: vector()}), tmp_path / "vector.pt")
    with pytest.raises(UserError, match=r"save vector\.layer_activations in its place"):
        read_steering_vectors(tmp_path / "vector.pt")


def test_a_pickled_array_is_refused_with_a_way_out_and_without_torchs_own_warning(tmp_path: Path) -> None:
    import pickle

    stack = np.ones((3, D_MODEL))
    for content in (pickle.dumps(stack), pickle.dumps([stack[0]]), pickle.dumps({0: np.float64(1)})):
        (tmp_path / "stack.pt").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=r"so it was not read .* of an array save torch\.tensor\(array\)"):
                read_direction(tmp_path / "stack.pt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "holds no vectors"),
        ({-1: vector()}, "not a dict from layer numbers"),
        ({"0": vector()}, "not a dict from layer numbers"),
        ({True: vector()}, "not a dict from layer numbers"),
        (vector(), r"holds a cpu tensor of float64 \[16\] and not a dict from layer numbers to vectors, .*save {12:"),
        ({0: vector(), 1: torch.ones(3)}, r"sizes \[3, 16\]"),
        ({0: [1.0]}, "holds a list where a plain tensor"),
        ({0: torch.ones(1, D_MODEL)}, r"float32 \[1, 16\] where one vector"),
        ({"layer_activations": {0: vector()}, "layer_type": "mlp"}, "'mlp'; only decoder_block"),
        ({"layer_activations": [vector()]}, "not a dict from layer numbers"),
    ],
)
def test_other_dicts_are_refused(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "vector.pt")
    with pytest.raises(UserError, match=message):
        read_steering_vectors(tmp_path / "vector.pt")


def test_repeng_is_read_by_level(tmp_path: Path) -> None:
    tensors = {"direction.11": vector(11).float().numpy(), "direction.2": vector(2).float().numpy()}
    found = read_repeng(control_vector(tmp_path / "vector.gguf", tensors))
    assert [direction.level for direction in found] == [3, 12]
    for direction, layer in zip(found, (2, 11), strict=True):
        require_foreign(direction)
        assert (direction.position, direction.method) == ("last", "repeng (mistral)")
        assert direction.vector.tolist() == tensors[f"direction.{layer}"].tolist()
    with pytest.raises(UserError, match="there is no file"):
        read_repeng(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no vectors"),
        ({"direction.-1": vector().numpy()}, "holds the tensor 'direction.-1'"),
        ({"direction.01": vector().numpy()}, "holds the tensor 'direction.01'"),
        ({"blk.0.weight": vector().numpy()}, "holds the tensor 'blk.0.weight'"),
        ({"direction.1": np.ones(D_MODEL, dtype=np.int32)}, "of type I32"),
        ({"direction.1": np.ones((2, D_MODEL), dtype=np.float32)}, "where one vector"),
        ({"direction.1": np.full(D_MODEL, np.inf, dtype=np.float32)}, "not finite"),
        ({"direction.1": np.ones(3, np.float32), "direction.2": np.ones(4, np.float32)}, r"sizes \[3, 4\]"),
    ],
)
def test_other_gguf_files_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_repeng(control_vector(tmp_path / "vector.gguf", tensors))


def test_a_model_is_no_control_vector(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "model.gguf", {"direction.1": vector().numpy()}, arch="llama")
    with pytest.raises(UserError, match="architecture 'llama', not of a control vector"):
        read_repeng(path)


def test_half_precision_and_double_are_read(tmp_path: Path) -> None:
    for kind in (np.float16, np.float64):
        values = vector().numpy().astype(kind)
        (found,) = read_repeng(control_vector(tmp_path / "vector.gguf", {"direction.1": values}))
        assert torch.equal(found.vector, torch.from_numpy(values).float())


def gguf_with(key: bytes, content: bytes) -> bytes:
    """The start of a GGUF file with one field and no tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + content


@pytest.mark.parametrize(
    "content",
    [
        gguf_with(b"a", struct.pack("<IIQ", 9, 4, 1 << 62)),  # a list of 2^62 numbers, and the file ends
        gguf_with(b"a", struct.pack("<IQ", 8, 1 << 62)),  # a text of that length
        gguf_with(b"a", struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 5000),  # lists in lists
        gguf_with(b"a", struct.pack("<I", 99)),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0),
        b"GGUF" + struct.pack("<IQQ", 77, 0, 0),
        b"GGUF",
        b"PK\x03\x04",
        b"",
    ],
    ids=["list", "text", "nested", "type", "tensors", "version", "magic", "zip", "empty"],
)
def test_damaged_and_hostile_files_end_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "vector"
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a GGUF file"):
        read_repeng(file)
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        read_steering_vectors(file)


def test_cut_files_are_refused_wherever_they_are_cut(tmp_path: Path) -> None:
    whole = control_vector(tmp_path / "vector.gguf", {"direction.1": vector().numpy()}).read_bytes()
    torch.save({0: vector()}, tmp_path / "vector.pt")
    saved = (tmp_path / "vector.pt").read_bytes()
    cut = tmp_path / "cut"
    for read, content in ((read_repeng, whole), (read_steering_vectors, saved)):
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            cut.write_bytes(content[: int(share * len(content))])
            with pytest.raises(UserError, match="damaged"):
                read(cut)
    with pytest.raises(UserError, match="could not be read"):
        read_steering_vectors(tmp_path)


# Stacks and grids


RELEASED = Path(__file__).resolve().parents[2] / "shared" / "data" / "released_tensors"
LEVELS, PROMPTS, POST = 4, 3, 2


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(3))


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"the released tensors are not at {RELEASED}")
def test_the_papers_files_give_the_papers_beliefs() -> None:
    """Published: -.056 ... for harmfulness at inst, +.009 ... for refusal at the last token (methods.md 1.8)."""
    acts = read_states({"refused_harmless": RELEASED / "qwen-hl-refuse5-all-layer-2pos.pt"})
    assert (acts.positions, acts.last, len(acts.ids), acts.levels[-1]) == (("inst", "last"), "last", 5, 28)
    for classes, position, published in (
        (("hf", "hl"), "inst", (-0.056, -0.028, -0.045, -0.043, -0.040)),
        (("refuse", "accept"), "post[-1]", (0.009, 0.010, 0.016, 0.009, 0.015)),
    ):
        files = [RELEASED / f"qwen-{name}-cls-all-layer.pt" for name in classes]
        found = beliefs(acts, read_stacked_centroids(*files, position, classes), centered=False, skip_embedding=False)
        assert found.tolist() == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("old_numpy", [False, True])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_pickled_array_is_read_as_a_stack(tmp_path: Path, kind: Any, old_numpy: bool) -> None:
    array, file = numbers(LEVELS).numpy().astype(kind), tmp_path / "hf-dir.pt"
    torch.save(array, file, _use_new_zipfile_serialization=not old_numpy)
    if old_numpy:  # NumPy 1 called its module otherwise; the legacy format holds the pickle as it is
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    grid = read_stack(file, "inst")
    assert torch.equal(grid.vectors[:, 0], torch.from_numpy(array.astype(np.float32)))
    one = grid.at(2, "inst")
    require_foreign(one)
    assert torch.equal(one.vector, grid.vectors[2, 0])
    assert torch.equal(read_direction(file, layer=2, position="inst").vector, one.vector)
    with pytest.raises(UserError, match="doesn't say where they were read; name the position"):
        read_direction(file, layer=2)


def test_states_have_the_papers_positions_and_give_its_directions(tmp_path: Path) -> None:
    """Their script stores two tokens of the instruction and the template, and takes means over prompts."""
    harmful, harmless = numbers(LEVELS, PROMPTS, 2 + POST).half(), numbers(LEVELS, 2, 2 + POST).half() * 2
    torch.save(harmful, tmp_path / "hf.pt")
    torch.save(harmless.numpy(), tmp_path / "hl.pt")
    acts = read_states({"harmful": tmp_path / "hf.pt", "harmless": tmp_path / "hl.pt"})
    assert acts.positions == ("instruction[-2]", "inst", "post[0]", "post[1]")
    assert acts.labels == ("harmful",) * PROMPTS + ("harmless",) * 2
    means = harmful.float().mean(dim=1) - harmless.float().mean(dim=1)
    grid = direction_grid(acts, "harmful", "harmless")
    for position, column in (("inst", 1), ("last", 3), ("post[-2]", 2)):
        for level in range(LEVELS):
            torch.testing.assert_close(grid.at(level, position).vector, means[level, column])
    found = centroids(acts, "harmful", "harmless", "last")
    torch.testing.assert_close(found.positive, harmful.float().mean(dim=1)[:, 3])
    assert found.position == "post[1]"


def test_the_whole_grid_of_refusal_direction_holds_what_it_selected(tmp_path: Path) -> None:
    grid = torch.randn(5, 18, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.save(grid, tmp_path / "mean_diffs.pt")
    found = read_mean_differences(tmp_path / "mean_diffs.pt")
    assert found.positions == ("post[-5]", "post[-4]", "post[-3]", "post[-2]", "post[-1]")
    chosen = read_refusal_direction(refusal_run(tmp_path))  # position -2, layer 10
    assert torch.equal(found.at(chosen.level, chosen.position).vector, chosen.vector)
    assert torch.equal(found.at(3, "last").vector, grid[-1, 3].float())
    alone = tmp_path / "grid"
    alone.mkdir()
    (tmp_path / "mean_diffs.pt").rename(alone / "mean_diffs.pt")
    assert torch.equal(read_direction(alone / "mean_diffs.pt", layer=10, position="post[-2]").vector, chosen.vector)
    require_foreign(found.at(10, "post[-2]"))


@pytest.mark.parametrize(
    "value",
    [
        np.ones((LEVELS, D_MODEL), dtype=object),
        np.ones((LEVELS, D_MODEL), dtype=np.complex64),
        np.ones((LEVELS, D_MODEL), dtype=bool),
        np.ones((LEVELS, D_MODEL), dtype=np.int64),
        np.full((LEVELS, D_MODEL), np.nan),
        np.full((LEVELS, D_MODEL), 1e300),
        np.ones(D_MODEL),
        torch.ones(LEVELS, D_MODEL, dtype=torch.bool),
        torch.ones(LEVELS, D_MODEL, dtype=torch.complex64),
        torch.ones(LEVELS, D_MODEL, 1, 1),
        torch.ones(LEVELS, 1).expand(LEVELS, 1 << 40),
        torch.ones(0, D_MODEL),
        {"directions": torch.ones(LEVELS, D_MODEL)},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_no_stack_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "stack.pt")
    with pytest.raises(UserError, match=r"stack\.pt"):
        read_stack(tmp_path / "stack.pt", "inst")


@pytest.mark.parametrize("how", ["object array", "stack"])
def test_code_in_an_array_is_never_run(tmp_path: Path, how: str) -> None:
    file, sprung = tmp_path / "stack.pt", tmp_path / "sprung"
    trap: Any = np.array([[Trap(sprung)]], dtype=object) if how == "object array" else [np.ones(3), Trap(sprung)]
    torch.save(trap, file)
    with pytest.raises(UserError, match=r"code in it was not run"):
        read_stack(file, "inst")
    assert not sprung.exists()


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "stack.pt"
    torch.save(numbers(2).numpy(), file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for cut in range(0, len(whole), 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"stack\.pt"):
            read_stack(file, "inst")


def test_centroids_of_two_models_are_refused(tmp_path: Path) -> None:
    torch.save(numbers(4), tmp_path / "one.pt")
    torch.save(numbers(5), tmp_path / "other.pt")
    with pytest.raises(UserError, match="need two stacks of one model"):
        read_stacked_centroids(tmp_path / "one.pt", tmp_path / "other.pt", "inst")
    torch.save(numbers(4, PROMPTS, 2), tmp_path / "one.pt")
    torch.save(numbers(4, PROMPTS, 3), tmp_path / "other.pt")
    with pytest.raises(UserError, match="states of 2 kinds"):
        read_states({"a": tmp_path / "one.pt", "b": tmp_path / "other.pt"})
