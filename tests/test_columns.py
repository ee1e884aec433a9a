"""Files as people have them: any column, and one file that holds both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.settings import PromptSets
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.direction.study import _sides
from mechlens.studies.possible import require_possible
from mechlens.studies.separate.config import Separate
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import read_prompts

ROWS = [("Dear Sir, one", "formal"), ("hey one", "casual"), ("Dear Sir, two", "formal"), ("hey two", "casual")]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"request": text, "tone": tone}) for text, tone in ROWS))
    return str(path)


def asked(tmp_path: Path, **options: Any) -> FindDirection:
    return FindDirection(**({"positive": "formal", "negative": "casual", "out": tmp_path} | options))


def test_one_file_holds_both_sides(file: str, tmp_path: Path) -> None:
    config = asked(tmp_path, data=file, label_column="tone", column="request")
    positive = read_prompts(config.positive, "positive", config)
    assert [prompt.text for prompt in positive] == ["Dear Sir, one", "Dear Sir, two"]
    assert {prompt.label for prompt in positive} == {"positive"}
    negative = read_prompts(config.negative, "negative", config)
    assert [prompt.id for prompt in negative] == ["mine-0002", "mine-0004"]


def test_a_column_says_what_belongs_together(file: str, tmp_path: Path) -> None:
    config = asked(tmp_path, data=file, label_column="tone", column="request", family_column="tone")
    assert {prompt.family for prompt in read_prompts(config.positive, "positive", config)} == {"formal"}
    config = asked(tmp_path, positive=f"{file}+benign", column="request", family_column="tone", n=3)
    families = [prompt.family for prompt in read_prompts(config.positive, "positive", config)]
    assert set(families[:3]) == {"formal", "casual"}
    assert not {"formal", "casual"} & set(families[3:])


def test_rows_are_pairs_whatever_is_drawn_of_them(tmp_path: Path) -> None:
    for side in "ab":
        (tmp_path / f"{side}.txt").write_text("".join(f"{side} of topic {i}\n" for i in range(20)))
    config = asked(tmp_path, positive=str(tmp_path / "a.txt"), negative=str(tmp_path / "b.txt"), paired=True, n=7)
    positive, negative = _sides(config)
    assert [one.text.replace("a of", "b of") for one in positive] == [one.text for one in negative]
    assert [one.group for one in positive] == [one.group for one in negative]
    assert len({one.group for one in positive}) == 7
    (tmp_path / "b.txt").write_text("only one\n")
    with pytest.raises(UserError, match=r"20 positive and 1 negative prompts; --paired \(paired=True\) needs equally"):
        _sides(config)


def test_the_sets_of_a_study_too_and_further_prompts_from_elsewhere(file: str, tmp_path: Path) -> None:
    config = Separate(
        data=file, label_column="tone", column="request", harmful="formal", harmless="casual", out=tmp_path, n=2
    )
    sets = read_harm_sets(config, [], "benign")
    assert [len(prompts) for prompts in (sets.harmful, sets.harmless, sets.extra)] == [2, 2, 2]


def test_a_column_is_of_files_and_not_of_built_in_sets(file: str, tmp_path: Path) -> None:
    config = asked(tmp_path, positive=file, negative="benign", column="request")
    assert len(read_prompts(config.positive, "positive", config)) == 4
    assert len(read_prompts(config.negative, "negative", config)) > 4


def test_a_text_file_has_no_columns_beside_a_file_that_has_some(file: str, tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_text("one\ntwo\n")
    plain = str(tmp_path / "ok.txt")
    config = asked(tmp_path, positive=f"{file}+{plain}", negative=plain, column="request", family_column="tone")
    with pytest.warns(UserWarning, match=r"ok.txt has no columns, so each of its lines is a family of its own; column"):
        mixed = read_prompts(config.positive, "positive", config)
    assert [prompt.text for prompt in mixed] == [*(text for text, _ in ROWS), "one", "two"]
    with pytest.warns(UserWarning, match="has no columns"):
        assert [prompt.text for prompt in read_prompts(config.negative, "negative", config)] == ["one", "two"]
    require_possible(config)


@pytest.mark.parametrize("option", ["column", "family_column"])
def test_a_column_of_nothing_is_refused(option: str, tmp_path: Path) -> None:
    for name in ("ok.txt", "no.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    plain = {"positive": f"harmful+{tmp_path / 'ok.txt'}", "negative": str(tmp_path / "no.txt")}
    with pytest.raises(UserError, match=f"`{option}` was given, and none of harmful, .*ok.txt, .*no.txt has columns"):
        require_possible(asked(tmp_path, **plain, **{option: "q"}))
    with pytest.raises(UserError, match=r"`label_column` was given, and none of .*ok.txt has columns"):
        require_possible(asked(tmp_path, data=str(tmp_path / "ok.txt"), label_column="tone"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"column": "reqest", "label_column": "tone"}, "has no column 'reqest'; did you mean 'request'"),
        ({"column": "request", "label_column": "tne"}, "has no column 'tne'; did you mean 'tone'"),
        ({"label_column": "tone"}, "none of the usual prompt columns .* name one with --column"),
        ({"column": "request"}, "`data` was given without `label_column`"),
        ({"column": "request", "data": None, "label_column": "tone"}, "`label_column` was given without `data`"),
        (
            {"column": "request", "label_column": "tone", "positive": "formel"},
            "has no row with tone='formel'; column 'tone' holds 'formal', 'casual'",
        ),
    ],
)
def test_what_the_file_does_not_hold_is_said(file: str, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    def read() -> None:
        config = asked(tmp_path, **({"data": file} | options))
        read_prompts(config.positive, "positive", config)

    with pytest.raises(UserError, match=says):
        read()


def test_old_configurations_have_none_of_it() -> None:
    assert (PromptSets().column, PromptSets().data, PromptSets().label_column) == (None, None, None)


def test_the_command_line_says_the_nearest_column(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = ["--positive", "formal", "--negative", "casual", "--label-column", "tome", "--column", "request"]
    with pytest.raises(SystemExit):
        main(["direction", "--data", file, *sides, "--out", str(tmp_path / "out")])
    assert "did you mean 'tone'?" in capsys.readouterr().err.replace("\n", " ")
