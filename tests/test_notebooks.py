"""The notebooks run on a tiny model; what they showed on real ones is kept, fresh and small; views need no network."""

import ast
import base64
import importlib
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from refusing import make_half_refuse
from tiny import tiny_hf, tiny_tokenizer

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "MECHLENS_NOTEBOOK_N": "60",
    "MECHLENS_NOTEBOOK_RESAMPLES": "20",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two tiny models: one says noise, the other refuses about half of all prompts, harmful or not."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    plain, refuser = tiny_hf("llama"), tiny_hf("llama")
    make_half_refuse(refuser, tokenizer)
    for name, model in (("plain", plain), ("refuser", refuser)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"plain": root / "plain", "refuser": root / "refuser"}


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all notebooks, which each begin in it with no names: what they import is imported once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setenv(name, value)
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


def execute(notebook: Path, model: Path, kernel: KernelManager) -> str:
    """Everything that the executed notebook printed or showed as text."""
    book = nbformat.read(notebook, as_version=4)
    settings = {**SMALL, "MECHLENS_NOTEBOOK_MODEL": str(model), "MECHLENS_NOTEBOOK_RUNS": f"{model}-runs"}
    book.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n__import__('os').environ.update({settings!r})"))
    NotebookClient(book, km=kernel, timeout=300).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= SAID.keys()


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    """The script that makes their outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_short_fresh_and_from_the_public_interface(path: Path, maker: ModuleType) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert len(book.cells) <= 20
    for cell in book.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            imported = re.findall(r"^(?:from|import) (mechlens\S*)", cell.source, re.MULTILINE)
            assert set(imported) <= {"mechlens", "mechlens.runs", "mechlens.runs.report", "mechlens.views"}
            if isinstance(ast.parse(cell.source).body[-1], ast.Expr):
                assert cell.outputs, f"it should show something: {cell.source}"
    assert maker.is_fresh(book), f"its code has changed since it was run: scripts/notebooks.py {path.stem[:2]}"
    assert maker.faults(book) == []


FAULTS = {
    "an error": {"output_type": "error", "ename": "UserError", "evalue": "no", "traceback": []},
    "written to stderr": {"output_type": "stream", "name": "stderr", "text": "100%"},
    "more than 40 lines": {"output_type": "stream", "name": "stdout", "text": "a\n" * 41},
    "a place on a machine": {"output_type": "stream", "name": "stdout", "text": "read /" + "home/ada/model"},
    "a library's warning": {"output_type": "stream", "name": "stdout", "text": "FutureWarning: soon gone"},
    "a script": {"output_type": "display_data", "data": {"text/html": "<script>x</script>"}, "metadata": {}},
    "something that code hosts don't show": {
        "output_type": "display_data", "data": {"application/vnd.plotly.v1+json": {}}, "metadata": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_reader_should_meet_is_found(fault: str, maker: ModuleType) -> None:
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[nbformat.from_dict(FAULTS[fault])])
    (found,) = maker.faults(nbformat.v4.new_notebook(cells=[cell]))
    assert f"cell 1: {fault}" in found
    cell.execution_count = None
    assert "not run in order" in maker.faults(nbformat.v4.new_notebook(cells=[cell]))[0]


def test_code_makes_outputs_stale_and_words_do_not(maker: ModuleType) -> None:
    book = nbformat.read(NOTEBOOKS[0], as_version=4)
    book.metadata["mechlens"] = {"made_from": maker.made_from(book)}
    book.cells[0].source += "!"
    assert maker.is_fresh(book)
    next(cell for cell in book.cells if cell.cell_type == "code").source += "\n"
    assert not maker.is_fresh(book)


def test_kept_of_an_output_is_what_needs_no_javascript(maker: ModuleType) -> None:
    live = {"text/plain": "a view", "text/html": "<script>x</script>", "image/svg+xml": "<svg/>"}
    output = nbformat.v4.new_output("execute_result", live, execution_count=1, metadata={"isolated": True})
    kept = maker.kept(output, lambda svg: svg.encode())
    assert kept.data == {"text/plain": "a view", "image/png": base64.b64encode(b"<svg/>").decode()}
    assert kept.metadata == {}
    inside = base64.b64encode(b"<svg/>").decode()
    page = f'<a href="runs/report.html">the report</a><img src="data:image/svg+xml;base64,{inside}">'
    output = nbformat.v4.new_output("display_data", {"text/plain": "", "text/html": page})
    kept = maker.kept(output, lambda svg: b"png of " + svg.encode())
    inside = base64.b64encode(b"png of <svg/>").decode()
    assert kept.data["text/html"] == f'the report<img src="data:image/png;base64,{inside}">'


def test_a_warning_addressed_to_the_notebook_is_kept_as_a_line_and_any_other_is_a_fault(maker: ModuleType) -> None:
    place = "/" + "tmp/ipykernel_7/622.py:5: "
    said = nbformat.v4.new_output(
        "stream", name="stderr", text=f"{place}UserWarning: no best direction\n  harm = 1\n\n"
    )
    kept = maker.kept(said, str.encode)
    assert (kept.name, kept.text) == ("stdout", "Warning: no best direction\n")
    said.text = said.text.replace("User", "Future")
    assert maker.kept(said, str.encode).name == "stderr"


NUMBER = r"-?\d\.\d{2,3} \["
SAID = {
    "01_positions_and_directions": (
        r"post\[0\]",
        "final punctuation removed from all 96 \\+ 96 prompts",
        rf"AUROC {NUMBER}",
        rf"tfidf_auroc\s+({NUMBER}|\d\.\d\d, too few prompts)",
    ),
    "02_separation": (
        *(rf"{harm}\s+{NUMBER}" for harm in ("refused_harmful", "accepted_harmful", "refused_harmless")),
        rf"correlation of the uncentred beliefs: {NUMBER}",
    ),
    "04_causal": (rf"inversion_parsed\s+{NUMBER}", r"(INCONCLUSIVE|NOT MEASURABLE|DISSOCIATION (NOT )?SHOWN)\n"),
    "05_tracking": (r"5 checkpoints, steps \(0, 1, 2, 4, 8\)", r"Harmful at step 8: \w+"),
    "06_latent_guard": (
        r"reads post\[\d+\] at level \d",
        rf"auroc\.latent_guard\s+{NUMBER}",
        rf"auroc_gain\.tfidf\s+{NUMBER}",
        r"the guard (beats|is worse than|is not told apart from) it",
        r"\bTrue\b",  # what was saved judges as before
    ),
    "12_sweeps": ("4 jobs: 4 left", "4 jobs: 4 done\n", "between seeds", "nothing is left to do"),
}
"""What each notebook must have said on a model that refuses half of everything; others must only run."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, models: dict[str, Path], kernel: KernelManager) -> None:
    said = execute(path, models["refuser"], kernel)
    for pattern in SAID.get(path.stem, ()):
        assert re.search(pattern, said), pattern


def test_separation_says_what_a_model_that_never_refuses_leaves_open(
    models: dict[str, Path], kernel: KernelManager
) -> None:
    (separation,) = (path for path in NOTEBOOKS if path.stem == "02_separation")
    said = execute(separation, models["plain"], kernel)
    assert "not measurable: {'refused_harmful': 'not measurable, n=0'" in said


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach something outside is an error, even one that would be caught."""

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("no network")

    attempts: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    yield
    assert attempts == []


EVIL = "How do I </script><script>alert('owned')</script> <b>bake</b> 🙂?"


def scripts(html: str) -> int:
    return len(re.findall(r"<script\b", html))


def test_position_view_is_one_whole_page_without_network(no_network: None) -> None:
    from mechlens import chat_template
    from mechlens.views import show_positions

    template = chat_template(tiny_tokenizer())
    html = show_positions(EVIL, template)._repr_html_()
    plain = show_positions("Bake.", template)._repr_html_()
    assert scripts(html) == scripts(plain)
    assert html.rstrip().endswith("</script>")
    assert '"labels": ["words", "inst", "post[0]"' in html
    for page in (html, plain):
        assert "unpkg.com" not in page
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", page)


def test_the_still_picture_of_a_view_has_every_token_as_text() -> None:
    from mechlens import chat_template
    from mechlens.views import _colored_tokens, show_positions

    template = chat_template(tiny_tokenizer())
    projected = _colored_tokens(
        ["</script>", "<img onerror=alert(1)>", "\n", "\x00", " long" * 30, "語"], [1.0, -1.0, 0.0, 0.0, 0.0, 1.0]
    )
    for view, words in ((show_positions(EVIL, template), "post[0]"), (projected, "<img onerror=alert(1)>")):
        picture = ElementTree.fromstring(view._repr_svg_())
        assert {part.tag.rpartition("}")[2] for part in picture.iter()} == {"svg", "g", "rect", "text"}
        assert words in [part.text for part in picture.iter()]
        assert len(view.svg) < 20_000


def test_tokens_that_are_markup_stay_text() -> None:
    from mechlens.views import _colored_tokens

    html = _colored_tokens(["</script>", "<img src=x onerror=alert(1)>"], [1.0, -1.0]).html
    body = html.rpartition("CircuitsVis.ColoredTokens,")[2]
    assert body.count("<") == 1  # the end of the script itself
    assert "\\u003c/script>" in body


def test_projection_view_starts_at_the_users_words(tiny_model: Any, no_network: None) -> None:
    import mechlens as ml
    from mechlens.views import show_projection

    model = tiny_model()
    prompts = [ml.Prompt("a", "one the", label="up"), ml.Prompt("b", "two thing", label="down")]
    acts = ml.collect(model, prompts, positions=["inst"])
    direction = ml.mean_difference(acts, "up", "down", level=2, position="inst")
    said = ml.answer(model, prompts[:1], max_new_tokens=3)
    html = show_projection(model, direction, prompts[0], answer=said.tokens[0]).html
    body = html.rpartition("CircuitsVis.ColoredTokens,")[2]
    batch = ml.tokenize(prompts[:1], ml.template_of(model))
    shown = [*batch.row(0)[int(batch.instruction[0, 0]) :], *said.tokens[0]]
    values = [float(x) for x in re.search(r'"values": \[([^\]]*)\]', body)[1].split(",")]
    assert len(values) == len(shown)
    assert abs(sum(values)) < 1e-4 * max(map(abs, values))
    assert max(map(abs, values)) > 0
    whole = ml.project_tokens(model, direction, [*batch.row(0), *said.tokens[0]]).values[-len(shown) :]
    assert values == pytest.approx([value - sum(whole) / len(whole) for value in whole], abs=1e-5)


def test_a_direction_of_zero_and_a_single_token_have_no_colour_but_no_error_either() -> None:
    from mechlens.views import _colored_tokens

    assert '"maxValue": 1.0' in _colored_tokens(["a"], [0.0]).html


def test_figures_are_shown_without_the_button_that_uploads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    from mechlens.runs.report import figures
    from mechlens.views import show_figure

    shown = []
    figure = figures.lines(pd.DataFrame({"x": [1], "y": [1]}), x="x", y="y", title="", xlabel="", ylabel="")
    monkeypatch.setattr(type(figure), "show", lambda self, **options: shown.append(options))
    show_figure(figure)
    assert shown[0]["config"]["showSendToCloud"] is False
    assert shown[0]["config"]["plotlyServerURL"] == ""
