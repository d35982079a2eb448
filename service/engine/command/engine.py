"""An engine that is a server of somebody else's, with an OpenAI-compatible API.

`start` runs the command on a port of our choice and waits until the server is ready; `stop` ends it
with every process that came from it. Requests go to it over loopback, and the bytes of its answers
go on as they come, but for the model's name where it has another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from service.config.command_experts import CommandConfig, ServerCall, with_port
from service.engine.audio_upload import audio_upload
from service.engine.cache_salt import combine_salts
from service.engine.command import port_owner
from service.engine.command.server_log import LOG_BYTES, last_lines, log_path
from service.engine.command.server_process import ServerOrder, ServerProcess, ending
from service.engine.deferred_response_start import DeferredStartSend
from service.engine.engine_interface import (
    EngineReport,
    EngineRequest,
    LoadResult,
    Send,
    SwapResult,
)
from service.engine.scoped_env import secret_variables, whole_environment
from service.errors import (
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    InvalidRequestError,
    OverCapacityError,
    UpstreamError,
)
from service.http.asgi_helpers import LineBuffer, body_message, start_response
from service.http.prompt_endpoints import AUDIO, UPSTREAM_PATHS
from service.http.reply_depth import check_events, check_reply
from service.http.reply_model_name import rename_lines, rename_reply
from service.rpc.http_connections import HttpConnection, HttpConnections, HttpReply

log = logging.getLogger("coe.engine")

_PORTS_TRIED = 4
_CONNECT_S = 5.0
_PIECE_BYTES = 2**16
_ERROR_BYTES = 2**16
_ANSWER_BYTES = 64 * 1024**2
_LINE_BYTES = 8 * 1024**2
# Between two questions whether the server is ready: a share of the time so far, within bounds.
_POLL_SHARE, _FIRST_POLL_S, _LAST_POLL_S = 0.05, 0.005, 0.05
_POLL_TIMEOUT_S = 10.0
_HEALTH_EVERY_S = 5.0
# A server's end and the loss of its connections reach us in either order.
_END_NOTICED_S = 0.25
# Streams of chat and of completions end with it.
_LAST_EVENT = b"data: [DONE]"
# Some servers that rank answer with a list.
_JSON_BEGINS = (b"{", b"[")
_LINES_TOLD, _CHARS_TOLD = 8, 1200
# A vLLM of ours reads these. They would make another one load modules that it lacks.
_OURS = ("VLLM_LOGGING_CONFIG_PATH", "VLLM_RPC_BASE_PATH", "OMP_NUM_THREADS")
_SALTED = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify"),
)


class ServerRefusedError(Exception):
    """The server answered a call of ours with an error, or not at all."""


class CommandEngine:
    """A server that a command starts.

    Args:
        name: The expert's name, as the engine gets it in requests.
        command: The command.
        endpoints: The endpoints that the server has.
        env: The server's environment, before `command.env`.
        secrets: Keys in that environment. They are never shown.
        logs: The folder for its log.
    """

    def __init__(
        self,
        name: str,
        command: CommandConfig,
        endpoints: Collection[str],
        env: Mapping[str, str],
        secrets: Collection[str],
        logs: Path,
    ) -> None:
        self._name = name
        self._command = command
        self._endpoints = frozenset(endpoints)
        self._env = env
        self._secrets = secrets
        self._log = log_path(logs, name)
        # Weights that share a name with others are held under a name with a tilde.
        self._model = command.model or name.partition("~")[0]
        url = urlsplit(with_port(command.url, 0))
        self._host = url.hostname or "127.0.0.1"
        self._base = url.path.rstrip("/").removesuffix("/v1")
        # Most servers repeat the name that they were asked for. Such lines need no change.
        self._repeated = b'"model":' + orjson.dumps(name)
        self._process: ServerProcess | None = None
        self._connections: HttpConnections | None = None
        self._health: asyncio.Task[None] | None = None
        self._alive_s = 0.0
        self._sick: str | None = None
        # Why the server is not ready yet: a wrong path shows here.
        self._refusal = ""
        self._stopped = False
        self._running = 0

    # --- the server's life

    async def start(self) -> EngineReport:
        """Start the server on a free port, and wait until it is ready.

        Raises:
            ExpertFailedError: The command is not there, it ended, or it was not ready in time. The
                message has the last lines of its log.
        """
        try:
            async with asyncio.timeout(self._command.ready_timeout_s):
                await self._start()
        except TimeoutError:
            await self._end()
            last = f" ({self._refusal})" if self._refusal else ""
            raise self._failed(
                f"it was not ready within {self._command.ready_timeout_s:g} s{last}"
            ) from None
        except BaseException:
            await self._end()
            raise
        self._alive_s = time.monotonic()
        if self._command.health_timeout_s is not None:
            self._health = asyncio.create_task(self._watch_health(self._command.health_timeout_s))
        return EngineReport(
            "command",
            self._command.max_model_len or 0,
            self._endpoints,
            {"program": Path(self._command.run[0]).name},
        )

    async def _start(self) -> None:
        for _ in range(_PORTS_TRIED):
            port = port_owner.free_port(self._host)
            self._process = process = await ServerProcess.start(self._order(port))
            self._connections = HttpConnections(self._host, port, _CONNECT_S)
            if await self._is_ready(process):
                if await asyncio.to_thread(port_owner.is_owner, process.keeper_pid, port):
                    return
                # The server may have ended just now, and then it had answered itself.
                why = "it ended" if process.status is not None else ""
            else:
                why = f"it ended ({ending(process.status or 0)}) before it was ready"
            if why and not await asyncio.to_thread(port_owner.is_taken, port):
                raise self._failed(why)
            log.warning("port %d of expert %s was taken by another process", port, self._name)
            await self._end()
        raise self._failed(f"others took its port {_PORTS_TRIED} times")

    def _order(self, port: int) -> ServerOrder:
        command = self._command
        own = {name: with_port(value, port) for name, value in command.env.items()}
        try:
            self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ExpertFailedError(
                f"its log can't be written: {error.strerror}", retry_after_s=30
            ) from None
        return ServerOrder(
            argv=tuple(with_port(argument, port) for argument in command.run),
            env={**self._env, **own},
            cwd=command.cwd,
            stop_signal=command.signal_number,
            stop_timeout_s=command.stop_timeout_s,
            log=self._log,
            log_bytes=LOG_BYTES,
        )

    async def _is_ready(self, process: ServerProcess) -> bool:
        """Wait until the server is ready. Return False where it ends before that."""
        ready = asyncio.create_task(self._poll_until_ready())
        ended = asyncio.create_task(process.ended.wait())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            return ready.done()
        finally:
            ready.cancel()
            ended.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)

    async def _poll_until_ready(self) -> None:
        began_s = time.monotonic()
        while True:
            try:
                await self._ask("GET", self._command.ready, _POLL_TIMEOUT_S)
            except ServerRefusedError as error:
                self._refusal = str(error)
                share_s = _POLL_SHARE * (time.monotonic() - began_s)
                await asyncio.sleep(min(_LAST_POLL_S, max(_FIRST_POLL_S, share_s)))
            else:
                return

    async def _ask(self, method: str, path: str, timeout_s: float, body: bytes = b"") -> None:
        """Call the server, and ignore the body of its answer.

        Raises:
            ServerRefusedError: It did not answer with 2xx.
        """
        connections = self._connections
        assert connections is not None
        headers = {"content-type": "application/json"} if body else {}
        connection: HttpConnection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = await connections.take()
                reply = await connection.request(connections.head(path, headers, method), body)
                while await reply.body.read(_PIECE_BYTES):
                    pass
        except TimeoutError:
            raise ServerRefusedError(f"{path}: no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ServerRefusedError(f"{path}: {type(error).__name__}") from None
        finally:
            if connection is not None:
                connections.give_back(connection)
        if not 200 <= reply.status < 300:
            raise ServerRefusedError(f"{path}: status {reply.status}")

    async def _watch_health(self, timeout_s: float) -> None:
        """Ask regularly whether the server is there. It is not when nothing comes from it."""
        every_s = min(_HEALTH_EVERY_S, timeout_s / 4)
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._ask("GET", self._command.ready, min(_POLL_TIMEOUT_S, timeout_s))
                self._alive_s = time.monotonic()
            except ServerRefusedError as error:
                if time.monotonic() - self._alive_s > timeout_s:
                    self._sick = f"it did not answer {error} for {timeout_s:g} s"
                    return

    def _failed(self, why: str) -> ExpertFailedError:
        # Only of this start: what it wrote while it served may hold prompts.
        lines = last_lines(self._log, _LINES_TOLD, self._secrets)
        text = " | ".join(lines)
        if len(text) > _CHARS_TOLD:
            text = "…" + text[-_CHARS_TOLD:]
        told = f"; its log ends: {text}" if text else "; it wrote nothing"
        return ExpertFailedError(f"the server of {self._name!r}: {why}{told}", retry_after_s=30)

    def failure(self) -> str | None:
        """Return why the engine is dead, or None."""
        if self._stopped:
            return "it was stopped"
        process = self._process
        if process is not None and process.status is not None:
            return f"its server ended ({ending(process.status)})"
        return self._sick

    async def stop(self) -> None:
        """Stop the server and all its processes."""
        self._stopped = True
        await self._end()

    async def _end(self) -> None:
        health, self._health = self._health, None
        if health is not None:
            health.cancel()
        if self._connections is not None:
            self._connections.close()
        # A second call has to wait as well, so the process stays known.
        if self._process is not None:
            await self._process.stop()

    # --- sleep

    async def sleep(self) -> None:
        """Let the server free its memory.

        Raises:
            EngineDeadError: It refused.
        """
        call = self._command.sleep
        assert call is not None
        health, self._health = self._health, None
        if health is not None:
            # Some servers do not answer while they sleep.
            health.cancel()
        await self._must(call)

    async def wake(self) -> None:
        """Let the server take its memory again, and wait until it is ready.

        Raises:
            EngineDeadError: It refused, or it was not ready in time.
        """
        call, process = self._command.wake, self._process
        assert call is not None
        assert process is not None
        await self._must(call)
        try:
            async with asyncio.timeout(self._command.ready_timeout_s):
                if not await self._is_ready(process):
                    raise EngineDeadError(f"the server of {self._name!r} ended while it woke")
        except TimeoutError:
            raise EngineDeadError(
                f"the server of {self._name!r} was not ready within "
                f"{self._command.ready_timeout_s:g} s after it was woken"
            ) from None
        self._alive_s = time.monotonic()
        if self._command.health_timeout_s is not None:
            self._health = asyncio.create_task(self._watch_health(self._command.health_timeout_s))

    @property
    def can_rest(self) -> bool:
        """Whether the server has a call for it."""
        return self._command.sleep is not None

    async def rest(self) -> None:
        await self.sleep()

    async def resume(self) -> None:
        await self.wake()

    async def _must(self, call: ServerCall) -> None:
        try:
            await self._ask(call.method, call.url, call.timeout_s, call.body.encode())
        except ServerRefusedError as error:
            raise EngineDeadError(f"the server of {self._name!r} refused {error}") from None

    # --- weights

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Do nothing, because the server has its weights from the start.

        Raises:
            ExpertFailedError: The expert is another one.
        """
        if expert != self._name:
            raise ExpertFailedError(f"the server of {self._name!r} has no {expert!r}")

    async def unload(self, expert: str) -> None:
        """Do nothing, because nothing was loaded."""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """Only the server's own expert."""
        return frozenset({self._name})

    async def load_to_host(self, expert: str) -> LoadResult:
        raise ExpertFailedError(f"the server of {self._name!r} can't hold {expert!r}")

    async def swap_in(self, expert: str) -> SwapResult:
        raise ExpertFailedError(f"the server of {self._name!r} can't run {expert!r}")

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Do nothing, because nothing is held beside what runs."""

    # --- requests

    async def in_flight(self) -> int:
        """Return the number of running requests."""
        return self._running

    async def run(self, request: EngineRequest, send: Send) -> None:
        connections = self._connections
        if connections is None or (why := self.failure()) is not None:
            raise EngineRestartingError(f"the engine of expert {request.expert!r} died: {why}")
        kind = "application/json"
        if request.endpoint == AUDIO:
            upload = await asyncio.to_thread(audio_upload, request.body, self._model)
            kind, body = upload.content_type, upload.body
        else:
            body = self._addressed(request)
        headers = {
            **request.trace,
            "content-type": kind,
            "accept": "*/*",
            "accept-encoding": "identity",
            "x-request-id": request.request_id,
        }
        path = UPSTREAM_PATHS.get(request.endpoint, request.endpoint)
        head = connections.head(self._base + path, headers)
        reply = DeferredStartSend(send)
        connection: HttpConnection | None = None
        self._running += 1
        try:
            while True:
                connection = await connections.take()
                try:
                    answer = await connection.request(head, body)
                    break
                except ConnectionError:
                    if not connection.idle_since_s:
                        raise
                    # Servers close idle connections, and this request met one that ended.
                    connections.give_back(connection)
            await self._pass_on(answer, reply, request)
        except OSError as error:
            # Where it did not end, it closed the connection, which is as fatal for this request.
            raise EngineDeadError(
                f"the engine of expert {request.expert!r} died: {await self._why_lost(error)}"
            ) from None
        finally:
            self._running -= 1
            if connection is not None:
                # A reply that has not ended is cut off, so that the server stops making it.
                connections.give_back(connection)
        if reply.error is not None:
            await self._refuse(*reply.error, request.expert, reply)

    async def _why_ended(self) -> str | None:
        """Why the engine is dead, once the server's end would have been noticed; None if not."""
        if self._process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_NOTICED_S):
                    await self._process.ended.wait()
        return self.failure()

    async def _why_lost(self, error: OSError) -> str:
        return (
            await self._why_ended()
            or f"the connection to its server was lost ({type(error).__name__})"
        )

    async def _pass_on(
        self, answer: HttpReply, send: DeferredStartSend, request: EngineRequest
    ) -> None:
        """Pass an answer on as it comes.

        Raises:
            EngineDeadError: The answer has no end, or a line without one, or was cut off.
            UpstreamError: It is no JSON, or nested too deep to be sent on.
        """
        expert = request.expert
        content_type = answer.headers.get("content-type", "application/json").lower()
        status = answer.status
        if 300 <= status < 400 or status in (401, 403):
            # The client is not to blame, and can't log in there.
            raise ExpertFailedError(f"the server of {expert!r} refused us with status {status}")
        await send(start_response(status, [(b"content-type", content_type.encode("latin-1"))]))
        if status >= 400 or not content_type.startswith("text/event-stream"):
            most = _ERROR_BYTES if status >= 400 else _ANSWER_BYTES
            body = await self._whole(answer, most, expert)
            is_json = status < 400 and content_type.startswith("application/json")
            if is_json and _ends_with_connection(answer) and not _is_json(body):
                raise EngineDeadError(f"the server of {expert!r} cut its answer off")
            if status < 400:
                if request.endpoint != AUDIO and body.lstrip()[:1] not in _JSON_BEGINS:
                    # An empty answer, a page, or a compressed one is no answer of this API.
                    raise UpstreamError(
                        f"the server of expert {expert!r} answered with no JSON", status=502
                    )
                check_reply(body, expert)
            await send(body_message(body if status >= 400 else rename_reply(body, expert)))
            return
        lines = LineBuffer()
        held = 0
        done = False
        while piece := await answer.body.read(_PIECE_BYTES):
            self._alive_s = time.monotonic()
            whole = lines.take(piece, ends=False)
            held = 0 if whole else held + len(piece)
            if held > _LINE_BYTES:
                raise EngineDeadError(f"the server of {expert!r} sent a line without an end")
            if whole:
                done = _LAST_EVENT in whole
                await send(body_message(self._named(whole, expert), more=True))
        rest = lines.take(b"", ends=True)
        if _ends_with_connection(answer) and not done and _LAST_EVENT not in rest:
            # The end of a server that dies looks like the end of such an answer.
            if rest:
                await send(body_message(self._named(rest, expert), more=True))
                rest = b""
            if (why := await self._why_ended()) is not None:
                raise EngineDeadError(f"the engine of expert {expert!r} died: {why}")
        await send(body_message(self._named(rest, expert)))
        if not send.started and send.error is None:
            raise EngineDeadError(f"the server of {expert!r} sent an empty answer")

    def _named(self, lines: bytes, expert: str) -> bytes:
        check_events(lines, expert)
        if lines.count(b'"model"') == lines.count(self._repeated):
            return lines
        return rename_lines(lines, expert)

    async def _whole(self, answer: HttpReply, most_bytes: int, expert: str) -> bytes:
        body = bytearray()
        while piece := await answer.body.read(_PIECE_BYTES):
            self._alive_s = time.monotonic()
            body += piece
            if len(body) > most_bytes:
                raise EngineDeadError(f"the server of {expert!r} sent more than any answer has")
        return bytes(body)

    async def _refuse(
        self, status: int, error: bytes, expert: str, reply: DeferredStartSend
    ) -> None:
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            raise OverCapacityError(f"the server of expert {expert!r} is overloaded")
        if status >= 500 and (why := self.failure()) is not None:
            raise EngineDeadError(f"the engine of expert {expert!r} died: {why}")
        await reply.send_error()

    def _addressed(self, request: EngineRequest) -> bytes:
        """Return the body with the server's name of the model, and without fields of vLLM's.

        Raises:
            InvalidRequestError: The body is no JSON object.
        """
        try:
            data: Any = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise InvalidRequestError("the body has to be a JSON object")
        options = data.get("stream_options")
        if isinstance(options, dict) and "continuous_usage_stats" in options:
            known = {k: v for k, v in options.items() if k != "continuous_usage_stats"}
            data = {**data, "stream_options": known}
        given = data.get("cache_salt")
        is_salted = request.cache_salt and request.endpoint in _SALTED
        if is_salted and (given or self._command.cache_salt):
            data = {**data, "cache_salt": combine_salts(request.cache_salt, given)}
        try:
            return orjson.dumps({**data, "model": self._model})
        except orjson.JSONEncodeError:
            raise InvalidRequestError("the body is nested too deep") from None


def _ends_with_connection(answer: HttpReply) -> bool:
    """Whether nothing but the end of the connection tells where an answer ends."""
    chunked = "chunked" in answer.headers.get("transfer-encoding", "")
    return not chunked and "content-length" not in answer.headers


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def default_endpoints(capabilities: Collection[str]) -> frozenset[str]:
    """Return the endpoints of a server whose config names none."""
    by_capability = {
        "chat": "/v1/chat/completions",
        "completions": "/v1/completions",
        "embeddings": "/v1/embeddings",
        "rerank": "/v1/rerank",
        "score": "/v1/score",
        "classify": "/v1/classify",
        "transcription": AUDIO,
    }
    return frozenset(path for name, path in by_capability.items() if name in capabilities)


def server_environment(
    command: CommandConfig, named: Collection[str], devices: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return the environment of a server from this process's.

    Another engine may start meanwhile, whose environment this process then has in parts.

    Args:
        command: The command.
        named: Variables of this process that hold keys, beside those whose names show it.
        devices: The value of CUDA_VISIBLE_DEVICES; None leaves it as it is.

    Returns:
        The environment before `command.env`, and the keys in it.

    Raises:
        ExpertFailedError: A variable of `secret_env` is not set.
    """
    whole = whole_environment()
    for name in command.secret_env:
        if not whole.get(name):
            raise ExpertFailedError(
                f"the environment variable {name} of its secret_env is not set", retry_after_s=60
            )
    withheld = {*secret_variables(named, whole), *_OURS} - set(command.secret_env)
    env = {name: value for name, value in whole.items() if name not in withheld}
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices
    return env, [whole[name] for name in command.secret_env]
