"""Section `experts.NAME.command`: a server of somebody else's that we start and stop."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.section_base import ENV_VARIABLE_PATTERN, Bytes, Section, shown

PORT = "port"
# Doubled braces belong to templates and stay as they are. JSON has quotes after its braces.
_PLACEHOLDER = re.compile(r"(?<!\{)\{([A-Za-z_][A-Za-z0-9_]*)\}(?!\})")
_SERVER_URL = r"^http://(127\.0\.0\.1|localhost|\[::1\]):\{port\}(/[^\s?#]*)?$"
_PATH = r"^/[^\s#]*$"
# In YAML such a word is easily a number or a truth value, so the error says to quote it.
_EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
_Argument = Annotated[str, Field(max_length=65_536)]


class ServerCall(Section):
    """A call of the server that puts it to sleep or wakes it."""

    url: str = Field(
        pattern=_PATH,
        max_length=2048,
        description="Path and query on the server, from its root: `/sleep?level=1`.",
    )
    method: Literal["POST", "GET", "PUT"] = Field("POST", description="HTTP method.")
    body: str = Field("", max_length=65_536, description="Body, sent as JSON. Default: none.")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="Longest duration, in s.")


class SleepCall(ServerCall):
    """The call that puts the server to sleep."""

    memory_bytes: Bytes | None = Field(
        None,
        description="Host memory that the server keeps while it sleeps, in bytes. Default: its "
        "`memory_bytes`.",
    )


class CommandConfig(Section):
    """A command that starts a server with an OpenAI-compatible API. Linux only."""

    run: tuple[_Argument, ...] = Field(
        min_length=1,
        max_length=1024,
        description="Program and arguments, without a shell. `{port}` becomes the port that the "
        "server has to listen on; braces in pairs, as in templates, stay as they are.",
    )
    url: str = Field(
        "http://127.0.0.1:{port}/v1",
        pattern=_SERVER_URL,
        description="Base URL of its OpenAI-compatible API on this machine, with `{port}`.",
    )
    ready: str = Field(
        "/health",
        pattern=_PATH,
        max_length=2048,
        description="Path from the server's root that answers 2xx once it can be asked.",
    )
    memory_bytes: Bytes = Field(
        description="Memory that the server takes while it runs, in bytes: on a GPU of that, "
        "else of the host.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Name of the model in requests to the server. Default: the expert's name.",
    )
    endpoints: tuple[
        Literal[
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/v1/rerank",
            "/v1/score",
            "/v1/classify",
            "/v1/audio/transcriptions",
            "/v1/responses",
            "/v1/responses/input_tokens",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/tokenize",
            "/detokenize",
        ],
        ...,
    ] = Field(
        (),
        description="Endpoints that the server has. Default: chat completions and completions by "
        "the capability `chat` or `completions`, and those of embeddings, rerank, score, classify "
        "and transcription by the capability of that name.",
    )
    cache_salt: bool = Field(
        False,
        description="The server knows vLLM's field cache_salt. Tenants then share no prefix there.",
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Context of the server in tokens. Default: unknown."
    )
    sleep: SleepCall | None = Field(
        None,
        description="Puts the server to sleep, so that another expert of its slot can run; needs "
        "`wake`. Default: the server is stopped.",
    )
    wake: ServerCall | None = Field(None, description="Wakes the server from `sleep`.")
    env: dict[_EnvName, str] = Field(
        default_factory=dict,
        description="Environment variables of the server beside those of the pool; `{port}` is "
        "replaced. No keys: name their variables in `secret_env`.",
    )
    secret_env: tuple[Annotated[str, Field(pattern=ENV_VARIABLE_PATTERN)], ...] = Field(
        (),
        description="Variables of the pool's environment that hold keys and that the server needs, "
        "such as HF_TOKEN. It gets no others with the name of a key.",
    )
    cwd: str | None = Field(
        None, description="Working directory of the server. Default: the config's folder."
    )
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGKILL"] = Field(
        "SIGTERM", description="Signal to all its processes that asks them to stop."
    )
    stop_timeout_s: float = Field(
        10.0,
        ge=0,
        le=600,
        description="Time to stop, in s. All its processes are killed after that.",
    )
    ready_timeout_s: float = Field(
        600.0,
        gt=0,
        le=86_400,
        description="Time until it is ready, in s. It is stopped after that.",
    )
    health_timeout_s: float | None = Field(
        60.0,
        gt=0,
        description="The server is started again after this time in which `ready` did not answer "
        "and no answer went on, in s. null: never.",
    )

    @model_validator(mode="after")
    def _check(self) -> CommandConfig:
        if not self.run[0].strip():
            raise ValueError("run: the program is empty")
        for where, text in self._texts():
            if "\x00" in text:
                raise ValueError(f"{where}: a NUL character can't be in an argument")
            for name in _PLACEHOLDER.findall(text):
                if name != PORT:
                    raise ValueError(
                        f"{where}: unknown placeholder {{{name}}} in {shown(text)}; the only one "
                        "is {port}"
                    )
        if not any(_has_port(text) for _, text in self._texts()):
            raise ValueError(
                "run: {port} is in no argument and in no variable of env, so that the server "
                "would not know on which port to listen"
            )
        if (self.sleep is None) != (self.wake is None):
            raise ValueError("sleep and wake go together")
        if clash := sorted(set(self.env) & set(self.secret_env)):
            raise ValueError(f"secret_env: {clash[0]} is in env as well")
        return self

    def _texts(self) -> Iterator[tuple[str, str]]:
        for i, argument in enumerate(self.run):
            yield f"run.{i}", argument
        for name, value in self.env.items():
            yield f"env.{name}", value

    @property
    def signal_number(self) -> int:
        """The number of `stop_signal`."""
        return int(signal.Signals[self.stop_signal])

    @property
    def sleep_bytes(self) -> int:
        """Bytes of host memory that the sleeping server keeps; 0 where it can't sleep."""
        if self.sleep is None:
            return 0
        return self.memory_bytes if self.sleep.memory_bytes is None else self.sleep.memory_bytes


def _has_port(text: str) -> bool:
    return PORT in _PLACEHOLDER.findall(text)


def with_port(text: str, port: int) -> str:
    """Return the text with the port in the place of `{port}`."""
    return _PLACEHOLDER.sub(lambda match: str(port) if match[1] == PORT else match[0], text)
