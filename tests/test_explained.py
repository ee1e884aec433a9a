"""Configurations as Python shows them: plain types, and a line for every option, the one of `--help`."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mechlens as ml

CONFIGS = {
    name: getattr(ml, name)
    for name, home in ml._HOME.items()
    if home.endswith(".config") or home == "mechlens.settings"
}
WALL = re.compile(r"Annotated|_ArgConfig|tyro|Registry|MISSING|<factory>|<class")


def test_there_are_configurations() -> None:
    assert {"Track", "Separate", "DetectionPlan", "WandbSettings", "GuardPredict"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_signature_is_plain_and_whole(name: str) -> None:
    config: Any = CONFIGS[name]
    signature = inspect.signature(config)
    assert not WALL.search(str(signature))
    options = {field.name: field for field in dataclasses.fields(config)}
    assert set(signature.parameters) == set(options)
    for option, parameter in signature.parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY or not options[option].kw_only
        if options[option].default is not dataclasses.MISSING:
            assert parameter.default == options[option].default
    needed = [one.default is one.empty for one in signature.parameters.values()]
    assert needed == sorted(needed, reverse=True)  # what must be given stands first
    assert max(map(len, str(signature).splitlines())) < 120
    assert list(inspect.signature(config.__init__).parameters) == ["self", *signature.parameters]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_has_its_line(name: str) -> None:
    said = inspect.getdoc(CONFIGS[name]) or ""
    _, _, options = said.partition("\nOptions:\n")
    assert re.findall(r"(?m)^  (\w+): \S", options) == list(inspect.signature(CONFIGS[name]).parameters)
    assert max(map(len, options.splitlines())) <= 100


def test_the_lines_are_those_of_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mechlens", "track", "--help"], capture_output=True, text=True, check=True,
        env={"COLUMNS": "400", "PYTHONPATH": str(Path(ml.__file__).parents[1])},
    )  # fmt: skip
    shown = " ".join(re.sub("[│╭╰─╮╯]", " ", done.stdout).split())
    _, _, options = (ml.Track.__doc__ or "").partition("\nOptions:\n")
    lines = re.split(r"(?m)^  (?=\w)", options)[1:]
    assert len(lines) > 30
    for line in lines:
        name, _, says = " ".join(line.split()).partition(": ")
        assert name == "wandb" or says in shown, line  # its own options stand in a box of that title


def test_what_inherits_has_a_signature_of_its_own() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(ml.TrackPlan):
        """Mine."""

        own: int = 1

    assert set(inspect.signature(Mine).parameters) == {"own", *inspect.signature(ml.TrackPlan).parameters}


def test_help_is_read_from_its_first_screen_on() -> None:
    code = "import mechlens as ml; help(ml.Track)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(ml.__file__).parents[1]
    )
    page, _, _ = done.stdout.partition("Method resolution order")
    assert max(map(len, page.splitlines())) < 125
    assert not WALL.search(page)
    assert " |    geometry: Subspaces" in page


def test_dir_offers_public_names_only() -> None:
    code = "import mechlens as ml; ml.Track; print({n for n in dir(ml) if not n.startswith('__')} == {*ml.__all__})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
