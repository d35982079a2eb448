"""Grammars are made for the tokens of the expert that runs, in vLLM's core.

vLLM's core reads one tokenizer when it starts, for grammars and reasoning parsers, and keeps it. An
expert of the same family may have another: its grammars would allow tokens that mean other text.
The core keeps its manager of grammars to itself, so it is told by that one's class.
"""

from __future__ import annotations

import copy
import threading
from typing import Any


class Grammars:
    """The tokenizers of experts whose tokens are not those that the core was started with.

    `config`: vLLM's own for the model that it was started with.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._tokenizers: dict[str, Any] = {}
        self._backends: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._running = ""
        self._installed = False

    def bring(self, expert: str, folder: str) -> None:
        """Begin to read the tokenizer of an expert, beside what runs. See `told`.

        Raises ValueError where the core is in another process than this worker.
        """
        if self._config.parallel_config.world_size > 1:
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
            self._tokenizers[expert] = cached_tokenizer_from_config(config)
        except Exception as error:
            self._faults[expert] = f"{type(error).__name__}: {error}".splitlines()[0][:400]

    def told(self, expert: str) -> str | None:
        """Why an expert's tokenizer can't be read, empty once it is there, None until then."""
        thread = self._threads.get(expert)
        if thread is not None and thread.is_alive():
            return None
        return self._faults.get(expert, "")

    def forget(self, expert: str) -> None:
        """Have the expert make do with the core's own tokenizer again."""
        self._threads.pop(expert, None)
        self._tokenizers.pop(expert, None)
        self._faults.pop(expert, None)
        if (backend := self._backends.pop(expert, None)) is not None:
            backend.destroy()

    def run(self, expert: str) -> None:
        """From now on grammars are this expert's. Nothing may be running."""
        self._running = expert if expert in self._tokenizers else ""
        if self._running and not self._installed:
            from vllm.v1.structured_output import StructuredOutputManager

            # Before an instance's own attributes.
            StructuredOutputManager.tokenizer = self._exchanged("tokenizer", self._tokenizers)
            StructuredOutputManager.backend = self._exchanged("backend", self._backends)
            self._installed = True

    def _exchanged(self, name: str, by_expert: dict[str, Any]) -> property:
        """An attribute of the manager that is the running expert's, where that has its own."""

        def read(manager: Any) -> Any:
            own = manager.__dict__.get(name)
            return by_expert.get(self._running) if self._running else own

        def write(manager: Any, value: Any) -> None:
            if self._running:
                by_expert[self._running] = value
            else:
                manager.__dict__[name] = value

        return property(read, write)
