"""A completions server on this machine that decodes greedily with a model of its own, and can be made to misbehave."""

import contextlib
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Body = dict[str, Any]
Reply = tuple[int, Any]


class CompletionServer:
    """Answers to token ids what the model says, one token at a time by its own full passes, until a stop token."""

    def __init__(self, model: Any, tokenizer: Any, *, ids: bool = True, certificate: Path | None = None) -> None:
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.behave()
        self._known: dict[tuple[int, ...], list[int]] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(*outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body | {"path": self.path})
                self._say(*(outer.before(body) or (200, outer.after(body, outer.reply(body)))))

            def _say(self, status: int, reply: Any) -> None:
                said = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                promised = len(said) + outer.lost
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(promised))
                self.end_headers()
                with contextlib.suppress(OSError):  # nobody waits any more
                    self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def behave(self) -> None:
        """From now on as a good server does, and with nothing asked yet."""
        self.bodies: list[Body] = []
        self.models: Reply = (200, {"object": "list", "data": [{"id": "served-1", "object": "model"}]})
        self.before: Callable[[Body], Reply | None] = lambda body: None
        """What is said in place of an answer."""
        self.after: Callable[[Body, Body], Body] = lambda body, reply: reply
        self.lost = 0
        """Bytes at the end of every reply that are never sent."""

    @torch.inference_mode()
    def reply(self, body: Body) -> Body:
        """An OpenAI completion, with the token ids where the server gives them, the stop token among them."""
        stop = self.tokenizer.eos_token_id
        with self._lock:
            new = self._known.setdefault((body["max_tokens"], *body["prompt"]), [])
            while len(new) < body["max_tokens"] and new[-1:] != [stop]:
                new.append(int(self.model(torch.tensor([body["prompt"] + new])).logits[0, -1].argmax()))
        choice = {
            "index": 0, "text": self.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if new[-1:] == [stop] else "length",
        }  # fmt: skip
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(new)}
        return {"id": "x", "choices": [choice | ({"token_ids": new} if self.ids else {})], "usage": usage}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
