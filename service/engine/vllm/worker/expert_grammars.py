"""Compiles grammars in vLLM's core for the tokenizer of the running expert.

vLLM's core loads one tokenizer at its start, for grammars and reasoning parsers. An expert of the
same family may have another tokenizer, and the core's grammars would then allow wrong tokens. A
worker can't reach the core's grammar manager object, so this module changes its class. The marks of
thinking are read with the tokenizer, see `thinking_marks`.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, TypeVar

from service.engine.vllm.worker.model_access import world_size
from service.engine.vllm.worker.thinking_marks import marks_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.reasoning import ReasoningConfig
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputBackend


_V = TypeVar("_V")


class ExpertGrammars:
    """The tokenizers and grammar backends of experts whose tokenizers differ from the core's.

    Args:
        config: vLLM's config of the model that the core was started with.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._tokenizers: dict[str, TokenizerLike] = {}
        self._backends: dict[str, StructuredOutputBackend] = {}
        self._marks: dict[str, ReasoningConfig | None] = {}
        self._faults: dict[str, str] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._running = ""
        self._installed = False

    def load(self, expert: str, folder: str) -> None:
        """Start to load an expert's tokenizer in a thread. `fault` returns the outcome.

        Raises:
            ValueError: The core and this worker are in different processes.
        """
        if world_size(self._config) > 1:
            raise ValueError(
                "its tokenizer is another than the running engine's, and with several GPUs no "
                "grammars can be made for it; it needs its own engine (swap.method: respawn)"
            )
        self.forget(expert)
        thread = threading.Thread(target=self._read, args=(expert, folder), daemon=True)
        self._threads[expert] = thread
        thread.start()

    def _read(self, expert: str, folder: str) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        config = copy.copy(self._config.model_config)
        config.model = config.tokenizer = folder
        try:
            self._marks[expert] = marks_of(self._config, config)
            self._tokenizers[expert] = cached_tokenizer_from_config(config)
        except Exception as error:
            self._faults[expert] = f"{type(error).__name__}: {error}".splitlines()[0][:400]

    def fault(self, expert: str) -> str | None:
        """Return why an expert's tokenizer can't be read.

        The result is None while the tokenizer is being read, and empty on success.
        """
        thread = self._threads.get(expert)
        if thread is not None and thread.is_alive():
            return None
        return self._faults.get(expert, "")

    def marks(self, expert: str) -> ReasoningConfig | None:
        """Return the marks of an expert's thinking; None where the engine knows no marks."""
        return self._marks.get(expert, self._config.reasoning_config)

    def forget(self, expert: str) -> None:
        """Use the core's own tokenizer for an expert again."""
        self._threads.pop(expert, None)
        self._tokenizers.pop(expert, None)
        self._marks.pop(expert, None)
        self._faults.pop(expert, None)
        if (backend := self._backends.pop(expert, None)) is not None:
            backend.destroy()

    def run(self, expert: str) -> None:
        """Compile grammars for this expert's tokens from now on. No request may be running."""
        self._running = expert if expert in self._tokenizers else ""
        if self._running and not self._installed:
            from vllm.v1.structured_output import StructuredOutputManager

            # Properties of the class take precedence over attributes of the instance.
            StructuredOutputManager.tokenizer = self._expert_property("tokenizer", self._tokenizers)
            StructuredOutputManager.backend = self._expert_property("backend", self._backends)
            self._installed = True

    def _expert_property(self, name: str, by_expert: dict[str, _V]) -> property:
        """Make a property of the manager with separate values for experts that have them."""

        def read(manager: StructuredOutputManager) -> object:
            own = manager.__dict__.get(name)
            return by_expert.get(self._running) if self._running else own

        def write(manager: StructuredOutputManager, value: _V) -> None:
            if self._running:
                by_expert[self._running] = value
            else:
                manager.__dict__[name] = value

        return property(read, write)
