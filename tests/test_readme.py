"""What the READMEs promise exists: their Python runs, their commands parse, their files and names are there."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

from mechlens.runs.writer import open_run
from mechlens.studies import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MORE = (
    "mechlens/studies/README.md",
    "mechlens/studies/causal/README.md",
    "mechlens/runs/README.md",
    "mechlens/methods/statistics/README.md",
    "mechlens/models/engine/README.md",
    "mechlens/models/adapters/smollm2-refuser/README.md",
)
"""What the README hands on to; one text with it, read after it."""
CONTRIBUTING = ".github/CONTRIBUTING.md"
ENGINE = (ROOT / MORE[4]).read_text(encoding="utf-8")
ALL = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *MORE, CONTRIBUTING))


def blocks(language: str, text: str = ALL) -> list[str]:
    """The contents of the fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `mechlens ...` line of the shell blocks, and the ones in running text that take arguments."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("mechlens ")]
    return lines + re.findall(r"`(mechlens runs [^`]+ [^`]+)`", ALL)


def test_the_python_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    source = re.sub(r'"smollm2[\w-]*"', '"./tiny"', "\n".join(blocks("python")))
    assert source.count('"./tiny"') >= 2
    # Chance is not what is tested here: fewer resamples, in place of the defaults.
    few = "ml.DetectionPlan(resamples=20, permutations=20, random_directions=3)"
    source = source.replace("ml.DetectionPlan(seed=0)", few)
    source = source.replace("(model, harmful, harmless)", f"(model, harmful, harmless, plan={few})")
    source = source.replace("n=48,", "n=48, resamples=20, permutations=20, max_new_tokens=3,")
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["direction"].vector.shape == (32,)
    assert (tmp_path / "runs" / "from-python" / "report.html").exists()


EXAMPLES = {name: known.examples for name, known in registry.commands().items() if name in registry.COMMANDS.ours}


def test_the_help_of_every_command_ends_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    from mechlens import cli

    for name, examples in EXAMPLES.items():
        assert examples
        assert all(f"{example} ".startswith(f"mechlens {name} ") for example in examples)
    for words in ("direction", "guard"):
        with pytest.raises(SystemExit):
            cli.main([words, "--help"])
        told = [example for name, examples in EXAMPLES.items() if name.split()[0] == words for example in examples]
        assert capsys.readouterr().out.endswith("\n".join(["", "examples:", *(f"  {one}" for one in told), ""]))


@pytest.mark.parametrize("line", [*commands(), *(line for examples in EXAMPLES.values() for line in examples)])
def test_the_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlens import cli

    parsed: list[object] = []
    monkeypatch.setattr(cli, "_dispatch", lambda command, config: parsed.append(config))
    cli.main(shlex.split(line)[1:])
    assert len(parsed) == 1


def test_there_are_commands_of_every_kind() -> None:
    assert {line.split()[1] for line in commands()} >= {"positions", "separate", "direction", "runs"}


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z][\w.-]*)", ALL))))
def test_every_option_that_is_named_exists(option: str, helps: str) -> None:
    assert re.search(rf"{re.escape(option)}\b", helps)


@pytest.fixture(scope="module")
def helps() -> str:
    """What `--help` says of every command."""
    from mechlens import cli
    from mechlens.studies import registry

    said = io.StringIO()
    for name in registry.commands():
        with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
            cli.main([*name.split(), "--help"])
    return said.getvalue()


def test_scripts_and_the_file_tree_are_there() -> None:
    for name in re.findall(r"(?:\./)?(scripts/\w+(?:\.\w+)?)", ALL):
        assert (ROOT / name).is_file(), name
    (tree,) = (block for block in blocks("text", README) if block.startswith("mechlens/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else ROOT
        assert (folder / name).exists(), line
        folder = ROOT / name if not line.startswith("  ") else folder


def test_it_names_no_machine_and_no_number_without_a_script() -> None:
    assert not re.search(r"/work/|/home/|/root/|localhost|127\.0\.0\.1", ALL)
    assert "pip install mechlens" not in ALL.replace("Don't `pip install mechlens`", "")
    assert re.search(r"\| \d+\.\d", ENGINE)
    assert set(re.findall(r"scripts/(bench_\w+)", ENGINE)) == {path.stem for path in ROOT.glob("scripts/bench_*.py")}


def test_it_counts_the_architectures_that_are_tested() -> None:
    assert re.findall(r"of (\d+) architectures", ENGINE) == [str(len(ARCHITECTURES))]


def test_the_readme_is_short_and_shows_its_picture() -> None:
    assert len(README.split()) <= 1200
    (picture,) = re.findall(r"!\[.+\]\((.+\.svg)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000
    assert ElementTree.parse(ROOT / picture).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["README.md", *MORE, CONTRIBUTING])
def test_every_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_the_table_has_every_study_and_its_notebook() -> None:
    from mechlens.studies.registry import COMMANDS, GROUPS

    rows = re.findall(r"^\| (`mechlens .*?) \| .* \| .* \| `(\w+)` \|$", README, re.MULTILINE)
    said = " ".join(command for command, _ in rows)
    for name in COMMANDS.ours:
        words = name.split()
        if words[0] not in ("runs", "wandb", "checkpoints", "directions", "env", "sweep"):
            assert f"mechlens {words[0]}" in said, name
            assert len(words) == 1 or words[0] not in GROUPS or re.search(rf"\b{words[1]}\b", said), name
    assert {book for _, book in rows} == {path.stem for path in ROOT.glob("notebooks/*.ipynb")}


def test_every_text_comes_with_the_package() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = package_data["package-data"]["mechlens"]
    kept = {path for pattern in patterns for path in (ROOT / "mechlens").glob(pattern)}
    assert {ROOT / name for name in MORE} <= kept


def test_the_picture_shows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import picture

    from mechlens.settings import WandbSettings

    rows = [
        {"contrast": contrast, "position": position, "level": level, "auroc": 0.5 + level / 10, "n": 8}
        for contrast in ("harmful", "refused")
        for position in ("inst", "post[0]", "post[1]")
        for level in range(4)
    ]
    curves = pd.DataFrame(rows).assign(low=lambda frame: frame["auroc"] - 0.1, high=lambda frame: frame["auroc"] + 0.1)
    words = [{"contrast": name, "baseline": "tfidf_auroc", "auroc": 0.6} for name in ("harmful", "refused")]
    out, off = tmp_path / "run", WandbSettings(mode="disabled")
    with open_run(verb="separate", config={"model": "a<b"}, out=out, wandb=off) as writer:
        writer.table("auroc_by_level", curves)
        writer.table("baselines", pd.DataFrame(words))
    picture.main(out, tmp_path / "drawn.svg")
    drawn = ElementTree.parse(tmp_path / "drawn.svg").getroot()
    texts = " ".join(drawn.itertext())
    assert "a<b; 8 test prompts" in texts
    assert "(post[1])" in texts
    assert len(drawn.findall("{*}polyline")) == 4


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/error_rates_*.py")), ids=lambda path: path.stem)
def test_tables_of_error_rates_have_their_places(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import readme_table

    study = Path("mechlens/studies", script.stem.removeprefix("error_rates_"))
    shutil.copytree(ROOT / study, tmp_path / study)
    text = (ROOT / study / "README.md").read_text(encoding="utf-8")
    marks = re.findall(r"<!-- made by scripts/(.+): (.+) -->", text)
    assert text.count("<!--") == 2 * len(marks)
    assert script.name in {maker for maker, _ in marks}
    for maker, label in marks:
        assert f'"{label}"' in (ROOT / "scripts" / maker).read_text(encoding="utf-8")
        readme_table.write(str(tmp_path / "scripts" / maker), label, f"| {label} |", tmp_path / study / "README.md")
    written = (tmp_path / study / "README.md").read_text(encoding="utf-8")
    assert written == re.sub(r"(made by .+: (.+) -->\n)(?s:.*?)(?=<!-- end)", r"\1| \2 |\n", text)
    with pytest.raises(SystemExit, match="needs the line <!-- made by"):
        readme_table.write(str(script), "another", "")


def test_importing_mechlens_is_light() -> None:
    check = "import sys, mechlens; dir(mechlens); mechlens.Prompt; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_public_names_are_what_the_type_checker_sees() -> None:
    import mechlens

    listed = ast.parse(Path(mechlens.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in listed.body if isinstance(node, ast.ImportFrom)]
    assert [alias.asname for node in imports for alias in node.names] == mechlens.__all__
    for name in mechlens.__all__:
        assert getattr(mechlens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'; did you mean 'load'"):
        mechlens.lod  # noqa: B018


def test_every_study_is_named_as_python_calls_it() -> None:
    named = (ROOT / MORE[0]).read_text(encoding="utf-8")
    studies = [one.config.__name__ for one in registry.commands().values() if isinstance(one, registry.Study)]
    assert len(studies) > 10
    assert [name for name in studies if f"`ml.{name}`" not in named] == []
