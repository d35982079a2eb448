"""The engine interface: the calls of a pool, and the statistics that an engine reports.

An engine answers with ASGI messages: one `http.response.start`, then bodies. vLLM's own OpenAI
layer sends the same messages, so that tokens pass without a translation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# The prefix of the ids of requests that check an engine. Clients never send such requests.
CANARY = "canary-"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One call of an engine.

    Attributes:
        endpoint: The path of the endpoint.
        expert: The name of the expert, as the engine knows it.
        body: The request's body.
        request_id: An id that is unique among all requests in flight.
        trace: W3C trace headers, for an engine in another process.
        cache_salt: Only requests with the same salt share cached prefixes. Requests with an empty
            salt share cached prefixes with each other.
        on_abandoned: A callback for a cancelled call. An engine that can count tokens passes it
            the numbers of prompt tokens and of answer tokens so far.
        asked_as: The name that the client asked for, where that is another one. Statistics of the
            request have it.
        tenant: The tenant that sent it. Tenants take turns where requests wait in an engine.
    """

    endpoint: str
    expert: str
    body: bytes
    request_id: str
    trace: Mapping[str, str] = field(default_factory=dict)
    cache_salt: str = ""
    on_abandoned: Callable[[int, int], None] = lambda prompt_tokens, answer_tokens: None
    asked_as: str | None = None
    tenant: str = ""

    @property
    def counted_as(self) -> str:
        """The expert that statistics count the request for."""
        return self.asked_as or self.expert


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Properties of an engine that has started."""

    engine: str
    max_model_len: int
    endpoints: frozenset[str]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """The durations of one finished request, by the engine's own clock.

    Attributes:
        expert: The name of the expert.
        queue_s: Seconds from the arrival until the request was scheduled.
        prefill_s: Seconds from then to the first token.
        decode_s: Seconds from the first token to the last token.
        prompt_tokens: The number of tokens of the prompt.
        answer_tokens: The number of tokens of the answer.
    """

    expert: str
    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class RoutingSample:
    """The choices of an expert's gates in sampled steps since the previous sample.

    Attributes:
        expert: The name of the expert.
        layers: The indices of decoder layers with gates. It is empty where the model is not a
            mixture of experts.
        experts: The number of routed experts in each layer.
        top_k: The number of routed experts that the model chooses for a token without steering.
        tokens: The number of tokens in the sample.
        load: The number of tokens that each routed expert got, (layers, experts).
        stretches: The choices for consecutive tokens of a few prompts, each (layers, tokens, k).
            The value -1 marks an unused place.
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
        """Record the timings of a finished request."""

    def on_weights(self, expert: str, size_bytes: int) -> None:
        """Record the measured weights of an expert that has an engine of its own."""

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        """Record a sample of gates. The first call comes at the start and has no tokens."""

    def on_removed(self, expert: str) -> None:
        """Forget an expert that the config has removed or replaced."""

    def engine_registry(self, expert: str) -> CollectorRegistry:
        """Return an empty registry for the engine's own metrics while it runs this expert.

        The registry replaces any earlier registry of this expert.
        """


class Engine(Protocol):
    """One engine with a base's weights and any adapters of this base."""

    async def start(self) -> EngineReport:
        """Start the engine and load the base.

        Raises:
            CoeError: The start failed. The message has the reason.
        """

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Make another expert available.

        Args:
            expert: The name of the expert.
            adapter: The folder of its adapter, if the engine was made without this adapter.

        Raises:
            CoeError: The expert can't be loaded. The message has the reason.
        """

    async def unload(self, expert: str) -> None:
        """Unload an adapter that no running request uses.

        Raises:
            CoeError: The engine refuses.
        """

    async def run(self, request: EngineRequest, send: Send) -> None:
        """Answer one request.

        Nothing is sent before the first byte of the answer is known. A later error ends the stream
        with an SSE error event. A cancellation of the call stops the generation.

        Raises:
            CoeError: The request failed before anything was sent.
        """

    def failure(self) -> str | None:
        """Return why the engine is dead, or None while it lives."""

    async def stop(self) -> None:
        """Stop the engine and its processes. It is safe to call this twice, and before `start`."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of loading an expert's weights to host memory.

    Attributes:
        host_bytes: The size of the weights in bytes.
        fill_s: The duration of the load in seconds.
        stall_s: The longest time for which the load may have kept a GPU's kernels waiting.
        starts: True where nothing was loaded, because the next swap starts an engine for the
            expert.
        layer_room_ratio: The room on a GPU in which the largest layer was made ready, in sizes of
            that layer; 0 where none was.
    """

    host_bytes: int
    fill_s: float
    starts: bool = False
    stall_s: float = 0.0
    layer_room_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class SwapResult:
    """The result of a swap.

    Attributes:
        swap_s: The duration of the swap in seconds, including pause and resume.
        ok: False where the weights differ from the loaded weights. The engine must not answer then.
        method: The method of the swap.
        started: Whether an engine was started for the expert.
    """

    swap_s: float
    ok: bool
    method: str = "inplace"
    started: bool = False


class SwappingEngine(Engine, Protocol):
    """An engine that can hold several experts' weights and run one of them at a time."""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """The experts of one family, which this engine can run after a swap."""

    async def load_to_host(self, expert: str) -> LoadResult:
        """Load an expert's weights to host memory, beside the running weights.

        Raises:
            ExpertFailedError: The weights can't be loaded.
        """

    async def swap_in(self, expert: str) -> SwapResult:
        """Run an expert whose weights are in host memory. No request may be running.

        Raises:
            ExpertFailedError: The expert can't be swapped in.
        """

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Forget the weights of an expert that does not run.

        Args:
            expert: The name of the expert.
            for_next: Whether a load follows at once. It can then reuse the memory.
        """


@runtime_checkable
class RestingEngine(Protocol):
    """An engine that can give the accelerator back and keep weights in host memory."""

    @property
    def can_rest(self) -> bool:
        """Whether it can, as it was made."""

    async def rest(self) -> None:
        """Free the accelerator's memory. No request may be running.

        Raises:
            EngineDeadError: The engine failed.
        """

    async def resume(self) -> None:
        """Take the accelerator again, with the expert that ran last.

        `SwappingEngine.swap_in` does the same for another expert.

        Raises:
            EngineDeadError: The engine failed.
        """
