"""Loading what lies on this machine starts no program and asks no network: watched from inside another process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from adapters import save_adapter
from huggingface_hub.constants import is_offline_mode
from tiny import SMALL, tiny_hf, tiny_tokenizer

from mechlens.models.offline import sealed

WATCHED = """
import sys
seen = []
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn",
           "socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
def watch(event, args):
    if event in WATCHED:
        seen.append((event, str(args)[:200]))
        raise PermissionError("nothing is started or fetched here, whatever this test finds")
from mechlens.models.load import load
from mechlens.models.checkpoints.series import Member, checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
sys.addaudithook(watch)
base, adapter = sys.argv[1:]
model = load(base)
if adapter:
    load(base, adapter=adapter)
    series = checkpoint_series(base, [adapter])
    with checkpoint_swapper(base) as one:
        for member in series.members:
            one.put(member)
print(type(model).__name__, model.mechlens.parity_gap < 1e-4, seen)
"""


def gemma3_with_eyes() -> torch.nn.Module:
    """TransformerLens looks for this one's image processor, and would install torchvision for it."""
    eyes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**SMALL, "head_dim": 8, "sliding_window": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llama", "gemma3 with eyes"])
def test_loading_starts_and_fetches_nothing(kind: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", ""
    torch.manual_seed(0)
    (tiny_hf() if kind == "llama" else gemma3_with_eyes()).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    if kind == "llama":
        adapter = str(save_adapter(str(base), tmp_path / "adapter-1", seed=1))
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED, str(base), adapter], capture_output=True, text=True,
        check=False, env={**online, "MECHLENS_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "TransformerBridge True []"


def test_what_is_sealed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        socket.create_connection(place).close()
        with sealed():
            with pytest.raises(PermissionError, match="installs and fetches nothing"):
                socket.create_connection(place)
            # An interpreter that doesn't exist: were the start not refused, nothing would run.
            with pytest.raises(PermissionError, match="installs and fetches nothing"):
                subprocess.run(["no-such-python", "-m", "pip", "install", "x"], check=False)
            with pytest.raises(FileNotFoundError):
                subprocess.run(["no-such-compiler"], check=False)
            assert is_offline_mode()  # so huggingface_hub reads its cache at once, and doesn't try five times
            with sealed():
                pass
            with pytest.raises(PermissionError):
                socket.create_connection(place)
        socket.create_connection(place).close()
    assert not is_offline_mode()
