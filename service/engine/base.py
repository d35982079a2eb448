"""What a pool asks of an engine.

An engine answers by ASGI messages: one `http.response.start`, then bodies. vLLM's
own OpenAI layer speaks them, so nothing is translated where tokens flow.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# The ids of requests that check an engine begin so; they are no request of a client.
CANARY = "canary-"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One call: the endpoint's path, the expert by name, and the body as it came.

    `request_id` is unique among all requests in flight. `trace`: the W3C headers to go on
    with, for an engine that is elsewhere. `cache_salt`: only requests of the same one share what
    the engine has cached of prompts; empty: those without one. `on_abandoned` is told the tokens of
    the prompt and of the answer as far as it was made, by an engine that can tell, where the
    call is cancelled.
    """

    endpoint: str
    expert: str
    body: bytes
    request_id: str
    trace: Mapping[str, str] = field(default_factory=dict)
    cache_salt: str = ""
    on_abandoned: Callable[[int, int], None] = lambda prompt_tokens, answer_tokens: None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine turned out to be, once started."""

    engine: str
    max_model_len: int
    endpoints: frozenset[str]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """What one request that has ended took in its engine, by the engine's own clock, in s.

    queue_s: until it was scheduled; prefill_s: from then to the first token; decode_s:
    from the first token to the last.
    """

    expert: str
    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class RoutingSample:
    """What the routers of an expert chose since this was last told, in the steps looked at.

    layers: decoder layers that route; none: not a mixture of experts. experts: routed experts of
    each; top_k: how many a token gets, as the model was made. tokens: how many were seen. load:
    (layers, experts), tokens that each got. stretches: of a few prompts' consecutive tokens what
    they got, each (layers, tokens, k); -1: none.
    """

    expert: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    tokens: int = 0
    load: NDArray[np.int64] | None = None
    stretches: tuple[NDArray[np.int16], ...] = ()


class EngineObserver(Protocol):
    """Who counts what engines do."""

    def on_finished(self, work: EngineTimings) -> None:
        """A request has ended."""

    def on_weights(self, expert: str, size_bytes: int) -> None:
        """What the weights of an expert with an engine of its own take."""

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        """Routers are looked at: told once without tokens, then now and then what they chose."""

    def on_removed(self, expert: str) -> None:
        """The config has no such expert any more, or another one of that name."""

    def registry(self, expert: str) -> CollectorRegistry:
        """An empty place for the engine's own metrics while it runs this expert.

        It takes the place of the one that an engine was given before for this expert.
        """


class Engine(Protocol):
    """One running engine: a base's weights and any adapters of it."""

    async def start(self) -> EngineReport:
        """Start and load the base. Raises CoeError with the reason if it can't."""

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Make one more expert answerable.

        Args:
            expert: Its name.
            adapter: Folder of its adapter, where the engine was made without it.

        Raises:
            CoeError: It can't be, with the reason.
        """

    async def unload(self, expert: str) -> None:
        """Forget an adapter of which no request is under way. Raises CoeError."""

    async def run(self, request: EngineRequest, send: Send) -> None:
        """Answer one request.

        Nothing is sent before the first byte of the answer is known. Raises CoeError
        only before anything was sent; afterwards a fault ends the stream with an SSE
        error event. Cancelling it stops the generation.
        """

    def failure(self) -> str | None:
        """Why the engine is dead, or None while it lives."""

    async def stop(self) -> None:
        """Stop, and leave no process behind. Safe to call twice, and before `start`."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """An expert's weights are in host memory: how many bytes, and how long it took.

    starts: they are not yet: they come with an engine that the next exchange has to start.
    """

    host_bytes: int
    fill_s: float
    starts: bool = False


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Another expert runs: how long it took, pause and resume included, and by which method.

    `ok` is false where a look at the weights found other ones than were loaded:
    such an engine must not answer. `started`: an engine was started for it.
    """

    swap_s: float
    ok: bool
    method: str = "inplace"
    started: bool = False


class SwappingEngine(Engine, Protocol):
    """An engine that can hold several experts' weights and run one of them at a time."""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """The experts that this engine can run after an exchange: those of one family."""

    async def load_to_host(self, expert: str) -> LoadResult:
        """Bring an expert's weights to host memory, beside the running one.

        Raises ExpertFailedError.
        """

    async def swap_in(self, expert: str) -> SwapResult:
        """Run an expert whose weights are held. Nothing may be running.

        Raises ExpertFailedError.
        """

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Forget an expert's weights; not those of the running one.

        `for_next`: a fill follows at once, and may have their memory as it is.
        """
