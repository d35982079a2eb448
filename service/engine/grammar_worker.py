"""A separate process that tries grammars out before an engine gets them.

`python -m service.engine.grammar_worker` reads requests from its standard input and writes verdicts
to its standard output. A frame is four bytes of length and then JSON. Each grammar is tried in a
fork, which may crash or exceed its limits on processor time and memory without harm to others.

A verdict is `{"id", "why"}`. `why` is empty where the grammar may be used.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import struct
import sys
import threading
import time
from typing import Any

import orjson

# The stack of a trial in bytes. Every engine thread has a larger stack.
_STACK_BYTES = 1024 * 1024
_MEMORY_BYTES = 2 * 1024**3
# The number of tokens that a compiled grammar is tried with.
_STEPS = 4
_PLACE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
COSTLY = "it takes an engine too much time to prepare; make it smaller, or repeat less in it"
CRASHED = "an engine can't process it; make it smaller and less nested"


def frame(data: dict[str, Any]) -> bytes:
    """Encode one message as a frame, in either direction."""
    body = orjson.dumps(data)
    return struct.pack(">I", len(body)) + body


class Trial:
    """The trial of one grammar.

    It parses the grammar as vLLM's front end does, and compiles and steps it as the core does.
    """

    def __init__(self, request: dict[str, Any], info: Any) -> None:
        self._request = request
        self._info = info
        self.why = CRASHED

    def run(self) -> None:
        """Set `why`."""
        began_s = time.thread_time()
        try:
            self._read()
            if time.thread_time() - began_s > self._request["hold_s"]:
                self.why = COSTLY
                return
            self.why = self._compile() if self._info is not None else ""
        except Exception as error:
            self.why = f"it is not valid: {_words(error)}"

    def _read(self) -> None:
        import xgrammar as xgr

        kind, spec = self._request["kind"], self._request["spec"]
        if kind == "json":
            xgr.Grammar.from_json_schema(spec)
        elif kind == "regex":
            xgr.Grammar.from_regex(spec)
        elif kind == "ebnf":
            xgr.Grammar.from_ebnf(spec)
        elif kind == "lark":
            xgr.Grammar.from_lark(spec)
        else:
            xgr.Grammar.from_structural_tag(*_tag(spec))

    def _compile(self) -> str:
        import xgrammar as xgr

        compiler = xgr.GrammarCompiler(self._info, max_threads=1)
        kind, spec = self._request["kind"], self._request["spec"]
        try:
            if kind == "json":
                compiled = compiler.compile_json_schema(spec)
            elif kind == "regex":
                compiled = compiler.compile_regex(spec)
            elif kind == "ebnf":
                compiled = compiler.compile_grammar(spec)
            elif kind == "lark":
                compiled = compiler.compile_lark(spec)
            else:
                compiled = compiler.compile_structural_tag(*_tag(spec))
        except Exception as error:
            return f"it can't be compiled: {_words(error)}"
        matcher = xgr.GrammarMatcher(compiled)
        mask = xgr.allocate_token_bitmask(1, self._info.vocab_size)
        for _ in range(_STEPS):
            began_s = time.thread_time()
            matcher.fill_next_token_bitmask(mask)
            words = mask[0].nonzero()
            if time.thread_time() - began_s > self._request["hold_s"]:
                return COSTLY
            if not len(words):
                return ""
            word = int(words[len(words) // 2])
            bits = int(mask[0, word]) & 0xFFFFFFFF
            matcher.accept_token(word * 32 + (bits & -bits).bit_length() - 1)
            if matcher.is_terminated():
                return ""
        return ""


def _tag(spec: str) -> tuple[Any, ...]:
    """Return the arguments of `from_structural_tag` for a tag in the old or the new format."""
    import xgrammar as xgr

    tag = orjson.loads(spec)
    if "structures" not in tag:
        return (spec,)
    items = [
        xgr.StructuralTagItem(
            begin=item["begin"], schema=orjson.dumps(item["schema"]).decode(), end=item["end"]
        )
        for item in tag["structures"]
    ]
    return items, tag["triggers"]


def _words(error: Exception) -> str:
    """Return the first line of an error without its location in source code."""
    if isinstance(error, (KeyError, TypeError)):
        return "a part of it is missing or of the wrong kind"
    lines = _PLACE.sub("", str(error)).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    if line.startswith("Check failed"):
        return "the grammar compiler does not support it"
    return line[:300]


def _try(request: dict[str, Any], info: Any, out: int) -> None:
    """Try a grammar in a fork, write the verdict, and exit."""
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
    hard_s = int(request["cpu_s"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (hard_s, hard_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))
    trial = Trial(request, info)
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=trial.run)
    thread.start()
    thread.join()
    os.write(out, frame({"id": request["id"], "why": trial.why}))
    os._exit(0)


class Worker:
    """The loop of the process. It forks for each request and reports forks that crash."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._infos: dict[str, Any] = {}
        self._running: dict[int, int] = {}
        self._data = bytearray()

    def run(self) -> None:
        """Run until the standard input is closed."""
        wake, woken = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken)
        while True:
            ready, _, _ = select.select([0, wake], [], [])
            if wake in ready:
                os.read(wake, 4096)
                self._reap()
            if 0 in ready:
                data = os.read(0, 1 << 20)
                if not data:
                    return
                self._data += data
                self._read_requests()

    def _read_requests(self) -> None:
        while len(self._data) >= 4:
            (length,) = struct.unpack(">I", self._data[:4])
            if len(self._data) < 4 + length:
                return
            request = orjson.loads(self._data[4 : 4 + length])
            del self._data[: 4 + length]
            if "info" in request:
                import xgrammar as xgr

                info = xgr.TokenizerInfo.deserialize_json(request["info"])
                self._infos[request["tokenizer"]] = info
                continue
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(0)
                    _try(request, self._infos.get(request["tokenizer"]), self._out)
                finally:
                    os._exit(1)
            self._running[pid] = request["id"]

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number = self._running.pop(pid)
            if status == 0:
                continue  # the fork has written its own verdict
            by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            why = COSTLY if by in (signal.SIGPROF, signal.SIGXCPU) else CRASHED
            os.write(self._out, frame({"id": number, "why": why}))


def main() -> int:
    """Serve the parent process until it closes the pipe."""
    # Output of native code is discarded, because it may quote a request or look like a verdict.
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    import xgrammar

    del xgrammar
    os.nice(5)
    Worker(out).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
