"""Streamed activations: the numbers of those in memory, one cell in memory at a time, whatever happens to the disk."""

import copy
import errno
import functools
import inspect
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted_activations, planted_two_by_two
from test_collect import bridged, prompts
from tiny import tiny_hf
from torch import Tensor

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.activations import streamed as module
from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.streamed import StreamedTensor, packed
from mechlens.methods.directions.direction import direction_grid, mean_difference
from mechlens.methods.directions.methods import grid_by
from mechlens.methods.directions.nulls import shuffled_like, split_half
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.probing.beliefs import beliefs, centroids
from mechlens.methods.probing.beyond_words import levels_of, read_vectors
from mechlens.methods.probing.detect import detect
from mechlens.methods.probing.out_of_fold import out_of_fold_scores
from mechlens.methods.probing.readouts import fit_readouts
from mechlens.methods.probing.within_folds import folds_of
from mechlens.methods.statistics.effects import Effect, cosine_curve
from mechlens.methods.statistics.resample import family_folds, one_thread
from mechlens.methods.steering.interventions import residual_norms
from mechlens.prompts.split import split_by_family
from mechlens.runs.artifacts import load, save
from mechlens.runs.folder import FolderCache
from mechlens.settings import DetectionPlan
from mechlens.studies.shared.contrasts import best_direction
from mechlens.studies.shared.two_beliefs import measure_beliefs


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "STREAMED_FROM", 0)
    with one_thread():
        yield


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were read at once, each time."""
    sizes: list[int] = []
    read = StreamedTensor.read

    def counted(self: StreamedTensor) -> Tensor:
        sizes.append(self.numel())
        return read(self)

    monkeypatch.setattr(StreamedTensor, "read", counted)
    return sizes


def on_disk(acts: Activations, folder: Path) -> Activations:
    """The same activations in three pieces, their prompts in another order, as `collect` leaves them."""
    cache, order = FolderCache(folder), torch.randperm(len(acts.ids), generator=torch.Generator().manual_seed(0))
    keys = [f"{i:064d}" for i in range(3)]
    for key, rows in zip(keys, order.chunk(3), strict=True):
        cache.put(key, packed(acts.values[rows]))
    values = StreamedTensor.of(cache, keys, order.argsort())
    assert values is not None
    return replace(acts, values=values)


# --- every analysis, cell by cell ------------------------------------------------------------------------------------


def _split(acts: Activations) -> Any:
    return split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)


def _out_of_fold(acts: Activations) -> object:
    positive = torch.tensor([label == "harmful" for label in acts.labels])
    folds = [family_folds(acts.labels, acts.families, 4, seed) for seed in (0, 1)]
    return out_of_fold_scores(acts, positive, torch.ones_like(positive), folds)


def _home(acts: Activations) -> object:
    values = acts.values[list(range(4, 60)), :, 1]
    folds = folds_of(torch.tensor([label == "harmful" for label in acts.labels[4:60]]), acts.families[4:60], 0)
    return read_vectors(values, folds, levels_of(values, folds))


def _curve(acts: Activations) -> object:
    first, second = (Effect(acts.values[:, :, k], acts.labels, {"harmful": 1.0, "harmless": -1.0}) for k in (0, 1))
    return cosine_curve(first, second, acts.families, acts.levels, seed=0), first.norms()


def _beliefs(acts: Activations) -> object:
    found = centroids(acts, "harmful", "harmless", "inst")
    return found, [beliefs(acts, found, centered=flag, skip_embedding=flag) for flag in (False, True)]


PAIR = ("harmful", "harmless")
PLAN = DetectionPlan(resamples=20, permutations=20, random_directions=3)
ANALYSES: dict[str, Callable[[Activations], object]] = {
    "detect": lambda acts: detect(acts, *PAIR, _split(acts), PLAN),
    "detect, refitted": lambda acts: detect(acts, *PAIR, _split(acts), PLAN, refit=True),
    "another method": lambda acts: grid_by(acts, *PAIR, "lda"),
    "mean difference": lambda acts: mean_difference(acts, *PAIR, 1, "inst"),
    "every mean difference": lambda acts: direction_grid(acts, *PAIR),
    "shuffled labels": lambda acts: shuffled_like(acts, *PAIR, 1, "inst", 3, 0),
    "reliability": lambda acts: split_half(acts, *PAIR, 5, 0),
    "reliability of another method": lambda acts: split_half(acts, *PAIR, 2, 0, "lda"),
    "best direction": lambda acts: best_direction(acts, *PAIR, "last", 0),
    "out of fold": _out_of_fold,
    "read-outs": lambda acts: [fit_readouts(acts, PAIR, _split(acts), kind) for kind in ("direction", "probe")],
    "home": _home,
    "cosines": _curve,
    "beliefs": _beliefs,
    "guard": lambda acts: GuardEstimator(positions=("inst", "last")).fit(acts).fitted_,
    "norms": residual_norms,
    "table": lambda acts: acts.table(),
    "one cell": lambda acts: one_cell(acts, 2, "last"),
}


def same(ours: object, theirs: object) -> bool:
    """Equal bit for bit, NaN being NaN."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(torch.nan_to_num(ours, 7e7), torch.nan_to_num(theirs, 7e7))
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if hasattr(ours, "__dataclass_fields__"):
        return all(same(getattr(ours, name), getattr(theirs, name)) for name in ours.__dataclass_fields__)
    if hasattr(ours, "equals"):
        return bool(ours.equals(theirs))
    return ours == theirs or (ours != ours and theirs != theirs)


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_gives_the_same_numbers_and_holds_one_cell(name: str, tmp_path: Path, reads: list[int]) -> None:
    acts = planted_activations(separation=1.5, n_per_class=32, d_model=8, seed=3).acts
    streamed = on_disk(acts, tmp_path)
    assert same(ANALYSES[name](streamed), ANALYSES[name](acts))
    assert 0 < max(reads) <= len(acts.ids) * acts.values.shape[-1]


def test_beliefs_of_the_quadrants_are_the_same(tmp_path: Path, reads: list[int]) -> None:
    acts = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0, n_per_cell=20, d_model=8).acts
    folds = family_folds(acts.labels, acts.families, 2, 0)
    ours, theirs = (measure_beliefs(each, acts.labels, folds, 0, 20) for each in (on_disk(acts, tmp_path), acts))
    assert same(ours, theirs)
    assert 0 < max(reads) <= len(acts.ids) * acts.values.shape[-1]


# --- collect ---------------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "residuals": {"positions": ["inst", "post[*]"]},
    "a ragged span": {"positions": ["instruction[*]", "last"]},
    "its mean": {"positions": ["instruction[*]", "last"], "reduce": "mean"},
    "z": {"positions": ["inst", "last"], "site": "z"},
    "neurons": {"positions": ["last"], "site": "mlp_post", "levels": [1]},
    "patterns": {"positions": ["inst", "last"], "site": "pattern"},
    "one prompt": {"positions": ["last"]},
}


@functools.cache
def model_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Shared by tests that don't change it."""
    return bridged(tiny_hf(dtype=dtype, seed=seed))


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, TYPES[0]) for name in ASKED), *(("its mean", dtype) for dtype in TYPES[1:])]
)
def test_collect_streams_what_it_would_have_kept_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(dtype)
    asked = prompts(1 if name == "one prompt" else 7)
    dense = collect(model, asked, max_tokens=150, **ASKED[name])
    assert not isinstance(dense.values, StreamedTensor)  # there is nowhere to stream it to
    acts = collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path), **ASKED[name])
    assert isinstance(acts.values, StreamedTensor)
    assert same(replace(acts, values=acts.values.read()), dense)
    again = collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path), **ASKED[name])
    assert same(again.values[:], dense.values)


def test_shards_are_as_wide_as_the_models_own_type(tmp_path: Path) -> None:
    asked, sizes = prompts(4), []
    for dtype in (torch.float32, torch.bfloat16):
        acts = collect(model_of(dtype), asked, cache=FolderCache(tmp_path))
        assert isinstance(acts.values, StreamedTensor)
        sizes.append({piece.dtype for piece in acts.values.pieces})
    assert sizes == [{torch.float32}, {torch.bfloat16}]


def test_batches_are_as_small_as_memory_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of(), prompts(7)
    dense = collect(model, asked)
    monkeypatch.setattr("mechlens.methods.activations.reading.STREAMED_BATCH", 2 * 4 * dense.values[0].numel())
    acts = collect(model, asked, cache=FolderCache(tmp_path))
    assert isinstance(acts.values, StreamedTensor)
    assert max(len(piece) for piece in acts.values.pieces) == 2
    assert torch.allclose(acts.values, dense.values, atol=1e-6)


def test_projections_are_streamed_too(tmp_path: Path) -> None:
    model, asked = model_of(), prompts(6)
    lines = [mean_difference(collect(model, asked), "a", "b", level, "last") for level in (1, 2)]
    ours, theirs = (collect(model, asked, project=lines, cache=cache) for cache in (FolderCache(tmp_path), None))
    assert torch.equal(ours.values, theirs.values)


def test_few_values_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAMED_FROM", 1 << 30)
    assert type(collect(model_of(), prompts(2), cache=FolderCache(tmp_path)).values) is Tensor


def test_a_folders_name_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cache is '.*give ml.FolderCache\(FOLDER\)"):
        inspect.unwrap(collect)(model_of(), prompts(1), cache=str(tmp_path))  # as without the tests' type checks


# --- a newcomer in a notebook ----------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> tuple[Activations, Activations]:
    dense = planted_activations(separation=1.0, n_per_class=6, d_model=5, n_levels=4).acts
    return on_disk(dense, tmp_path), dense


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda v: v[:],
    "rows": lambda v: v[[3, 1, -1]],
    "a mask": lambda v: v[torch.arange(len(v)) % 2 == 0],
    "a slice": lambda v: v[2:9:2],
    "levels": lambda v: v[:, 1:3],
    "a level, a position": lambda v: v[:, -1, 1],
    "a position with its axis": lambda v: v[:, :, 0][:, :, None],
    "rows of a level": lambda v: v[[1, 2], 3],
}
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "a prompt": lambda v: v[-2],
    "a number of each": lambda v: v[..., 3],
    "a new last axis": lambda v: v[..., None],
    "pairs": lambda v: v[[1, 2], [0, 3]],
    "a sum": lambda v: v.sum(dim=0),
    "a product": lambda v: torch.ones(1, len(v)) @ v[:, 0, 0],
    "one by one": lambda v: torch.stack(list(v)),
    "level by level": lambda v: torch.stack(list(v.unbind(1))),
    "another type": lambda v: v.to(torch.float64),
    "joined": lambda v: torch.cat([v, v]),
    "a copy": lambda v: v.clone(),
    "detached": lambda v: v.detach(),
    "a permutation": lambda v: v.permute(1, 0, 2, 3),
    "from numpy": lambda v: torch.from_numpy(v[:, 1].numpy()),
    "from lists": lambda v: torch.tensor(v.tolist()),
    "pickled": lambda v: pickle.loads(pickle.dumps(v)),
    "saved": lambda v: torch.load(_saved(v)),
}


def _saved(values: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", TAKEN)
def test_a_part_is_taken_unread(name: str, both: tuple[Activations, Activations], reads: list[int]) -> None:
    ours, theirs = (TAKEN[name](acts.values) for acts in both)
    assert isinstance(ours, StreamedTensor)
    assert ours.shape == theirs.shape
    assert reads == []
    assert torch.equal(ours.read(), theirs)


@pytest.mark.parametrize("name", READ)
def test_anything_else_is_as_of_a_tensor(name: str, both: tuple[Activations, Activations]) -> None:
    ours, theirs = (READ[name](acts.values) for acts in both)
    assert type(ours) is Tensor
    assert torch.equal(ours, theirs)


def test_activations_are_used_as_ever(both: tuple[Activations, Activations], reads: list[int]) -> None:
    ours, theirs = both
    picked = ours.select([4, 0, 7]).select([2, 0])
    assert picked.ids == theirs.select([7, 4]).ids
    assert copy.copy(ours).values is ours.values
    assert copy.deepcopy(ours).values is ours.values
    assert repr(ours.values) in repr(ours)
    assert "unread" in repr(ours.values)
    assert reads == []
    assert torch.equal(picked.values.read(), theirs.values[[7, 4]])  # type: ignore[attr-defined]
    assert ours.to_frame().equals(theirs.to_frame())
    assert (ours.numpy() == theirs.numpy()).all()
    assert torch.equal(ours[2, "last"], theirs[2, "last"])
    assert (torch.equal(one, other) for one, other in zip(ours.at(1, "inst"), theirs.at(1, "inst"), strict=True))


def test_saved_activations_hold_their_numbers(both: tuple[Activations, Activations], tmp_path: Path) -> None:
    save(both[0], tmp_path / "acts.safetensors")
    assert same(load(tmp_path / "acts.safetensors", Activations), both[1])


def test_heads_are_taken_unread(tmp_path: Path, reads: list[int]) -> None:
    model, asked = model_of(), prompts(5)
    acts = collect(model, asked, site="z", cache=FolderCache(tmp_path))
    head = acts.head(1)
    assert (isinstance(head.values, StreamedTensor), reads) == (True, [])
    assert torch.equal(head.values, collect(model, asked, site="z").head(1).values)


def test_what_lies_on_disk_is_not_changed(both: tuple[Activations, Activations]) -> None:
    acts, dense = both
    for change in (
        lambda: acts.values.zero_(),
        lambda: acts.values[:, 1].mul_(2),
        lambda: acts.values.__setitem__(0, 1.0),
        lambda: acts.values.__iadd__(1),
    ):
        with pytest.raises(UserError, match="can't be changed"):
            change()
    acts.at(1, "inst").zero_()
    assert torch.equal(acts.values.read(), dense.values)  # type: ignore[attr-defined]


def test_more_than_the_memory_is_one_sentence(
    both: tuple[Activations, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = both[1].values[:, 0, 0].numel()
    monkeypatch.setattr(module.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": cell}[name])
    for whole in (both[0].numpy, both[0].to_frame, lambda: both[0].values.sum()):
        with pytest.raises(UserError, match=r"take 0 GB and this machine has 0.*acts.at\(level, position\)"):
            whole()
    assert torch.equal(both[0].at(1, "inst"), both[1].at(1, "inst"))
    with pytest.raises(UserError, match=r"cache=FolderCache"):
        collect(model_of(), prompts(3))


# --- the disk --------------------------------------------------------------------------------------------------------


def test_a_folder_may_go_while_it_is_read(both: tuple[Activations, Activations], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    assert torch.equal(both[0].values.read(), both[1].values)  # type: ignore[attr-defined]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [Path.unlink, _torn, _flipped])
def test_a_lost_or_damaged_shard_is_made_again(harm: Callable[[Path], None], tmp_path: Path) -> None:
    model, asked = model_of(), prompts(7)
    first = collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path)).values.clone()
    before = shards(tmp_path)
    assert len(before) > 2
    harm(before[1])
    again = collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path))
    assert torch.equal(again.values, first)
    assert shards(tmp_path) == before


def test_another_request_or_another_model_shares_no_shard(tmp_path: Path) -> None:
    asked = prompts(4)
    for seed, kept in ((0, asked), (1, asked), (0, prompts(4, seed=1))):
        model = model_of(seed=seed)
        acts = collect(model, kept, cache=FolderCache(tmp_path))
        assert torch.equal(acts.values, collect(model, kept).values)
        assert acts.checkpoint == ml.collect(model, kept).checkpoint


def test_a_full_disk_is_one_sentence_and_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlens.runs import artifacts

    model, asked, written = model_of(), prompts(7), artifacts.save_file
    made: list[Any] = []

    def full(*args: Any, **options: Any) -> None:
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(args)
        written(*args, **options)

    with monkeypatch.context() as disk:
        disk.setattr(artifacts, "save_file", full)
        with pytest.raises(UserError, match="the disk is full"):
            collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(shards(tmp_path)) == 2
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    acts = collect(model, asked, max_tokens=150, cache=FolderCache(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert torch.equal(acts.values, collect(model, asked, max_tokens=150).values)


def test_a_cache_that_keeps_nothing_still_gives_all() -> None:
    class Sieve:
        def get(self, key: str) -> None: ...

        def put(self, key: str, value: dict[str, Tensor]) -> None: ...

    model, asked = model_of(), prompts(5)
    assert torch.equal(collect(model, asked, cache=Sieve()).values, collect(model, asked).values)


# --- a study ---------------------------------------------------------------------------------------------------------


def test_a_study_that_streams_finds_the_same(tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of(), [replace(prompt, family=f"f{i // 2}") for i, prompt in enumerate(prompts(60))]
    sides = asked[::2], asked[1::2]
    ours = ml.find_concept(model, *sides, ["inst", "last"], PLAN, cache=FolderCache(tmp_path))
    assert 0 < max(reads) <= ours.acts.values[:, 0, 0].numel()
    assert isinstance(ours.acts.values, StreamedTensor)
    monkeypatch.setattr(module, "STREAMED_FROM", 1 << 30)
    theirs = ml.find_concept(model, *sides, ["inst", "last"], PLAN, cache=FolderCache(tmp_path / "other"))
    assert same((ours.measured, ours.reliability), (theirs.measured, theirs.reliability))
