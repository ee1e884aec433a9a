"""Runs on an object store: the numbers of a run on disk, whole or not at all, by one process at a time.

In memory; scripts/conformance does the same on a server that speaks S3, with workers of their own there.
"""

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from saved import save_tiny

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.runs.folder import FolderCache
from mechlens.runs.remote import lock, mirror
from mechlens.runs.remote.lock import StoreLock
from mechlens.runs.remote.mirror import mirrored
from mechlens.runs.remote.store import Store, address, is_remote

S3 = bool(os.environ.get("MECHLENS_CONFORMANCE")) and find_spec("s3fs") is not None
FOREVER = 1e6


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The beginning of addresses on a store."""
    if not S3:
        yield "memory://bucket"
        return
    import fsspec
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    port = made.get_host_and_port()[1]
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    made.stop()


@pytest.fixture
def url(server: str) -> str:
    return f"{server}/{uuid.uuid4().hex[:8]}/run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def on_disk(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ml.run(study(model, tmp_path_factory.mktemp("disk") / "run"))


def study(model: str, out: str | Path) -> Any:
    return ml.FindDirection(
        positive="harmful", negative="harmless", n=16, positions=("last",), resamples=20, permutations=10,
        random_directions=2, wandb=ml.WandbSettings(mode="disabled"), model=model, out=Path(out),
    )  # fmt: skip


def same_tables(one: Any, other: Any) -> None:
    assert list(one.tables) == list(other.tables)
    for name in one.tables:
        pd.testing.assert_frame_equal(one.tables[name], other.tables[name], check_exact=True)


def test_an_address_survives_being_a_path() -> None:
    assert is_remote(Path("s3://bucket/run"))
    assert address(Path("s3://bucket/run")) == "s3://bucket/run"
    assert not any(map(is_remote, ("runs/first", "C:/runs", "s3", "s3:run", "./s3:/run", "http://host/run")))


def test_a_run_on_a_store_is_the_run_on_disk_and_every_command_reads_it(
    url: str, model: str, on_disk: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[str] = []
    real = Store.put
    monkeypatch.setattr(Store, "put", lambda self, file, name: (puts.append(name), real(self, file, name))[1])
    run = ml.run(study(model, url))
    same_tables(run, on_disk)
    assert puts[-1] == "run.json"
    here = {path.relative_to(on_disk.folder).as_posix() for path in on_disk.folder.rglob("*") if path.is_file()}
    assert set(Store(url).names()) == here - {".lock"}
    assert ml.open(url).sentence == ml.read_run(url).sentence == on_disk.sentence
    assert ml.open(f"{url}/strongest.safetensors").vector.equal(
        ml.open(on_disk.folder / "strongest.safetensors").vector
    )
    capsys.readouterr()
    main(["runs", "list", url.rpartition("/")[0]])
    assert capsys.readouterr().out.startswith(f"{url}  direction")
    main(["runs", "show", url])
    assert on_disk.sentence in capsys.readouterr().out
    main(["runs", "compare", url, str(on_disk.folder)])
    assert on_disk.sentence in capsys.readouterr().out
    puts.clear()
    ml.run(study(model, url))  # a finished run is given back
    assert puts == []
    with pytest.raises(UserError, match=r"made with other options: .n. was 16 and is now 12"):
        ml.run(replace(study(model, url), n=12))
    for command in (["runs", "index", url], ["runs", "prune", url]):
        with pytest.raises(SystemExit):
            main(command)
        assert "give a folder of this machine" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is nothing at"):
        ml.open(f"{url}-other")


def test_a_store_that_fails_in_the_middle_holds_no_run_that_is_said_to_be_done(
    url: str, model: str, on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", FOREVER)
    real, puts = Store.put, list[str]()

    def fail(self: Store, file: Path, name: str) -> None:
        puts.append(name)
        if len(puts) > 3:
            raise UserError("no room")
        real(self, file, name)

    monkeypatch.setattr(Store, "put", fail)
    with pytest.raises(UserError, match=r"could not be put to .*: no room; it is in ") as told:
        ml.run(study(model, url))
    kept = Path(str(told.value).rpartition("it is in ")[2])
    same_tables(ml.open(kept), on_disk)
    assert len(Store(url).names()) == 3
    assert "run.json" not in Store(url).names()
    monkeypatch.undo()
    for name in Store(url).names():
        Store(url).remove(name)
    same_tables(ml.run(study(model, url)), on_disk)


def test_what_a_killed_process_finished_is_gone_on_with_by_the_next(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.5)
    key, piece = "0" * 64, {"a": torch.arange(3.0)}
    with mirrored(Path(url)) as folder:
        FolderCache(folder / "cache").put(key, piece)
        (folder / "wandb").mkdir()
        (folder / "wandb" / "log").write_text("grows")
        wait_for(lambda: f"cache/{key}.safetensors" in Store(url).names())
        assert not [name for name in Store(url).names() if name.startswith("wandb")]
        # Dead: no sign of life comes any more.
        monkeypatch.setattr(mirror.Mirror, "finish", lambda self: self._ending.set())
        monkeypatch.setattr(StoreLock, "release", lambda self: None)
    monkeypatch.undo()
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.5)
    with mirrored(Path(url)) as again:
        found = FolderCache(again / "cache").get(key)
        assert found is not None
        assert found["a"].equal(piece["a"])
        (again / "cache" / f"{key}.safetensors").unlink()
    assert Store(url).names() == []


def wait_for(true: Any) -> None:
    import time

    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_process_at_a_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", FOREVER)
    with mirrored(Path(url)), pytest.raises(UserError, match="another mechlens process is writing to"):
        StoreLock(Store(url))
    assert Store(url).names() == []
    # A process of this machine that is no more keeps nobody waiting.
    first = StoreLock(Store(url))
    with pytest.MonkeyPatch.context() as dead:
        dead.setattr(os, "kill", lambda pid, signal: (_ for _ in ()).throw(ProcessLookupError()))
        second = StoreLock(Store(url))
    assert not first.beat()
    assert second.beat()
    second.release()
    # Nor, in the end, one of another machine; who was only asleep may write no more.
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "BEAT", FOREVER)
    with pytest.raises(UserError, match="another process took it over"), mirrored(Path(url)) as folder:  # noqa: PT012
        for name in Store(url).names():
            Store(url).remove(name)
        (folder / "late").write_text("mine")
    assert Store(url).names() == []
    monkeypatch.setattr(lock, "BEAT", 0.05)
    Store(url).write(b"elsewhere\n1\n1", f"{lock.LOCKS}other")
    StoreLock(Store(url)).release()
    assert Store(url).names() == []


@pytest.mark.skipif(not S3, reason="workers of their own don't see this process's memory")
def test_a_sweep_on_a_store(url: str, model: str, on_disk: Any, tmp_path: Path) -> None:
    import json

    options = {
        "positive": "harmful", "negative": "harmless", "n": 16, "positions": ["last"], "resamples": 20,
        "permutations": 10, "random_directions": 2, "wandb": {"mode": "disabled"}, "model": model,
    }  # fmt: skip
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"study": "direction", "options": options, "over": {"seed": [0, 1]}}))
    main(["sweep", str(plan), "--out", url])
    same_tables(ml.open(f"{url}/seed-0"), on_disk)
    names = Store(url).names()
    assert {"seed-0/job.json", "seed-1/run.json", "compared/compared.html"} <= set(names)
    assert not [name for name in names if ".lock" in name]
    main(["sweep", str(plan), "--out", url])  # nothing is left
    assert set(Store(url).names()) == set(names)


def test_what_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(UserError, match="s3://bucket/run needs the package s3fs; install it with: pip install s3fs"):
        ml.open("s3://bucket/run")
    monkeypatch.undo()
    if S3:
        with pytest.raises(UserError, match=r"could not be reached \(The specified bucket does not exist\)"):
            Store("s3://nobody/run").write(b"1", "a")
