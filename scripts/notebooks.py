"""Runs the notebooks on their real models and keeps what they showed, small enough to be read on a code host.

    scripts/notebooks.py               those whose code isn't what their outputs were made from
    scripts/notebooks.py 04 05         those whose names begin so, whatever they hold

Kept are text, tables and figures as PNG, drawn by headless Chromium: code hosts run no JavaScript, and draw an SVG
wrongly or not at all. Whoever runs a notebook gets the interactive views. A cell that warns, prints much or names a
place on this machine is an error, and the file stays as it was.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

BOOKS = Path(__file__).resolve().parents[1] / "notebooks"
QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "COLUMNS": "100"}
MOST_BYTES, MOST_LINES = 500_000, 40
KEPT = ("text/plain", "text/html", "text/markdown", "image/png")
INLINE_SVG = re.compile(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)")
LINK = re.compile(r"<a [^>]*>(.*?)</a>")
"""To a report, which isn't committed."""
OWN_WARNING = re.compile(r"\S*ipykernel_\S+: UserWarning: (.+?)\n  .*\n*")
"""One that is addressed to the line in the notebook; any other is for who maintains what raised it."""
MACHINE = re.compile(r"(?<![\w.~$}/-])/(?:work|home|root|tmp|var|Users|private|mnt|scratch|usr|opt)/")
WARNS = re.compile(r"\w+Warning\b|Traceback|^WARNING", re.MULTILINE)


def made_from(book: nbformat.NotebookNode) -> str:
    """The fingerprint of all code: words may change without a run, code may not."""
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def is_fresh(book: nbformat.NotebookNode) -> bool:
    """Whether its outputs were made from the code that stands in it."""
    return bool(book.metadata.get("mechlens", {}).get("made_from") == made_from(book))


def faults(book: nbformat.NotebookNode) -> list[str]:
    """What a reader on a code host should not meet, cell by cell."""
    found = []
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != [*range(1, len(code) + 1)]:
        found.append("cells were left out, or not run in order")
    for cell in code:
        for output in cell.outputs:
            said = _said(output)
            wrong = {
                "an error": output.output_type == "error",
                "written to stderr": output.get("name") == "stderr",
                f"more than {MOST_LINES} lines": _plain(output).count("\n") > MOST_LINES,
                "a place on a machine": MACHINE.search(said),
                "a library's warning": WARNS.search(said),
                "a script": "<script" in said,
                "something that code hosts don't show": set(output.get("data", ())) - {*KEPT},
            }
            found += [f"cell {cell.execution_count}: {what}: {said[:300]!r}" for what, there in wrong.items() if there]
    size = len(nbformat.writes(book))
    return [*found, f"{size} bytes, more than {MOST_BYTES}"] if size > MOST_BYTES else found


def _said(output: nbformat.NotebookNode) -> str:
    """All its words, whichever kind."""
    data = output.get("data", {})
    words = [value for kind, value in data.items() if kind.startswith("text/") and isinstance(value, str)]
    return "\n".join([output.get("text", ""), output.get("evalue", ""), *words])


def _plain(output: nbformat.NotebookNode) -> str:
    """Its text, where a code host has nothing better to show of it."""
    data = output.get("data", {})
    return "" if {*data} - {"text/plain"} else str(output.get("text", "") or data.get("text/plain", ""))


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook after a run from top to bottom, in an empty folder."""
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    began = time.monotonic()

    def tell(cell: nbformat.NotebookNode, cell_index: int, **_: Any) -> None:
        print(f"{path.stem}: cell {cell_index} of {len(book.cells)}, {time.monotonic() - began:.0f} s", flush=True)

    before = dict(os.environ)
    os.environ.update(QUIET)
    try:
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(
                book, timeout=None, kernel_name="python3", resources=resources, record_timing=False,
                coalesce_streams=True, on_cell_executed=tell,
            ).execute()  # fmt: skip
    finally:
        os.environ.clear()
        os.environ.update(before)
    return book


def kept(output: nbformat.NotebookNode, drawn: Callable[[str], bytes]) -> nbformat.NotebookNode:
    """What a code host shows of an output, the same whenever it is made again."""
    if "data" not in output:
        addressed = OWN_WARNING.fullmatch(output.get("text", ""))
        return (
            nbformat.v4.new_output("stream", name="stdout", text=f"Warning: {addressed[1]}\n") if addressed else output
        )
    data = dict(output.data)
    svg = data.pop("image/svg+xml", None)
    if svg is not None:  # what stands beside it needs JavaScript
        data = {"text/plain": data["text/plain"], "image/png": base64.b64encode(drawn(svg)).decode()}
    if "text/html" in data:
        data["text/html"] = LINK.sub(r"\1", INLINE_SVG.sub(lambda found: _as_png(found[1], drawn), data["text/html"]))
    output.data = {kind: value for kind, value in data.items() if not kind.startswith("application/vnd.")}
    output.metadata = {}
    return output


def _as_png(svg: str, drawn: Callable[[str], bytes]) -> str:
    return f"data:image/png;base64,{base64.b64encode(drawn(base64.b64decode(svg).decode())).decode()}"


def small(png: bytes) -> bytes:
    """The picture in 64 colours, which lines and areas of colour need no more of: a quarter of the bytes."""
    from PIL import Image

    written = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(written, "PNG", optimize=True)
    return written.getvalue()


@contextmanager
def chromium() -> Iterator[Callable[[str], bytes]]:
    """A function that draws an SVG as PNG."""
    from playwright.sync_api import sync_playwright

    there = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=there, args=["--no-sandbox"])
        page = browser.new_page(device_scale_factor=1.5)

        def drawn(svg: str) -> bytes:
            page.set_content(svg)
            return small(page.locator("svg").first.screenshot())

        yield drawn
        browser.close()


def remake(path: Path) -> None:
    """Runs a notebook and writes it back; SystemExit with all that is wrong, and the file as it was."""
    book = executed(path)
    with chromium() as drawn:
        for cell in book.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs = [kept(output, drawn) for output in cell.outputs]
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "mechlens": {"made_from": made_from(book)},
    }
    if wrong := faults(book):
        nbformat.write(book, spoilt := Path(tempfile.gettempdir()) / path.name)
        raise SystemExit(f"{path.name} was left as it was; what it showed is {spoilt}:\n" + "\n".join(wrong))
    nbformat.write(book, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(names: list[str]) -> None:
    """The notebooks that are named, or those that are stale."""
    for path in sorted(BOOKS.glob("*.ipynb")):
        asked = path.name.startswith(tuple(names)) if names else not is_fresh(nbformat.read(path, as_version=4))
        if asked:
            remake(path)


if __name__ == "__main__":
    main(sys.argv[1:])
