"""Many runs at once: the page that links them, and the disk that finished ones give back."""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from sentence import Seen

from mechlens.errors import UserError
from mechlens.files import short_name
from mechlens.runs.headline import Headline
from mechlens.runs.index import write_index
from mechlens.runs.lock import FolderLock
from mechlens.runs.prune import prune
from mechlens.runs.report.report import Report
from mechlens.runs.run import read_run
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings
from mechlens.studies.runs.config import ListRuns, PruneRuns
from mechlens.studies.runs.study import list_all, remove_superfluous

OFF = WandbSettings(mode="disabled")
KEY = "a" * 64


@dataclass(frozen=True)
class Config:
    model: str = "<b>tiny</b>"
    out: Path = Path("out")
    wandb: WandbSettings = OFF


def make(out: Path, *, fails: bool = False, keep: bool = False) -> Path:
    """A run with a piece in its cache, and a report where it succeeds."""
    try:
        with open_run(verb="separate", config=Config(), out=out, wandb=OFF, keep_cache=keep) as writer:
            writer.cache.put(KEY, {"x": torch.zeros(1000)})
            if fails:
                raise UserError("no <i>such</i> thing; give another")
            headline = Headline("two & more", "D is 2.00 [1.50, 2.50]")
            writer.report(Report("A title", "Why?", "A long story.", headline=headline))
    except UserError:
        assert fails
    return out


def test_the_cache_goes_with_success_and_stays_by_an_option_or_after_a_failure(tmp_path: Path) -> None:
    assert not (make(tmp_path / "done") / "cache").exists()
    assert (make(tmp_path / "kept", keep=True) / "cache").exists()
    assert (make(tmp_path / "failed", fails=True) / "cache").exists()


def test_prune_frees_finished_runs_alone_and_says_what_it_freed(tmp_path: Path) -> None:
    kept, failed = make(tmp_path / "kept", keep=True), make(tmp_path / "failed", fails=True)
    log = kept / "wandb" / "offline-run-1" / "run-1.wandb"
    other = kept / "wandb" / "offline-run-2" / "run-2.wandb"
    for file in (log, log.with_name("run-1.wandb.synced"), other):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"log")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    screen = Seen()
    remove_superfluous(PruneRuns(folder=tmp_path, dry_run=True), screen)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert screen.shown[-1].endswith(" MB would be freed")
    lock = FolderLock(kept)
    assert [one.freed for one in prune(tmp_path, dry=False)] == [0, 0]  # a process is writing to it
    lock.release()
    done = {one.folder: one for one in prune(tmp_path, dry=False)}
    assert done[kept].freed == sum(map(len, (before[p] for p in before if p not in tmp_path.rglob("*"))))
    assert done[kept].freed > 4000
    assert done[failed].left == "it failed, and goes on from there"
    assert not log.parent.exists()
    assert other.exists()
    assert (failed / "cache").exists()
    assert (kept / "report.html").exists()
    assert prune(kept, dry=False) == []
    remove_superfluous(PruneRuns(folder=kept), screen)
    assert screen.shown[-1].startswith("nothing to remove: caches are removed when a run succeeds")


def test_the_index_links_every_report_with_its_sentence(tmp_path: Path) -> None:
    make(tmp_path / "a #1" / "done")
    make(tmp_path / "failed", fails=True)
    damaged = make(tmp_path / "damaged") / "run.json"
    damaged.write_text(damaged.read_text().replace("success", "succes"))
    page = write_index(tmp_path).read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"]*)">([^<]*)</a>', page)
    assert sorted(name for _, name in links) == ["a #1/done", "damaged"]
    for link, _ in links:
        assert (tmp_path / unquote(link)).is_file()
        assert not link.startswith(("/", "file:", "http"))
    assert "<b>tiny" not in page
    assert "<i>such" not in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "Two & more: D is 2.00 [1.50, 2.50]." in text
    assert "UserError: no <i>such</i> thing; give another" in text
    assert "run.json" in text  # what is wrong with the damaged one
    assert "<script" not in page


def test_lists_call_a_model_by_its_short_name_and_keep_what_was_given(tmp_path: Path) -> None:
    given = "/somewhere/models/tiny"
    with open_run(verb="separate", config=Config(model=given), out=tmp_path / "one", wandb=OFF):
        pass
    screen = Seen()
    list_all(ListRuns(folder=tmp_path), screen)
    list_all(ListRuns(folder=tmp_path, json=True), screen)
    assert "  tiny  success" in screen.shown[0]
    assert given not in screen.shown[0]
    assert screen.shown[1]["model"] == given
    assert f'<span title="{given}">tiny</span>' in write_index(tmp_path).read_text(encoding="utf-8")
    assert [short_name(name) for name in ("owner/name", "a/b/", "./tiny", "x.gguf", "")] == [
        "name", "b", "tiny", "x.gguf", "",
    ]  # fmt: skip


def test_a_file_in_the_place_of_a_run_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "polite.txt").write_text("Please")
    with pytest.raises(UserError, match=r"polite.txt is a file; give the folder of a run, which its `out` named"):
        read_run(tmp_path / "polite.txt")


def test_the_index_of_no_runs_says_so_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    assert "There are no runs below this folder yet" in write_index(tmp_path).read_text()
    with pytest.raises(UserError, match="there is no folder"):
        write_index(tmp_path / "none")
