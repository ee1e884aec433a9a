"""What is read is held against the words and an untrained network; on worlds with a planted truth no word is wrong."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import DictShelf
from planted_series import Later, PlantedSeries, World
from saved import save_model

from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.beyond_words import levels_of, read_vectors, read_words
from mechlens.methods.probing.within_folds import folds_of, mean_auroc
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoints.swap import CheckpointSwapper, checkpoint_swapper
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.track.measures.floor import Floor, measured_floor
from mechlens.studies.track.measures.home import FLOORS, home_question, surface_floor
from mechlens.studies.track.measures.reference import TrackedConcept
from mechlens.studies.track.result import Tracking
from mechlens.studies.track.verdict import SENTENCES


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Worlds


def words(found: Tracking) -> list[str]:
    """The verdict on each checkpoint, of harmfulness."""
    return [verdict.word for verdict in found.verdicts if verdict.concept == "harmful"]


SERIES = (
    Later(), Later(kind="random blocks"), Later(concept=0.0, reads_words=0.3), Later(angle=1.4), Later(shift=5.0),
    Later(refuses=frozenset()),
)  # fmt: skip


@pytest.mark.parametrize("carried", [0.0, 0.8])
def test_a_concept_beyond_the_words_is_followed(carried: float) -> None:
    found = words(PlantedSeries(World(words=carried, concept=4.0)).tracked(*SERIES))
    assert found[1] in ("representation lost", "not above the words")
    assert found[2] in ("representation lost", "not above the words")
    assert [found[0], *found[3:]] == ["kept", "read-out drift", "threshold drift", "behaviour decoupled"]


def test_what_only_the_words_carry_is_never_kept() -> None:
    """The words are read well in the base, at every checkpoint, and in a network with random blocks."""
    series = PlantedSeries(World(words=1.6, concept=0.0, reads_words=4.0))
    found = series.tracked(Later(), Later(kind="random blocks"), Later(refuses=frozenset()))
    assert not set(words(found)) & {"kept", "behaviour decoupled", "read-out drift", "threshold drift"}
    base = found.at_home.query("step == 0 and concept == 'harmful'").set_index("number")["value"]
    assert base["auroc.probe"] > 0.75
    assert base["auroc.random_blocks"] > 0.7


def test_a_world_without_anything_is_not_measurable() -> None:
    found = PlantedSeries(World(concept=0.0)).tracked(Later(), Later(kind="random blocks"))
    assert words(found) == ["not measurable", "not measurable"]


def test_the_table_of_error_rates_has_a_column_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    from error_rates_track import COLUMNS, cases

    named = [word for words in COLUMNS.values() for word in words]
    assert sorted(named) == sorted(SENTENCES)
    for case in (*cases(True), *cases(False)):
        assert set(case.right) <= set(named)


def test_every_number_of_the_series_stands_beside_the_floor() -> None:
    found = PlantedSeries(World(n=40, words=1.0)).tracked(Later())
    for concept in found.reference.measurable:
        table = found.at_home[found.at_home["concept"] == concept.name]
        for step in found.steps:
            here = table[table["step"] == step].set_index("number")["value"]
            for name in FLOORS:
                gap = here["auroc.probe"] - here[f"auroc.{name}"]
                assert here[f"gain.{name}"] == pytest.approx(gap)
    assert found.readouts["random_blocks"].notna().all()
    metrics = found.metrics()
    assert {f"harmful.floor.{name}" for name in FLOORS} <= set(metrics)
    assert {f"harmful.gain.{name}" for name in FLOORS} <= set(metrics)


# Methods


def pairs(n: int) -> tuple[torch.Tensor, tuple[str, ...]]:
    return torch.arange(2 * n) % 2 == 0, tuple(str(i // 2) for i in range(2 * n))


def test_no_prompt_is_scored_by_a_fit_to_its_own_family() -> None:
    positive, families = pairs(20)
    folds = folds_of(positive, families, 0)
    for part in folds.parts:
        assert sorted(i for _, held_out in part for i in held_out) == list(range(40))
        for fit, held_out in part:
            assert not {families[i] for i in fit} & {families[i] for i in held_out}
    # A vector that tells each prompt, and nothing else, can't be read.
    alone = read_vectors(torch.eye(40)[:, None], folds)
    assert mean_auroc(alone, folds).value == 0.5


def test_ties_are_ties() -> None:
    """What both sides of every pair share says nothing, whatever rounding does to it."""
    positive, families = pairs(30)
    folds = folds_of(positive, families, 0)
    shared = torch.randn(30, 1, 24, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    assert mean_auroc(read_vectors(shared, folds), folds).value == 0.5
    assert mean_auroc(read_words(["the same"] * 60, folds), folds).value == 0.5
    assert mean_auroc(read_words([""] * 60, folds), folds).value == 0.5


@pytest.mark.parametrize("n", [20, 40])
def test_the_floor_of_a_token_is_what_the_token_tells(n: int) -> None:
    """Two tokens and an AUROC of .80: prompts of one token tie, however the folds fall."""
    positive, families = pairs(n)
    generator = torch.Generator().manual_seed(n)
    embeddings = torch.randn(2, 24, generator=generator)
    labels = tuple("harmful" if flag else "harmless" for flag in positive.tolist())
    concept = TrackedConcept("harmful", ("harmful", "harmless"), labels, "inst", None, {})
    for seed in range(3):
        marks = (torch.rand(2 * n, generator=generator) < torch.where(positive, 0.8, 0.2)).long()
        asked, tokens = home_question(concept, families, seed), embeddings[marks]
        found = surface_floor(asked, [f"t{mark}" for mark in marks], tokens, tokens)["token"]
        assert mean_auroc(found, asked.folds).value == pytest.approx(float(auroc(marks.double(), positive)), abs=0.03)


def test_words_that_tell_the_class_are_read() -> None:
    positive, families = pairs(30)
    texts = [f"{'poison' if flag else 'cake'} {i // 2}" for i, flag in enumerate(positive.tolist())]
    folds = folds_of(positive, families, 0)
    assert mean_auroc(read_words(texts, folds), folds).value == 1.0


def test_the_level_is_chosen_without_the_prompts_that_are_scored() -> None:
    """Many levels of noise: a level chosen on the scored prompts would look like a find."""
    positive, families = pairs(30)
    generator = torch.Generator().manual_seed(0)
    areas = []
    for seed in range(12):
        folds = folds_of(positive, families, seed)
        noise = torch.randn(60, 40, 6, generator=generator)
        areas.append(mean_auroc(read_vectors(noise, folds, levels_of(noise, folds)), folds).value)
    assert sum(areas) / len(areas) == pytest.approx(0.5, abs=0.05)
    planted = torch.randn(60, 8, 6, generator=generator)
    planted[:, 5, 0] += 3.0 * positive
    assert {level for part in levels_of(planted, folds) for level in part} == {5}


# From a model


def concept_of(prompts: list[Prompt], home: str) -> TrackedConcept:
    labels = tuple(prompt.label for prompt in prompts)
    return TrackedConcept("harmful", ("harmful", "harmless"), labels, home, None, {})


def test_the_floor_takes_one_pass_a_network_is_kept_and_leaves_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(save_model(tmp_path / "base"))
    prompts = [
        Prompt(f"p{i}", f"number {i // 2} the {'poison' if i % 2 else 'cake'}", "harmful" if i % 2 else "harmless",
               family=f"f{i // 2}")
        for i in range(40)
    ]  # fmt: skip
    labels, families = [p.label for p in prompts], [p.group for p in prompts]
    split = split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    seeds: list[int] = []
    put = CheckpointSwapper.put_random_blocks
    monkeypatch.setattr(
        CheckpointSwapper, "put_random_blocks", lambda self, seed: (seeds.append(seed), put(self, seed))[1]
    )
    cache = DictShelf()
    with checkpoint_swapper(base) as swapper:
        batch = tokenize(prompts, chat_template(swapper.model.mechlens.tokenizer))
        asked = [home_question(concept_of(prompts, "inst"), families, 0)]

        def measured(key: str, networks: int = 2) -> Floor:
            return measured_floor(
                swapper, batch, asked, split, positions=("inst", "last"), levels=(0, 2), networks=networks, seed=5,
                cache=cache, key=key,
            )  # fmt: skip

        floor, again = measured("a"), measured("a")
        assert seeds == [5, 6]
        assert floor.scores["harmful"].keys() == FLOORS.keys()
        assert len(floor.scores["harmful"]["random_blocks"]) == 2 * len(asked[0].folds.parts)
        for name, scores in floor.scores["harmful"].items():
            assert torch.equal(again.scores["harmful"][name], scores)
        # The last token is another word in each class, so everything reads it, the untrained networks too.
        for scores in floor.scores["harmful"].values():
            assert mean_auroc(scores, asked[0].folds).value == 1.0
        assert set(floor.grids["harmful"]) == {"direction", "probe"}

        def without(self: Any, seed: int) -> Any:
            from mechlens.errors import UserError

            raise UserError("no initialiser")

        monkeypatch.setattr(CheckpointSwapper, "put_random_blocks", without)
        with pytest.warns(UserWarning, match="no floor of an untrained network: no initialiser"):
            none = measured("b")
        assert not mean_auroc(none.scores["harmful"]["random_blocks"], asked[0].folds).measurable
        assert none.grids["harmful"] == {}
