"""What the README promises exists: its Python runs, its commands parse, its files are there; so do the public names."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The contents of the README's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `mechlens ...` line of the shell blocks, and the ones in running text that take arguments."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("mechlens ")]
    return lines + re.findall(r"`(mechlens runs [^`]+)`", README)


def test_the_python_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    source = re.sub(r'"smollm2[\w-]*"', '"./tiny"', "\n".join(blocks("python")))
    assert source.count('"./tiny"') >= 2
    # Chance is not what is tested here: fewer resamples, in place of the defaults.
    source = source.replace(
        "DetectionPlan(seed=0)", "DetectionPlan(resamples=20, permutations=20, random_directions=3)"
    )
    source = source.replace("n=48,", "n=48, resamples=20, permutations=20, max_new_tokens=3,")
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["direction"].vector.shape == (32,)
    assert (tmp_path / "runs" / "from-python" / "report.html").exists()


@pytest.mark.parametrize("line", commands())
def test_the_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlens import cli

    parsed: list[object] = []
    monkeypatch.setattr(cli, "_dispatch", lambda command, config: parsed.append(config))
    cli.main(shlex.split(line)[1:])
    assert len(parsed) == 1


def test_there_are_commands_of_every_kind() -> None:
    assert {line.split()[1] for line in commands()} >= {"positions", "separate", "direction", "runs"}


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z][\w.-]*)", README))))
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
    for name in re.findall(r"(?:\./)?(scripts/\w+(?:\.\w+)?)", README):
        assert (ROOT / name).is_file(), name
    (tree,) = (block for block in blocks("text") if block.startswith("mechlens/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else ROOT
        assert (folder / name).exists(), line
        folder = ROOT / name if not line.startswith("  ") else folder


def test_it_names_no_machine_and_no_number_without_a_script() -> None:
    assert not re.search(r"/work/|/home/|/root/|localhost|127\.0\.0\.1", README)
    assert "pip install mechlens" not in README.replace("Don't `pip install mechlens`", "")
    assert "<!-- bench:collect" in README or re.search(r"\| \d+\.\d", README)


def test_it_counts_the_architectures_that_are_tested() -> None:
    assert re.findall(r"of (\d+) architectures", README) == [str(len(ARCHITECTURES))]


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
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mechlens.lod  # noqa: B018
