"""A server of somebody else's, for engines by command: OpenAI-compatible, and misbehaving as asked.

It is a program of its own that imports the standard library only:

    python foreign_server.py --port 8000 [--hang] [--flood 1000000] ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATH = str(Path(__file__).resolve())


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--start-s", type=float, default=0.0, help="until it listens")
    parser.add_argument("--ready-s", type=float, default=0.0, help="503 until then")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--hang", action="store_true", help="take connections, never answer")
    parser.add_argument("--exit", type=int, help="exit at once with this status")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--fork", choices=("child", "session", "double"))
    parser.add_argument("--pids", help="file to which it and its children add their process ids")
    parser.add_argument("--flood", type=int, default=0, help="bytes of log at the start")
    parser.add_argument("--say", default="", help="a line of log")
    parser.add_argument("--say-env", default="", help="a variable whose value it logs")
    parser.add_argument("--model", default="", help="the model's name in its answers")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--step-s", type=float, default=0.0, help="between two tokens")
    parser.add_argument("--hold", help="file that must be there before a second token")
    parser.add_argument("--aborts", help="file to which it adds a line for each abort")
    parser.add_argument("--sleep-s", type=float, default=0.0)
    parser.add_argument("--refuse-sleep", action="store_true")
    parser.add_argument("--refuse-wake", action="store_true")
    return parser


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.began_s = time.monotonic()
        self.sick = self.asleep = self.has_closed = False
        super().__init__(("127.0.0.1", given.port), Handler)

    @property
    def ready(self) -> bool:
        passed = time.monotonic() - self.began_s >= self.given.ready_s
        return passed and not self.given.never_ready and not self.sick

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address  # clients leave


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        if self.server.given.hang:
            time.sleep(3600)
        if self.path == "/sick":
            self.server.sick = True
        self._answer(200 if self.server.ready else 503, {"status": "ok"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/audio/transcriptions":
            is_form = self.headers["content-type"].startswith("multipart/form-data")
            text = f"{raw.count(b'RIFF')} recording" if is_form else "no form"
            self._answer(200, {"text": text, "usage": {"type": "duration", "seconds": 2}})
            return
        body = json.loads(raw or b"{}")
        given = self.server.given
        if self.path.startswith("/sleep"):
            time.sleep(given.sleep_s)
            self.server.asleep = not given.refuse_sleep
            self._answer(500 if given.refuse_sleep else 200, {})
        elif self.path.startswith("/wake"):
            self.server.asleep = given.refuse_wake
            self._answer(500 if given.refuse_wake else 200, {})
        elif self.server.asleep:
            self._answer(500, {"error": {"message": "asleep"}})
        elif self.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
            self._answer(200, self._named({"object": "list", "data": data}, body))
        elif self.path == "/v1/rerank":
            results = [{"index": 0, "relevance_score": 0.5}]
            self._answer(200, self._named({"results": results}, body))
        elif self.path == "/classify":
            data = [{"index": 0, "label": "x", "probs": [1.0], "num_classes": 1}]
            self._answer(200, self._named({"data": data}, body))
        elif self.path == "/v1/chat/completions":
            self._chat(body)
        else:
            self._answer(404, {"detail": "Not Found"})

    def _named(self, reply: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        return {**reply, "model": self.server.given.model or body["model"], "usage": usage}

    def _chat(self, body: dict[str, Any]) -> None:
        said = body["messages"][-1]["content"]
        if said == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if said == "refuse":
            self._answer(400, {"error": {"message": "no such field", "type": "x", "code": None}})
            return
        if said == "busy":
            self._answer(503, {"error": {"message": "full"}})
            return
        if said == "fail":
            self._answer(500, {"error": {"message": "a fault"}})
            return
        if said == "close once" and self.server.has_closed:
            said = "hello"
        if said in ("close", "close once"):
            self.server.has_closed = True
            self.close_connection = True
            self.connection.shutdown(2)
            return
        given = self.server.given
        words = [f"{body['model']}{i}" for i in range(given.tokens)]
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            whole = {"id": "a", "object": "chat.completion", "choices": choices}
            self._answer(200, self._named({**whole, "echo": body}, body))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for i, word in enumerate(words):
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                self._event({"object": "chat.completion.chunk", "choices": [choice]}, body)
                time.sleep(given.step_s)
                while i == 0 and given.hold and not os.path.exists(given.hold):
                    time.sleep(0.005)
                if said == "break off" and i == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            if (body.get("stream_options") or {}).get("include_usage"):
                self._event({"object": "chat.completion.chunk", "choices": []}, body)
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            if given.aborts:
                with open(given.aborts, "a") as file:
                    file.write("aborted\n")
            raise

    def _event(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        named = self._named(event, body)
        if event["choices"]:
            del named["usage"]
        self._chunk(b"data: " + json.dumps(named).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _note(pids: str | None) -> None:
    if pids:
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\n")


def _fork(kind: str, given: argparse.Namespace) -> None:
    """Start a child that outlives it: of its group, of a session of its own, or forked twice."""
    if os.fork():
        return
    if kind != "child":
        os.setsid()
    if kind == "double" and os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _note(given.pids)
    time.sleep(3600)


def main() -> None:
    given = options().parse_args()
    _note(given.pids)
    if given.say:
        print(given.say, flush=True)
    if given.say_env:
        print(f"the key is {os.environ.get(given.say_env)}", flush=True)
    if given.exit is not None:
        sys.exit(given.exit)
    if given.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    if given.fork:
        _fork(given.fork, given)
    line = b"x" * 99 + b"\n"
    for _ in range(given.flood // len(line)):
        os.write(1, line)
    if given.flood:
        os.write(1, b"the flood ends\n")
    time.sleep(given.start_s)
    server = Server(given)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        signal.pause()


def command(*arguments: str, python: str = sys.executable) -> list[str]:
    """Return the command of this server, with `{port}`."""
    return [python, "-I", "-S", PATH, "--port", "{port}", *arguments]


if __name__ == "__main__":
    main()
