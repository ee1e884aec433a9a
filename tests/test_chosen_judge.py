"""`--judge`: the judge that was chosen places the quadrants, and what follows from them, in every study."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from saved import requests, save_model, write_prompts

from mechlens.choices import JUDGES
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.behaviour.chosen_judge import judge_of, judges_of, verdicts_by
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.prompts.prompt import Prompt
from mechlens.registry import Choice

OTHER = {"refused": "accepted", "accepted": "refused"}
QUICK = ["--resamples", "20", "--max-new-tokens", "2", "--wandb.mode", "disabled"]
NULLS = ["--permutations", "3", "--random-directions", "2"]


@dataclass(frozen=True)
class Contrary:
    """Says the other thing."""

    name: str = "contrary"

    def __call__(self, prompts, answers):
        return [OTHER.get(verdict, verdict) for verdict in PHRASES(prompts, answers)]


CONTRARY = Contrary()
COMMANDS = {
    "separate": ["separate", "--extra-harmless", "None", *NULLS],
    "guard fit": ["guard", "fit", "--extra-harmless", "None", "--max-fpr", "0.2", *NULLS],
}


@pytest.fixture(autouse=True)
def contrary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES.ours, "contrary", Choice("test_chosen_judge:CONTRARY", "the other thing"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
def test_it_places_the_quadrants(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = str(save_model(tmp_path / "model"))
    sets = ["--harmful", write_prompts(tmp_path / "h.jsonl", requests(24, "break")),
            "--harmless", write_prompts(tmp_path / "l.jsonl", requests(24, "bake"))]  # fmt: skip
    command = [*COMMANDS[name], "--model", model, *sets, *QUICK]
    tables = {}
    for judge in ("phrases", "contrary"):
        main([*command, "--judge", judge, "--out", str(tmp_path / judge)])
        tables[judge] = pd.read_parquet(tmp_path / judge / "tables" / "answers.parquet")
    ours, others = (tables[judge].set_index("id") for judge in tables)
    assert list(others["verdict_contrary"]) == [OTHER.get(verdict, verdict) for verdict in ours["verdict_phrases"]]
    for frame, column in ((ours, "verdict_phrases"), (others, "verdict_contrary")):
        said = [quadrant.split("_")[0] for quadrant in frame["quadrant"]]
        assert said == list(frame[column])
    assert set(ours["verdict_phrases"]) >= set(OTHER)  # else it would show nothing
    for published in ("verdict_arditi", "verdict_zhao"):
        assert list(ours[published]) == list(others[published])


@pytest.mark.filterwarnings("ignore")
def test_a_model_stands_beside_the_phrase_lists(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = str(save_model(tmp_path / "model"))
    sets = ["--harmful", write_prompts(tmp_path / "h.jsonl", requests(24, "break")),
            "--harmless", write_prompts(tmp_path / "l.jsonl", requests(24, "bake"))]  # fmt: skip
    command = [*COMMANDS["separate"], "--model", model, *sets, *QUICK]
    main([*command, "--out", str(tmp_path / "alone")])
    main([*command, "--judge-model", model, "--out", str(tmp_path / "both")])
    alone, both = (pd.read_parquet(tmp_path / name / "tables" / "answers.parquet") for name in ("alone", "both"))
    assert list(alone["quadrant"]) == list(both["quadrant"])
    assert set(both.columns) - set(alone.columns) == {"verdict_model"}
    assert set(both["verdict_model"]) == {"unclear"}  # random weights say neither yes nor no
    agreed = pd.read_parquet(tmp_path / "both" / "tables" / "agreement.parquet")
    assert {("phrases", "model"), ("arditi", "model"), ("zhao", "model")} <= set(
        zip(agreed["judge"], agreed["other"], strict=True)
    )


def test_both_published_lists_stand_beside_it_once() -> None:
    names = {name: [judge.name for judge in judges_of(name)] for name in ("phrases", "zhao", "contrary")}
    assert names == {
        "phrases": ["phrases", "arditi", "zhao"], "zhao": ["zhao", "arditi"], "contrary": ["contrary", "arditi", "zhao"]
    }  # fmt: skip


def test_an_unknown_judge_is_said_with_the_nearest(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no judge 'phrase' \(did you mean 'phrases'\?\); choose from phrases, arditi"):
        judge_of("phrase")
    with pytest.raises(SystemExit):
        main(["separate", "--judge", "phrase", "--out", str(tmp_path / "out")])
    assert capfd.readouterr().err.startswith("mechlens: there is no judge 'phrase'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verdicts", "said"), [(["refused"], "1 verdicts on 2 answers"), (["refused", "no"], "the verdict 'no'")]
)
def test_a_judge_owes_one_known_verdict_to_each(verdicts: list[str], said: str) -> None:
    class Careless(Contrary):
        def __call__(self, prompts, answers):
            return verdicts

    with pytest.raises(UserError, match=said):
        verdicts_by(replace(Careless(), name="careless"), [Prompt("a", "x"), Prompt("b", "y")], ["I cannot", "Yes"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--judge-model", "/no/such/model"], "there is no folder '/no/such/model'"),
        (["--template-arg", "enable_thinking"], "isn't of the form NAME=VALUE"),
        (["--template-arg", "a=1", "--template-arg", "a=2"], "gives 'a' twice"),
    ],
)
def test_a_slip_is_said_before_any_weights_are_read(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mechlens.methods.kept_model.load", lambda *a, **k: pytest.fail("read the weights"))
    sets = ["--harmful", write_prompts(tmp_path / "h.jsonl", requests(12, "break")),
            "--harmless", write_prompts(tmp_path / "l.jsonl", requests(12, "bake"))]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([*COMMANDS["separate"], *sets, *QUICK, *given, "--out", str(tmp_path / "out")])
    assert stopped.value.code == (2 if "must be at least" in said else 1)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
