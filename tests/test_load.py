"""Prompts are read as they stand, and their ids stay."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from mechlens.errors import UserError
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.files.load import joined_sources, load_prompts
from mechlens.studies.separate.config import Separate
from mechlens.studies.shared.inputs import read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(source: str | Path, **choices: object) -> list[str]:
    return [prompt.text for prompt in load_prompts(source, **choices)]


ODD = ['say "hi", please', "two\nlines", "naïve café ☕ 日本語 مرحبا", "x" * 20_000, "one\u2028line", " spaced "]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _formats() -> dict[str, str]:
    objects = [{"prompt": text, "note": None} for text in ODD]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    return {
        "list.json": json.dumps(objects),
        "strings.json": json.dumps(ODD),
        "lines.jsonl": lines,
        "lines.json": lines,
        "strings.jsonl": "".join(json.dumps(text) + "\n" for text in ODD),
        "table.csv": "prompt,note\n" + "".join(f"{_quoted(text)},\n" for text in ODD),
        "table.tsv": "note\tprompt\n" + "".join(f"\t{_quoted(text)}\n" for text in ODD),
    }


@pytest.mark.parametrize("name", _formats())
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_back_the_very_text(tmp_path: Path, name: str, bom: bytes) -> None:
    assert texts(write(tmp_path / name, bom + _formats()[name].encode())) == ODD


def test_a_table_of_excel_in_europe(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt;y\n"one; two, three";a\nfour;b\n')
    assert [(one.text, one.label) for one in load_prompts(path, label_column="y")] == [
        ("one; two, three", "a"),
        ("four", "b"),
    ]


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json", "table.csv"])
def test_windows_line_ends_change_nothing(tmp_path: Path, name: str) -> None:
    odd = [text for text in ODD if "\n" not in text]
    objects = "".join(json.dumps({"prompt": text}) + "\r\n" for text in odd)
    table = "prompt\r\n" + "".join(_quoted(text) + "\r\n" for text in odd)
    assert texts(write(tmp_path / name, table if name.endswith("csv") else objects)) == odd


def test_parquet_and_plain_text(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"goal": ODD, "label": [1, 0, 1, 0, 1, 0]}).to_parquet(tmp_path / "p.parquet")
    prompts = load_prompts(tmp_path / "p.parquet", label_column="label")
    assert [prompt.text for prompt in prompts] == ODD
    assert [prompt.label for prompt in prompts] == ["1", "0", "1", "0", "1", "0"]
    plain = load_prompts(write(tmp_path / "p.txt", "first?\r\n\r\nsecond\u2028half\n"))
    assert [(prompt.id, prompt.text) for prompt in plain] == [("p-0001", "first?"), ("p-0003", "second\u2028half")]


def test_the_usual_columns_in_their_order(tmp_path: Path) -> None:
    names = ["instruction", "prompt", "question", "goal", "text", "bad_q"]
    for place in range(len(names)):
        row = {name: f"in {name}" for name in reversed(names[place:])}
        assert texts(write(tmp_path / "a.json", json.dumps([row]))) == [f"in {names[place]}"]
    assert texts(write(tmp_path / "a.json", '[{"Category": "c", "Question": "capital"}]')) == ["capital"]
    path = write(tmp_path / "b.csv", "id,query,answer\n1,hello,x\n")
    with pytest.raises(UserError, match=r"b\.csv has none of the usual.*'id', 'query', 'answer'; name one"):
        load_prompts(path)
    assert texts(path, column="query") == ["hello"]
    with pytest.raises(UserError, match=r"b\.csv has no column 'quer'; did you mean 'query'\? it has 'id', 'query'"):
        load_prompts(path, column="quer")


def test_nested_catqa_keeps_its_categories(tmp_path: Path) -> None:
    nested = {"Fraud": {"Tax": ["a?", "b?"], "Bank": ["c?"]}, "Malware": {"Virus": ["d?"]}}
    prompts = load_prompts(write(tmp_path / "cat.json", json.dumps(nested)), family_column="subcategory")
    assert [prompt.category for prompt in prompts] == ["Fraud", "Fraud", "Fraud", "Malware"]
    assert [prompt.family for prompt in prompts] == ["Tax", "Tax", "Bank", "Virus"]
    assert prompts[2].id == "cat-0003"


def test_alpaca_input_follows_its_instruction_unless_the_column_is_named(tmp_path: Path) -> None:
    rows = [{"instruction": "Sum up", "input": "A tale."}, {"instruction": "Sing", "input": ""}]
    path = write(tmp_path / "a.json", json.dumps(rows))
    assert texts(path) == ["Sum up\nA tale.", "Sing"]
    assert texts(path, column="instruction") == ["Sum up", "Sing"]
    assert texts(path, where={"input": ""}) == ["Sing"]


def test_chat_messages_ask_the_last_user_turn(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (prompt,) = load_prompts(write(tmp_path / "chat.jsonl", json.dumps(row)))
    assert (prompt.text, prompt.system) == ("Why?", "Be brief.")
    assert prompt.history == (("user", "Hi"), ("assistant", "Hello"))
    (prompt,) = load_prompts(tmp_path / "chat.jsonl", system="Other.")
    assert prompt.system == "Other."
    path = write(tmp_path / "none.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}')
    with pytest.raises(UserError, match=r"none\.jsonl row 1, column 'messages', has no turn of the user"):
        load_prompts(path)


def test_ids_stay_whatever_is_filtered_or_sampled(tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": f"prompt {number}", "kind": "ab"[number % 2]} for number in range(40)]
    path = write(tmp_path / "set.json", json.dumps(rows))
    full = {prompt.id: prompt for prompt in load_prompts(path)}
    assert list(full)[:3] == ["0", "1", "2"]
    part = load_prompts(path, where={"kind": "a"}, sample=5, seed=3)
    assert all(full[prompt.id] == prompt for prompt in part)
    rows[0]["id"] = 1
    twice = load_prompts(write(tmp_path / "set.json", json.dumps(rows)), where={"kind": "b"})
    assert [prompt.id for prompt in twice][:2] == ["set-0002", "set-0004"]


def test_samples_repeat_with_their_seed_and_nest() -> None:
    ten, again, twenty = (load_prompts("harmful", sample=n, seed=1) for n in (10, 10, 20))
    assert ten == again
    assert set(ten) < set(twenty)
    assert len({prompt.category for prompt in ten}) >= 4  # drawn from the whole set, which is sorted by category
    assert ten != load_prompts("harmful", sample=10, seed=2)
    # The two sides of the built-in pairs draw the same pairs, so a sample stays matched.
    assert [p.family for p in ten] == [p.family for p in load_prompts("harmless", sample=10, seed=1)]


def test_where_compares_as_text_and_says_what_there_is(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "safe": True, "n": 1}, {"prompt": "b", "safe": False, "n": None}]
    path = write(tmp_path / "w.json", json.dumps(rows))
    assert texts(path, where={"safe": "true"}) == texts(path, where={"safe": True, "n": "1"}) == ["a"]
    assert texts(path, where={"n": ""}) == ["b"]
    with pytest.raises(UserError, match=r"w\.json has no row with safe='yes'; column 'safe' holds 'true', 'false'"):
        load_prompts(path, where={"safe": "yes"})
    with pytest.raises(UserError, match=r"w\.json has no column 'sure'; it has 'prompt', 'safe', 'n'"):
        load_prompts(path, where={"sure": ""})


def test_filtered_rows_may_be_broken(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", '[{"prompt": "", "use": "no"}, {"prompt": "fine", "use": "yes"}]')
    assert texts(path, where={"use": "yes"}) == ["fine"]


def test_duplicates_are_dropped_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "Make a cake!\nmake  a CAKE\nBake it\nMake a cake\n???\n!!!\n")
    with pytest.warns(UserWarning, match=r"d\.txt: dropped 2 prompts equal to an earlier one \(rows 2, 4\)$"):
        assert texts(path) == ["Make a cake!", "Bake it", "???", "!!!"]
    path = write(tmp_path / "d.csv", "text,y\nHi,good\nhi!,bad\n")
    with pytest.warns(UserWarning, match=r"dropped 1 prompt .*\(row 2\), 1 of them under another label"):
        load_prompts(path, label_column="y")


def test_different_prompts_are_not_taken_for_duplicates(tmp_path: Path) -> None:
    asked = ["What is 3-5?", "What is 3/5?", "What is 3*5?", "Write it in C#", "Write it in C", "Write it in C++"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(write(tmp_path / "d.txt", "\n".join(asked))) == asked


def test_builtin_sets_take_labels_filters_and_systems() -> None:
    prompts = load_prompts("benign", label="plain", system="Be kind.", sample=3)
    assert {(prompt.label, prompt.system) for prompt in prompts} == {("plain", "Be kind.")}
    category = load_prompts("harmful")[0].category
    assert {prompt.category for prompt in load_prompts("harmful", where={"category": category})} == {category}


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str | None) -> object:
        asked.append((name, config, split))
        if name == "no/net":
            raise ConnectionError("Couldn't reach 'no/net' on the Hub\nmore")
        part = datasets.Dataset.from_dict({"Goal": ["x", "y"], "Category": ["c", "d"]})
        if split is not None:
            return part
        return datasets.DatasetDict({"train": part} if name == "one/split" else {"harmful": part, "benign": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("mechlens.hub.why_not", lambda: "")  # the hub answers
    prompts = load_prompts("JBB/Behaviors:behaviors", split="harmful")
    assert asked == [("JBB/Behaviors", "behaviors", "harmful")]
    assert [(prompt.id, prompt.text, prompt.category) for prompt in prompts] == [
        ("Behaviors-0001", "x", "c"),
        ("Behaviors-0002", "y", "d"),
    ]
    assert prompts[0].source == "JBB/Behaviors:behaviors"
    assert len(load_prompts("one/split")) == 2
    with pytest.raises(UserError, match="has the splits harmful, benign; choose one with split="):
        load_prompts("two/splits")
    with pytest.raises(UserError, match=r"no/net is no file here .*\(Couldn't reach 'no/net' on the Hub\); check"):
        load_prompts("no/net")


def test_a_plus_joins_sources_and_may_stand_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c++.txt", "mine.txt", "harmful+benign"):
        write(tmp_path / name, "one\ntwo")
    assert joined_sources("harmful+looks-harmless") == ["harmful", "looks-harmless"]
    assert joined_sources("benign+c++.txt+mine.txt") == ["benign", "c++.txt", "mine.txt"]
    assert joined_sources("c++.txt") == ["c++.txt"]
    assert joined_sources("harmful+benign") == ["harmful+benign"]  # a file of that name counts
    assert joined_sources("owner/name:config+benign+benign") == ["owner/name:config", "benign"]
    assert joined_sources("no such thing") == ["no such thing"]  # whoever reads it says so
    for given, part in (("harmful+evil", "evil"), ("harmful+", ""), ("c+.txt", "c")):
        with pytest.raises(UserError, match=f"'{part}' is no file.* none of {', '.join(builtin_names())}"):
            joined_sources(given)


def test_joined_sources_are_drawn_each_and_hold_nothing_twice(tmp_path: Path) -> None:
    config = Separate(out=tmp_path, n=20, seed=3)
    harmful = read_prompts("harmful+looks-harmless", "harmful", config)
    harmless = read_prompts("harmless+looks-harmless-twins", "harmless", config)
    assert len(harmful) == 40
    assert {prompt.label for prompt in harmful} == {"harmful"}
    assert [p.family for p in harmful] == [p.family for p in harmless]  # the pairs stay pairs
    assert harmful == read_prompts("harmful", "harmful", config) + read_prompts("looks-harmless", "harmful", config)

    one = write(tmp_path / "one.jsonl", '{"id": "1", "prompt": "a"}\n{"id": "2", "prompt": "b"}')
    two = write(tmp_path / "two.jsonl", '{"id": "1", "prompt": "B!"}\n{"id": "2", "prompt": "c"}')
    with pytest.warns(UserWarning, match=r"two\.jsonl: left out 1 extra prompt"):
        joined = read_prompts(f"{one}+{two}", "harmful", replace(config, n=None, system="Be kind."))
    assert [prompt.text for prompt in joined] == ["a", "b", "c"]
    assert len({prompt.id for prompt in joined}) == 3
    assert {prompt.system for prompt in joined} == {"Be kind."}
