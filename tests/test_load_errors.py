"""What is wrong with a source is said in one sentence with file, row and column."""

import os
import stat
from pathlib import Path

import pytest

from mechlens.errors import UserError
from mechlens.prompts.files.load import load_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BROKEN = [
    ("a.json", '[{"prompt": "x"}, {"prompt": null}]', r"a\.json row 2, column 'prompt', has no value"),
    ("a.json", '[{"prompt": "x"}, {"other": "y"}]', r"a\.json row 2, column 'prompt', has no value"),
    ("a.json", '[{"prompt": "x"}, {"prompt": 7}]', r"a\.json row 2, column 'prompt', holds an int \(7\)"),
    ("a.json", '[{"prompt": NaN}]', r"row 1, column 'prompt', has no value"),
    ("a.json", '[{"prompt": ["x"]}]', r"row 1, column 'prompt', holds a list of other things than chat turns"),
    ("a.json", '["x", " \\n"]', r"a\.json row 2, column 'text', is empty"),
    ("a.json", '["\\ud83d"]', r"row 1, column 'text', holds half a character"),
    ("a.json", '["x", 3]', r"a\.json row 2 is an int; every row must be an object or a string"),
    ("a.json", '[{"prompt": "x"},\n {"prompt" "y"}]', r"a\.json line 2 is not valid JSON"),
    ("a.json", '{"prompt": "x"}\n{"prompt": "y"\n', r"a\.json row 2 is not valid JSON .*correct that line"),
    ("a.json", '{"prompt": ["x", "y"]}', r"a\.json holds one object with a list under 'prompt'"),
    ("a.json", '{"c": {"s": "x"}}', r"a\.json has a str under 'c' / 's'; it needs a list of questions"),
    ("a.json", "17", r"a\.json holds a single int"),
    ("a.json", "[]", r"a\.json is empty; it needs at least one prompt"),
    ("a.json", "[" + "9" * 5000 + "]", r"a\.json holds a whole number of thousands of digits"),
    (
        "a.jsonl",
        '{"prompt": "x", "n": ' + "9" * 5000 + "}",
        r"a\.jsonl row 1 holds a whole number of thousands of digits",
    ),
    ("a.json", "[" * 100_000, r"a\.json is nested too deeply"),
    ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": }\n', r"a\.jsonl row 3 is not valid JSON"),
    ("a.jsonl", "", r"a\.jsonl is empty"),
    ("a.txt", " \n\n", r"a\.txt is empty"),
    ("a.csv", "prompt,label\n", r"a\.csv is empty"),
    ("a.csv", "prompt,label\nx,1\n,0\n", r"a\.csv row 2, column 'prompt', is empty"),
    ("a.csv", "prompt,label\nx,1\nyes, please,0\n", r"a\.csv row 2 has 3 cells where the header has 2; put quotes"),
    ("a.csv", 'prompt,label\nx,1\n"y,0\n', r"a\.csv row 2 is not valid CSV"),
    ("a.csv", "prompt,prompt\nx,y\n", r"a\.csv has the column 'prompt' twice"),
    ("a.csv", "prompt\nx\ncaf\u00e9\n".encode("latin-1"), r"a\.csv line 3 is not UTF-8 \(byte 0xe9\)"),
    ("a.txt", "caf\u00e9".encode("utf-16"), r"a\.txt line 1 is not UTF-8"),
    ("a.parquet", "no parquet", r"a\.parquet is not a readable parquet file"),
    ("a.yaml", "- x", r"a\.yaml has an unknown ending; give \.json, \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BROKEN)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json could not be read \(No such file"):
        load_prompts(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder; give one data file inside it"):
        load_prompts(str(tmp_path))
    path = write(tmp_path / "locked.json", '["x"]')
    path.chmod(stat.S_IWUSR)
    if not os.access(path, os.R_OK):  # root reads everything
        with pytest.raises(UserError, match=r"locked\.json could not be read \(Permission denied"):
            load_prompts(path)


def test_choices_that_make_no_sense(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,y,f\nx,1,\n")
    with pytest.raises(UserError, match="both label= and label_column="):
        load_prompts(path, label="a", label_column="y")
    with pytest.raises(UserError, match=r"a\.csv row 1, column 'f', has no value"):
        load_prompts(path, family_column="f")
    for sample in (0, 2):
        with pytest.raises(UserError, match=f"a sample of {sample} was asked for, but .* has 1 prompt"):
            load_prompts(path, sample=sample)
    with pytest.raises(UserError, match="only hub data sets have splits"):
        load_prompts(path, split="train")
    with pytest.raises(UserError, match="the built-in set 'benign' has no columns"):
        load_prompts("benign", column="text")
    with pytest.raises(UserError, match="'harmful' if you meant that"):
        load_prompts("harmfull")
    with pytest.raises(UserError, match="there is no file or built-in set 'How do I"):
        load_prompts("How do I bake a cake? " * 300)
