"""What goes wrong in a notebook is said as it is at the command line: in one sentence, and in Python's words.

Functions are unwrapped where they get what their annotations exclude: outside of these tests nothing checks these.
"""

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError, kind_of, many
from mechlens.files import user_path
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.activations.spans import spans_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.judges import PHRASES, HumanLabels
from mechlens.methods.behaviour.log_odds import answer_log_probs
from mechlens.methods.behaviour.scoring.number_reply import number_replies
from mechlens.methods.directions.direction import Direction, mean_difference
from mechlens.methods.directions.token_view import project_tokens
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.steering.side_by_side import steer
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.prompts.asked import as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.registry import whole_numbers
from mechlens.settings import DetectionPlan, Options, require_ranges
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.compare.study import prepare as prepare_compare
from mechlens.studies.direction.study import find_concept
from mechlens.studies.registry import studies, study_of
from mechlens.studies.separate.config import Separate
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.likely_pairs import warn_of_twins
from mechlens.studies.shared.quadrants import judge_answers
from mechlens.studies.track.config import Track


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model()


@pytest.mark.parametrize("sides", ["formal", ("a", "b", "c"), (1, 2), ("a", "a"), ("", "b"), 3])
def test_the_names_of_the_sides_are_looked_at_before_anything_is_read(sides: Any) -> None:
    with pytest.raises(UserError, match=r"^sides is .*; give the names of both sides, two different texts"):
        inspect.unwrap(find_concept)(None, ["the one"], ["the other"], sides=sides)


RAW: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "a number as the model": (lambda model, one: inspect.unwrap(ml.load)(3), "an int was given as the model; give"),
    "nothing to open": (lambda model, one: inspect.unwrap(user_path)(None), "a NoneType was given as a path"),
    "a number as a position": (
        lambda model, one: inspect.unwrap(spans_of)(None, [-1], {}, None),
        r"positions has -1 \(an int\), and a position is a name",
    ),
    "a text as a length": (
        lambda model, one: inspect.unwrap(steer)(model, one, "the one", max_new_tokens="4"),
        r"max_new_tokens is '4' \(a str\); give a whole number",
    ),
    "a text as the direction": (
        lambda model, one: inspect.unwrap(project_tokens)(model, "x", [1]), "a str was given as the direction; give"
    ),
    "lists for a study": (
        lambda model, one: ml.Select(model="m", out="x", harmful=["a"]),  # type: ignore[arg-type]
        "harmful is a list, and a study takes a file, a hub data set or a built-in set by its name; find_concept takes",
    ),
    "a model as its name": (
        lambda model, one: ml.Select(model=model, out="x"), r"^model is a \w+; it must be text( or a path)?$"
    ),
    "names of sets": (
        lambda model, one: inspect.unwrap(find_concept)(model, "harmful", "harmless"),
        r"'harmful' was given as the one prompt .* is ml\.builtin_prompts\('harmful'\)",
    ),
    "half a level": (
        lambda model, one: whole_numbers("levels", [1.5], "level"),
        r"levels has 1\.5 \(a float\); a level is a whole number",
    ),
    "activations to project": (
        lambda model, one: inspect.unwrap(ml.project)(collect(model, ["the one"]), one),
        r"project takes vectors, and this is an Activations; take acts\.at",
    ),
    "a tensor for a direction": (
        lambda model, one: inspect.unwrap(mean_difference)(torch.zeros(2, 2), "a", "b", 1, "last"),
        "a direction is found in what `collect` gives, and this is a Tensor",
    ),
    "one label twice": (
        lambda model, one: mean_difference(collect(model, ["the one"]), "a", "a", level=1, position="last"),
        "'a' was given as both labels; a direction needs two",
    ),
    "a file for prompts": (
        lambda model, one: inspect.unwrap(find_concept)(model, "tone.csv", ["the one"]),
        r"'tone.csv' was given as the one prompt of the positive side; .* are ml\.load_prompts\('tone.csv'\)",
    ),
    "lists for labels": (
        lambda model, one: inspect.unwrap(mean_difference)(
            collect(model, ["the one"]), ["the one"], ["the two"], level=1, position="last"
        ),
        r"^a list was given as a label; give the labels of both sides, .* ml\.find_concept takes lists",
    ),
    "a direction as an intervention": (
        lambda model, one: inspect.unwrap(ml.answer_under)(model, "the one", one, max_new_tokens=2),
        r"interventions is a Direction; say what is done with it, such as \[ml\.Ablate\(direction\)\]",
    ),
    "a word as a series": (
        lambda model, one: inspect.unwrap(ml.track)(model, "mine", ["x"]),
        r"the series is a str; give ml\.checkpoint_series\(base, checkpoints\), or have ml\.run\(ml\.Track",
    ),
    "a list of scores": (
        lambda model, one: inspect.unwrap(ml.auroc_estimate)([True], torch.zeros(1), ["a"]),
        "takes a tensor of scores, then one of bool",
    ),
    "few prompts to patch": (
        lambda model, one: prepare_compare(ml.Compare(first="a", second="b", patched=2, out="x")),
        "`patched` is 2, and nothing is said of fewer than 6 prompts",
    ),
    "labels that aren't there": (
        lambda model, one: mean_difference(collect(model, ["the one", "the two"]), "a", "b", level=1, position="last"),
        r"no prompt is labelled 'a', nor any other way; collect labelled ones, such as ml\.as_prompts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RAW)
def test_what_is_of_the_wrong_kind_is_a_sentence(what: str, model: Any, direction: Direction) -> None:
    call, said = RAW[what]
    with pytest.raises(UserError, match=said):
        call(model, direction)


def test_rows_that_look_like_pairs_are_warned_about_where_nobody_said_so() -> None:
    acts = ["steal", "burn", "hide", "break", "sell", "forge"]
    things = ["a car", "some old letters", "my neighbour's dog", "the bank's front door", "her diary", "one painting"]
    up = [Prompt(f"u{i}", f"How do I {act} {thing}?") for i, (act, thing) in enumerate(zip(acts, things, strict=True))]
    down = [Prompt(f"d{i}", f"How do I paint {thing}?") for i, thing in enumerate(things)]
    with pytest.warns(UserWarning, match=r"give --paired \(paired=True in Python\)"):
        warn_of_twins(up, down)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_twins(up, down[::-1])  # no pairs, row by row
        warn_of_twins(up, down[:-1])
        warn_of_twins(up, [replace(twin, family=one.group) for one, twin in zip(up, down, strict=True)])


def test_pairs_in_files_are_warned_about_where_no_column_numbers_them(tmp_path: Path) -> None:
    """Torn apart by the folds, they read an AUROC of .05 where chance is .5."""
    things = ["a car", "some old letters", "my neighbour's dog", "the bank's front door", "her diary", "one painting"]
    for name, verb in (("harmful", "steal"), ("harmless", "paint")):
        rows = [{"prompt": f"How do I {verb} {thing}?", "pair": str(i)} for i, thing in enumerate(things)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = Separate(
        harmful=str(tmp_path / "harmful.jsonl"), harmless=str(tmp_path / "harmless.jsonl"), n=None, out="x",
        model="smollm2",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="name it as the family column"):
        read_harm_sets(plan, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_harm_sets(replace(plan, family_column="pair"), [])


EMPTY: dict[str, Callable[[Any, TokenBatch], object]] = {
    "collect": lambda model, none: collect(model, none),
    "with answers": lambda model, none: collect(model, none, answers=[]),
    "answer": lambda model, none: answer(model, none, max_new_tokens=2),
    "replies": lambda model, none: number_replies(model, none),
    "under": lambda model, none: answer_under(model, none, [], max_new_tokens=2),
    "logits": lambda model, none: logits_under(model, none, []),
    "log-probabilities": lambda model, none: answer_log_probs(model, list(none.prompts), []),
}


@pytest.mark.parametrize("what", EMPTY)
def test_no_prompts_are_no_traceback_whatever_is_done_with_them(what: str, model: Any) -> None:
    none = tokenize(["the thing"], template_of(model)).select([])
    with pytest.raises(UserError, match=r"^there are no prompts; give at least one$"):
        EMPTY[what](model, none)


def acts_of(model: Any) -> Activations:
    return collect(model, [Prompt(f"p{i}", f"the {i}", label="ab"[i % 2]) for i in range(8)])


@pytest.fixture(scope="module")
def direction(model: Any) -> Direction:
    return mean_difference(acts_of(model), "a", "b", level=1, position="last")


def shout(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
    return ["refused" if len(answer) % 2 else "accepted" for answer in answers]


def test_a_function_is_a_judge_and_what_is_none_is_named(model: Any) -> None:
    prompts = as_prompts(["the one", "the other"])
    said = answer(model, prompts, max_new_tokens=2)
    judged = judge_answers(prompts, said, shout)
    assert judged.verdicts == {"shout": tuple(shout(prompts, said.texts))}
    assert list(judge_answers(prompts, said, [shout, "zhao", PHRASES]).verdicts) == ["shout", "zhao", "phrases"]
    assert list(judge_answers(prompts, said, PHRASES).verdicts) == ["phrases"]
    for given, words in (
        (3, r"an int was given as the judge; give a name \(phrases, "),
        (HumanLabels, "the class HumanLabels was given as the judge"),
        ([shout, shout], "two of the judges are called 'shout'"),
        ([], "there is no judge"),
        (lambda prompts, answers: 3, "gave an int, not a verdict on each answer"),
    ):
        with pytest.raises(UserError, match=words):
            inspect.unwrap(judge_answers)(prompts, said, given)


@pytest.mark.parametrize("given", ["0.5", ["0.5"], None, []])
def test_strengths_are_numbers(given: Any, model: Any, direction: Direction) -> None:
    with pytest.raises(UserError, match="give a number or a list of numbers"):
        inspect.unwrap(steer)(model, direction, "the thing", strengths=given)


def test_what_holds_a_direction_is_opened_first(model: Any) -> None:
    with pytest.raises(UserError, match=r"a str was given .* direction = ml\.open\('runs/one\.safetensors'\)"):
        inspect.unwrap(steer)(model, "runs/one.safetensors", "the thing")


@pytest.mark.parametrize("plan", [{}, {"seed": 1}, DetectionPlan])
def test_a_plan_is_a_plan(plan: Any, model: Any) -> None:
    with pytest.raises(UserError, match=r"was given as the plan; give a DetectionPlan, such as ml\.DetectionPlan\("):
        inspect.unwrap(find_concept)(model, ["the one"], ["the other"], plan=plan)


def test_a_direction_of_another_width_names_both_models(model: Any, direction: Direction) -> None:
    other = replace(direction, vector=direction.vector[:31], checkpoint=replace(direction.checkpoint, name="larger"))
    with pytest.raises(UserError, match=r"31 numbers \(from larger\) and a vector of this model \(tiny-llama\) has 32"):
        steer(model, other, "the thing", strengths=1.0, unit="raw")


def test_a_count_of_one_is_one() -> None:
    assert (many(1, "prompt"), many(0, "prompt"), many(2, "prompt")) == ("1 prompt", "0 prompts", "2 prompts")
    assert (kind_of(3), kind_of("x"), kind_of(DetectionPlan)) == ("an int", "a str", "the class DetectionPlan")


MISWRITTEN: dict[str, tuple[Callable[[], object], str]] = {
    "misspelt": (lambda: Separate(out="x", jugde="zhao"), r"Separate has no option 'jugde' \(did you mean 'judge'\?\)"),
    "a plan's": (lambda: DetectionPlan(sed=1), r"DetectionPlan has no option 'sed' \(did you mean 'seed'\?\)"),
    "missing": (
        lambda: Track(),
        r"Track needs out and checkpoints; .* such as Track\(out=\.\.\., ch",
    ),
    "unnamed": (lambda: Track("runs/mine"), "Track takes its options by name"),
    "of another type": (lambda: Separate(out="x", n="6"), r"n is '6' \(a str\); it must be a whole number"),
    "nothing at all": (lambda: Track(out="x", checkpoints=(), steered=None), r"steered is None \(a NoneType\)"),
    "true": (lambda: Track(out="x", checkpoints=(), steered=True), "steered is True"),
    "unknown word": (lambda: Separate(out="x", dtype="float23"), r"no dtype 'float23' \(did you mean 'float32'\?\)"),
    "a class": (lambda: study_of(Track), r"the class Track alone says no options; .* ml\.Track\(out=\.\.\., "),
    "a name": (lambda: study_of("select"), r"the name 'select' alone says no options; .* ml\.Select\(out=\.\.\.\)"),
    "nothing": (lambda: study_of(None), "a NoneType is no study's configuration; give one, such as ml.Separate"),
}


@pytest.mark.parametrize("what", MISWRITTEN)
def test_a_configuration_says_what_is_wrong_with_it_where_it_is_written(what: str) -> None:
    write, words = MISWRITTEN[what]
    with pytest.raises(UserError, match=words):
        write()


def test_one_item_where_several_are_taken_is_that_item() -> None:
    whole = Track(out="x", checkpoints=("a/folder",), positions=("last",), levels=(3,))
    assert Track(out="x", checkpoints="a/folder", positions="last", levels=3) == whole
    assert Track(out="x", checkpoints=["a/folder"], positions=["last"], levels=[3]) == whole
    assert CausalPlan(strengths=0.5).strengths == (0.5,)
    assert Separate(out="x", n=np.int64(6), template_arg="a=1").template_arg == ("a=1",)


def test_a_configuration_is_still_an_ordinary_dataclass() -> None:
    one = Track(out="x", checkpoints="a/folder")
    assert copy.deepcopy(one) == replace(one, seed=0) == one
    assert set(inspect.signature(ml.Track).parameters) == {field.name for field in fields(Track)}


def test_a_plan_with_places_keeps_them() -> None:
    assert PatchPlan("z", (1,), "last") == PatchPlan(site="z", layers=1, positions=("last",))
    with pytest.raises(UserError, match="PatchPlan needs site"):
        PatchPlan(layers=1)
    with pytest.raises(TypeError, match="multiple values"):
        PatchPlan("z", site="z")


def test_every_configuration_that_is_written_in_python_says_so() -> None:
    assert [study.config for study in studies().values() if not issubclass(study.config, Options)] == []


def test_an_error_names_options_as_its_reader_writes_them(capfd: pytest.CaptureFixture[str]) -> None:
    error = UserError("it can't go on; leave it out with --skip-broken, or '--this' `mechlens x --that`, --n 3")
    assert error.typed.count("--") == 4
    assert str(error) == ("it can't go on; leave it out with `skip_broken`, or '--this' `mechlens x --that`, `n` 3")
    both = "pass --force (force=True in Python)"
    assert str(UserError(both)) == UserError(both).typed == both
    with pytest.raises(UserError, match=r"^`resamples` must be at least 1, and is 0$"):
        require_ranges(DetectionPlan(resamples=0))
    with pytest.raises(SystemExit):
        main(["direction", "--positive", "harmful", "--negative", "harmless", "--n", "0", "--out", "x"])
    assert capfd.readouterr().err == "mechlens: --n must be at least 1, and is 0\n"


def test_arguments_in_another_order_are_said_in_one_sentence(model: Any) -> None:
    for given in ((["a"], ["b"], model), (["a"], model, ["b"])):
        with pytest.raises(UserError, match=r"^the model comes first, and a list was given there"):
            inspect.unwrap(find_concept)(*given)
