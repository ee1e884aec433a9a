"""An OpenAI-compatible endpoint on this machine, whose replies a test decides."""

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789"
Body = dict[str, Any]
Responder = Callable[[Body], tuple[int, Any]]


def completion(text: str | None, *tokens: dict[str, float]) -> Body:
    """A reply; each token as its candidates by probability, the first of which was written."""
    content = [
        {
            "token": next(iter(own)), "logprob": math.log(next(iter(own.values()))),
            "top_logprobs": [{"token": word, "logprob": math.log(p), "bytes": None} for word, p in own.items()],
        }
        for own in tokens
    ]  # fmt: skip
    logprobs = {"content": content, "refusal": None} if tokens else None
    message = {"role": "assistant", "content": text}
    return {"id": "x", "choices": [{"index": 0, "message": message, "logprobs": logprobs}], "usage": {"total": 1}}


class Server:
    """An endpoint whose replies a test decides."""

    def __init__(self) -> None:
        self.responder: Responder = lambda body: (200, completion("50"))
        self.headers: list[dict[str, str]] = []
        self.bodies: list[Body] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers) | {"path": self.path})
                outer.bodies.append(body)
                status, reply = outer.responder(body)
                said = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
