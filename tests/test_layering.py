"""The house rules that no reader can keep in mind: imports run one way, help is instant, nothing unsafe creeps in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mechlens.studies.registry import commands

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mechlens"
# Lowest first; a file imports from its own layer and from those before it.
LAYERS = (
    "errors", "registry", "choices", "files", "checked_json", "settings", "hub", "prompts", "models", "methods",
    "runs", "studies", "callbacks", "views", "cli", "__main__",
)  # fmt: skip
OTHERS = {("compare", "track")}
"""A study that imports another one, which says why in its docstring."""
HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "wandb", "datasets", "peft")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    """The layer of a module name such as mechlens.methods.probing.auroc."""
    return module.split(".")[1]


def imported(path: Path) -> list[str]:
    """Every mechlens module that a file imports, also inside functions and for type checking only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            # `from mechlens import studies` names a module too.
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "mechlens" else [module]
    return [name for name in found if name.split(".")[0] == "mechlens"]


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sources():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue  # hands out public names from every layer, each imported on its first use
        assert own in LAYERS, f"{path} is in none of LAYERS"
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imported(path)
            if name == "mechlens" or LAYERS.index(layer(name)) > LAYERS.index(own)
        ]
    assert wrong == []


def test_methods_know_no_folders_and_no_experiment_tracker() -> None:
    for path in sources():
        if path.relative_to(PACKAGE).parts[0] in ("prompts", "models", "methods", "studies"):
            assert not re.search(r"^\s*(import|from) wandb", path.read_text(encoding="utf-8"), re.MULTILINE), path
        if path.relative_to(PACKAGE).parts[0] == "methods":
            assert not re.search(r"^\s*(import|from) (pathlib|shutil|tempfile|argparse|tyro)", path.read_text()), path


@pytest.mark.parametrize("name", ["utils.py", "helpers.py", "common.py", "misc.py"])
def test_every_file_is_named_after_its_idea(name: str) -> None:
    assert [path for path in sources() if path.name == name] == []


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_unsafe_and_nothing_unfinished() -> None:
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "NotImplementedError"}, path
        for called, call in calls(tree):
            if called == "torch.load":  # the one reader of others' files, which PyTorch must keep from running code
                assert path == PACKAGE / "runs" / "vectors" / "foreign_vectors.py", path
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords], path
            if called == "torch.save":  # the one writer of others' files, of plain tensors, numbers and text
                assert path == PACKAGE / "runs" / "vectors" / "exported.py", path
            assert called not in ("numpy.load", "np.load", "os.system"), path
            for keyword in call.keywords:
                literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                    assert literal is False, f"{path} calls {called}({keyword.arg}=...)"
        assert not [
            node for node in ast.walk(tree) if isinstance(node, ast.Assert) and ast.unparse(node.test) == "False"
        ]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_on_somebodys_machine() -> None:
    # Adapter configurations and notebook outputs are where such paths slip in.
    path_on_a_machine = re.compile(r"(?<![\w.~$}/-])/(?:work|home|root|Users|private|mnt|scratch)/[\w.-]+")
    found = {}
    for path in tracked():
        text = path.read_bytes()
        if b"\0" in text[:8192] and path.suffix != ".safetensors":
            continue
        hits = path_on_a_machine.findall(text[: 1 << 20].decode("utf-8", errors="ignore"))
        if hits:
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert found == {}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


LIGHT = (
    "mechlens",
    "mechlens.choices",
    "mechlens.settings",
    "mechlens.studies.registry",
    "mechlens.studies.runs.study",
    "mechlens.studies.sweep.study",
    "mechlens.cli",
    "mechlens.errors",
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    done = python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def words() -> list[tuple[str, ...]]:
    """Every command of the command line, and what holds several of them."""
    found = [tuple(name.split()) for name in commands()]
    return [(), *dict.fromkeys(one[:1] for one in found if len(one) > 1), *found]


def test_every_help_is_shown_without_torch() -> None:
    # One process for all of them: what is not imported by the last was not imported by any.
    code = f"""
import contextlib, io, sys
from mechlens.cli import main
for verb in {words()!r}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            main([*verb, "--help"])
        except SystemExit as stop:
            assert not stop.code, (verb, stop.code)
    assert "usage: mechlens" in said.getvalue() and "--help" in said.getvalue(), verb
    assert not [name for name in {HEAVY} if name in sys.modules], verb
    print(*verb)
"""
    done = python(code)
    assert done.stderr == ""
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == words()


def test_the_command_itself_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mechlens.cli", "separate", "--help"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--harmful" in done.stdout
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in modules
    assert not modules & set(HEAVY)


def test_every_setting_is_explained_in_its_help() -> None:
    paths = [PACKAGE / "settings.py", *(PACKAGE / "studies").glob("*/config.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    for config in [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]:
        for place, item in enumerate(config.body):
            if not isinstance(item, ast.AnnAssign):
                continue
            after = config.body[place + 1] if place + 1 < len(config.body) else None
            explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert explained, f"{config.name}: {ast.unparse(item)}"


def test_a_study_is_a_folder_that_imports_no_other_study() -> None:
    wrong = []
    for path in (PACKAGE / "studies").glob("*/**/*.py"):
        own = path.relative_to(PACKAGE / "studies").parts[0]
        for name in imported(path):
            parts = name.split(".")
            other = parts[2] if parts[1] == "studies" and len(parts) > 3 else own
            if other not in (own, "shared") and (own, other) not in OTHERS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_study_has_a_judge_of_its_own() -> None:
    # The configured one decides; the published lists only stand beside it.
    for path in (PACKAGE / "studies").glob("**/*.py"):
        assert "PHRASES" not in path.read_text(encoding="utf-8"), path


def test_no_room_is_crowded() -> None:
    rooms = {path.parent for path in sources()}
    crowded = {str(room.relative_to(ROOT)): n for room in rooms if (n := len(list(room.glob("*.py")))) > 12}
    assert crowded == {}
