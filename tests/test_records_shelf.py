"""Finished pieces come back equal; damaged ones count as absent."""

import hashlib

import pytest
import torch

from mechlens.methods.cache import Cache
from mechlens.runs.folder import FolderCache

KEY = hashlib.sha256(b"piece").hexdigest()
VALUE = {"x": torch.randn(3, 4), "text": torch.tensor(list("é".encode()), dtype=torch.uint8), "n": torch.tensor(True)}


def test_what_was_put_is_got_and_nothing_else(tmp_path):
    cache: Cache = FolderCache(tmp_path / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, VALUE)
    got = cache.get(KEY)
    assert got.keys() == VALUE.keys()
    assert all(torch.equal(got[name], VALUE[name]) and got[name].dtype == VALUE[name].dtype for name in VALUE)
    assert cache.get(hashlib.sha256(b"other").hexdigest()) is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "one byte", "renamed"])
def test_a_damaged_piece_is_absent_and_can_be_put_again(damage, tmp_path):
    cache = FolderCache(tmp_path)
    key = KEY
    cache.put(KEY, VALUE)
    path = tmp_path / f"{KEY}.safetensors"
    data = path.read_bytes()
    if damage == "renamed":
        key = hashlib.sha256(b"other").hexdigest()
        path.rename(tmp_path / f"{key}.safetensors")
    else:
        changed = {"truncated": data[:-3], "empty": b"", "one byte": data[:-1] + bytes([data[-1] ^ 1])}
        path.write_bytes(changed[damage])
    assert cache.get(key) is None
    cache.put(key, VALUE)
    assert torch.equal(cache.get(key)["x"], VALUE["x"])


def test_a_key_is_a_hash_and_never_a_path(tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        FolderCache(tmp_path).get("../" + KEY)
