"""The guard as an Inspect scorer says of a sample what the guard says of its prompt.

Inspect itself is on the path only where `scripts/conformance` puts it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny import words

import mechlens as ml
from mechlens.methods.activations.collect import collect
from mechlens.prompts.prompt import Prompt


@pytest.fixture(scope="module")
def inspect_ai() -> Any:
    if os.environ.get("MECHLENS_CONFORMANCE"):
        import inspect_ai
    else:
        inspect_ai = pytest.importorskip("inspect_ai", exc_type=ImportError)
    return inspect_ai


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def guard(model: Any) -> Any:
    prompts = [
        Prompt(f"{label}{i}", f"{text} {mark}", label=label)
        for i, text in enumerate(words(12)) for label, mark in (("harmful", "XXXX"), ("harmless", "mmmm"))
    ]  # fmt: skip
    return ml.GuardEstimator(max_fpr=0.2, folds=2).fit(collect(model, prompts))


def evaluated(inspect_ai: Any, scorer: Any, samples: list[Any], folder: Path) -> Any:
    from inspect_ai.dataset import MemoryDataset
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    # Without their usage, tokens would be counted by a file from the internet.
    usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    outputs = [ModelOutput.from_content("mockllm/model", "Hello.") for _ in samples]
    for one in outputs:
        one.usage = usage
    model = get_model("mockllm/model", custom_outputs=outputs)
    (log,) = inspect_ai.eval(
        inspect_ai.Task(dataset=MemoryDataset(samples), scorer=scorer), model=model, log_dir=str(folder), display="none"
    )
    return log


def asked(texts: list[str], targets: list[str]) -> list[Any]:
    from inspect_ai.dataset import Sample

    return [
        Sample(input=text, target=target, id=i) for i, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]


def test_it_says_of_each_sample_what_the_guard_says(inspect_ai: Any, guard: Any, model: Any, tmp_path: Path) -> None:
    texts = [f"{text} {mark}" for text in words(4) for mark in ("XXXX", "mmmm")]
    said = guard(model, texts)
    flags = [one.harmful for one in said]
    assert 0 < sum(flags) < len(flags)
    targets = ["harmful", "Harmless"] * 4
    log = evaluated(inspect_ai, ml.guard_scorer(model, guard), asked(texts, targets), tmp_path)
    assert log.status == "success", log.error
    right = [flag == (target == "harmful") for flag, target in zip(flags, targets, strict=True)]
    (found,) = log.results.scores
    assert found.metrics["accuracy"].value == pytest.approx(sum(right) / len(right))
    for sample, one, good in zip(log.samples, said, right, strict=True):
        score = sample.scores["latent_guard"]
        assert (score.value, score.answer) == ("C" if good else "I", "harmful" if one.harmful else "harmless")
        assert score.metadata == pytest.approx({"score": one.score, "probability": one.probability}, rel=1e-3)
    # All samples of one class, whatever their targets are.
    log = evaluated(inspect_ai, ml.guard_scorer(model, guard, label="harmful"), asked(texts, ["x"] * 8), tmp_path)
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(flags) / len(flags))


def test_messages_are_read_as_a_prompt(inspect_ai: Any, guard: Any, model: Any, tmp_path: Path) -> None:
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    turns = [("system", "Be brief."), ("user", "the thing"), ("assistant", "a"), ("user", "in the XXXX")]
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    sample = Sample(input=[kinds[role](content=text) for role, text in turns], target="harmful")
    log = evaluated(inspect_ai, ml.guard_scorer(model, guard), [sample], tmp_path)
    (one,) = guard(model, [[{"role": role, "content": text} for role, text in turns]])
    assert log.samples[0].scores["latent_guard"].metadata["score"] == pytest.approx(one.score, rel=1e-3)


def test_a_target_that_says_nothing_is_told(inspect_ai: Any, guard: Any, model: Any, tmp_path: Path) -> None:
    log = evaluated(inspect_ai, ml.guard_scorer(model, guard), asked(["the"], ["42"]), tmp_path)
    assert log.status == "error"
    assert "the target of sample 0 is '42', and the guard tells harmful from harmless" in log.error.message


def test_what_is_no_label_is_told_before_inspect_is_asked_for(guard: Any, model: Any) -> None:
    with pytest.raises(ml.UserError, match="the guard tells harmful from harmless; give one of them"):
        ml.guard_scorer(model, guard, label="bad")
