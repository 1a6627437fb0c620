"""A real HTTP server that acts as an OpenAI-compatible endpoint: it can delay, refuse and break off answers,
and counts requests."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Speaks /v1/chat/completions and /v1/completions. `script(draft, nth)` decides on the nth request for a
    draft (otherwise the last message, or the prompt): a text or a dict, see `reply`."""

    def __init__(self) -> None:
        self.script: Any = lambda draft, nth: f"Better: {draft}"
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.in_flight, self.most, self.delay = 0, 0, 0.0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # One packet per answer; otherwise each would wait for the client's delayed acknowledgement.
            wbufsize = -1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
                found = re.search(r"<draft>\n(.*?)\n</draft>", said, re.DOTALL)
                draft = found[1] if found else said
                with outer.lock:
                    nth = outer.asked[draft]
                    outer.asked[draft] += 1
                    outer.times.setdefault(draft, []).append(time.monotonic())
                    outer.bodies.append(body)
                    outer.keys.add(self.headers["Authorization"])
                    outer.in_flight += 1
                    outer.most = max(outer.most, outer.in_flight)
                time.sleep(outer.delay)
                try:
                    assert self.path == ("/v1/chat/completions" if "messages" in body else "/v1/completions")
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self.reply(outer.script(draft, nth))
                finally:
                    with outer.lock:
                        outer.in_flight -= 1

            def reply(self, what: Any) -> None:
                """text = an answer; dict: text, finish, refusal, usage; or raw (body), status, headers;
                sleep, drip (seconds per byte); hang_up."""
                what = {"text": what} if isinstance(what, str) else what
                time.sleep(what.get("sleep", 0))
                if what.get("hang_up"):
                    self.close_connection = True
                    return
                choice = {
                    "index": 0,
                    "finish_reason": what.get("finish", "stop"),
                    "text": what.get("text"),
                    "message": {
                        "role": "assistant",
                        "content": what.get("text"),
                        "refusal": what.get("refusal"),
                    },
                }
                raw = what.get(
                    "raw",
                    json.dumps(
                        {
                            "id": "x",
                            "object": "chat.completion",
                            "created": 0,
                            "model": "m",
                            "choices": [choice],
                            "usage": what.get(
                                "usage", {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                            ),
                        }
                    ),
                )
                self.send_response(what.get("status", 200))
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(raw.encode())),
                    **what.get("headers", {}),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in raw if what.get("drip") else [raw]:
                    self.wfile.write(piece.encode())
                    if what.get("drip"):
                        self.wfile.flush()
                        time.sleep(what["drip"])

            def log_message(self, *args: Any) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
