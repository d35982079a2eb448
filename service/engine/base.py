"""The engine interface: the calls of a pool, and the statistics that an engine reports.

An engine answers by ASGI messages: one `http.response.start`, then bodies. vLLM's own OpenAI layer
speaks them, so nothing is translated where tokens flow.
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

# Prefix of the ids of requests that check an engine. No client sends them.
CANARY = "canary-"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One call of an engine.

    Attributes:
        endpoint: Path of the endpoint.
        expert: Name of the expert.
        body: The request's body, unchanged.
        request_id: Unique among all requests in flight.
        trace: W3C trace headers, for an engine in another process.
        cache_salt: Only requests with the same salt share cached prefixes. Requests with an empty
            one share theirs with each other.
        on_abandoned: Called when the call is cancelled, with the tokens of the prompt and of the
            answer so far, by an engine that can count them.
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
    """Properties of an engine that has started."""

    engine: str
    max_model_len: int
    endpoints: frozenset[str]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """Durations of one request that has ended, by the engine's own clock.

    Attributes:
        expert: Name of the expert.
        queue_s: Until the request was scheduled.
        prefill_s: From then to the first token.
        decode_s: From the first token to the last.
        prompt_tokens: Tokens of the prompt.
        answer_tokens: Tokens of the answer.
    """

    expert: str
    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class RoutingSample:
    """Choices of an expert's gates in sampled steps, since the sample before.

    Attributes:
        expert: Name of the expert.
        layers: Decoder layers with gates; empty: the model is no mixture of experts.
        experts: Routed experts of each layer.
        top_k: How many of them a token gets, as the model was made.
        tokens: How many tokens were seen.
        load: (layers, experts): how many tokens each routed expert got.
        stretches: Choices for consecutive tokens of a few prompts, each (layers, tokens, k);
            -1: none.
    """

    expert: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    tokens: int = 0
    load: NDArray[np.int64] | None = None
    stretches: tuple[NDArray[np.int16], ...] = ()


class EngineObserver(Protocol):
    """Receives the statistics of engines."""

    def on_finished(self, work: EngineTimings) -> None:
        """A request has ended."""

    def on_weights(self, expert: str, size_bytes: int) -> None:
        """The weights of an expert with an engine of its own have been measured."""

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        """Gates are sampled: called once without tokens at the start, then with each sample."""

    def on_removed(self, expert: str) -> None:
        """The config has no such expert any more, or another one of that name."""

    def registry(self, expert: str) -> CollectorRegistry:
        """An empty registry for the engine's own metrics while it runs this expert.

        It replaces the registry that an engine got for this expert before.
        """


class Engine(Protocol):
    """One running engine: a base's weights and any adapters of it."""

    async def start(self) -> EngineReport:
        """Start and load the base. Raises CoeError with the reason if it can't."""

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Make one more expert available.

        Args:
            expert: Name of the expert.
            adapter: Folder of its adapter, if the engine was made without it.

        Raises:
            CoeError: It can't be loaded; the message has the reason.
        """

    async def unload(self, expert: str) -> None:
        """Unload an adapter that no running request uses. Raises CoeError."""

    async def run(self, request: EngineRequest, send: Send) -> None:
        """Answer one request.

        Nothing is sent before the first byte of the answer is known. After that an error ends the
        stream with an SSE error event. Cancelling the call stops the generation.

        Raises:
            CoeError: Only before anything was sent.
        """

    def failure(self) -> str | None:
        """Why the engine is dead, or None while it lives."""

    async def stop(self) -> None:
        """Stop, and leave no process behind. Safe to call twice, and before `start`."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """An expert's weights are in host memory.

    Attributes:
        host_bytes: Their size.
        fill_s: How long the load took.
        starts: They are not in host memory yet: the next swap has to start an engine for them.
    """

    host_bytes: int
    fill_s: float
    starts: bool = False


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Another expert runs.

    Attributes:
        swap_s: How long the swap took, pause and resume included.
        ok: False where the weights are not as they were loaded: the engine must not answer.
        method: How the swap was done.
        started: An engine was started for the expert.
    """

    swap_s: float
    ok: bool
    method: str = "inplace"
    started: bool = False


class SwappingEngine(Engine, Protocol):
    """An engine that can hold several experts' weights and run one of them at a time."""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """The experts that this engine can run after a swap: those of one family."""

    async def load_to_host(self, expert: str) -> LoadResult:
        """Load an expert's weights to host memory, beside the running ones.

        Raises:
            ExpertFailedError: They can't be loaded.
        """

    async def swap_in(self, expert: str) -> SwapResult:
        """Run an expert whose weights are in host memory. No request may be running.

        Raises:
            ExpertFailedError: It can't be swapped in.
        """

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Forget the weights of an expert that does not run.

        Args:
            expert: Name of the expert.
            for_next: A load follows at once, which reuses the memory as it is.
        """
