"""The stages by which one config classifies prompts.

The first stage (n-grams and the static table) always runs, on the event loop. Where it is unsure,
and the categories in doubt have different experts, the encoder is asked, in its own process and
within a time limit. Where that gives no vector in time, the first stage decides. Where all are
unsure, the prompt is `general`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.classifier.built_in_artifact import encoder_for
from service.classifier.classifier import GENERAL, Assessment, Classifier, TextClassifier
from service.classifier.conversation_classifier import assess_turns, deciding_turn, user_turns
from service.classifier.example_classifier import (
    ExampleClassifier,
    ExampleVectors,
    example_texts,
    example_vectors,
    fit_head,
    joint_temperature,
)
from service.classifier.linear_heads import MIN_PROBE_COSINE, PROBE_TEXT, Head
from service.classifier.router_artifact import Artifact
from service.classifier.static_embedding_table import StaticTable, built_in_table, table_of
from service.config import Config
from service.encoder.encoder_client import (
    EncoderClient,
    EncoderSettings,
    EncoderUnavailableError,
)
from service.encoder.shared_encoders import SharedEncoders
from service.models.encoder_store import locate_encoder
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

log = logging.getLogger("coe.routing")

_RETRY_S = 5.0


class PromptStages:
    """Classifies prompts by the artifact, the categories with examples, and the encoder.

    Args:
        config: The config.
        artifact: The router's artifact; None without one.
        metrics: Counts what each stage decided; None where nobody reads it.

    Attributes:
        labels: The categories.

    Raises:
        ArtifactError: The artifact or the static table can't be used.
    """

    def __init__(
        self, config: Config, artifact: Artifact | None, metrics: MetricsRegistry | None = None
    ) -> None:
        self._config = config
        encoder = config.router.encoder
        self._encoder = encoder_for(None if encoder is None else encoder.model, artifact)
        self._metrics = metrics
        categories = config.categories
        static = config.router.static
        fitted = table_of(artifact) if static and artifact is not None else None
        table = built_in_table() if static and categories else None
        self._table: StaticTable | None = table
        self._base = None if artifact is None else Classifier.from_artifact(artifact, fitted)
        self._static: Head | None = None
        self._static_examples: ExampleVectors | None = None
        if categories and table is not None:
            vectors = np.stack([table.embed(text) for text in example_texts(categories)])
            self._static_examples = example_vectors(categories, vectors, table.within)
            self._static = fit_head(self._static_examples)
        self._first = self._classifier(None)
        self.labels = () if self._first is None else self._first.labels
        self._second: TextClassifier | None = None
        self._client: EncoderClient | None = None
        self._acquired: EncoderClient | None = None
        self._encoders: SharedEncoders | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._problem = "missing"

    def _classifier(self, encoder: Head | None, joint: float = 1.0) -> TextClassifier | None:
        names = tuple(self._config.categories)
        if not names:
            return self._base
        return ExampleClassifier(names, self._table, self._static, encoder, self._base, joint)

    @property
    def classifies(self) -> bool:
        """Whether there is anything to classify prompts by."""
        return self._first is not None

    def assess(self, body: Mapping[str, Any]) -> Assessment:
        """Classify a request's body by the first stage."""
        assert self._first is not None
        return assess_turns(self._first, user_turns(body))

    async def refine(
        self,
        body: Mapping[str, Any],
        first: Assessment,
        tenant: str,
        value: Callable[[], float] = lambda: 1.0,
    ) -> Assessment:
        """Classify it by the encoder as well, where the first stage is unsure and that matters.

        It waits no longer than the encoder's time limit, and gives `first` back where there is no
        vector in time.

        Args:
            body: The request's body.
            first: What the first stage says of it.
            tenant: Whose request it is.
            value: How much quality the category could add, were it known. It is called where the
                first stage is unsure.
        """
        found = first
        encoder = self._config.router.encoder
        if encoder is not None and _is_unsure(first, encoder.when_below):
            if value() > encoder.min_gain:
                found = await self._asked(body, first, tenant) or first
            else:
                self._count("needless")
        if self._metrics is not None:
            self._metrics.add(metric_declarations.ROUTER_STAGES, 1, found.scores.stage)
        return found

    async def _asked(
        self, body: Mapping[str, Any], first: Assessment, tenant: str
    ) -> Assessment | None:
        turns = user_turns(body)
        text = deciding_turn(turns)
        if not text.strip():
            return None
        began_s = time.monotonic()
        try:
            if self._client is None:
                raise EncoderUnavailableError(self._problem)
            if self._second is None:
                raise EncoderUnavailableError(
                    "starting" if self._client.problem is None else "failed"
                )
            vector = await self._client.embed(text, tenant)
        except EncoderUnavailableError as error:
            self._count(error.reason)
            return None
        self._count("ok")
        if self._metrics is not None:
            self._metrics.observe(metric_declarations.ROUTER_ENCODER, time.monotonic() - began_s)
        return assess_turns(self._second, turns, {text: vector}, first.readings)

    def _count(self, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.add(metric_declarations.ROUTER_ENCODER_REQUESTS, 1, outcome)

    async def start(self, encoders: SharedEncoders) -> None:
        """Start the encoder in the background, if the config has one."""
        settings = self._config.router.encoder
        if settings is None or self._first is None:
            return
        root = Path(self._config.models_dir) if self._config.models_dir else None
        folder = await asyncio.to_thread(locate_encoder, self._encoder, root=root)
        if folder is None:
            log.error(
                "the router's encoder %s is not there; it goes on with its first stage "
                "(coe models pull %s fetches one of the catalogue)",
                self._encoder,
                self._encoder,
            )
            return
        self._encoders = encoders
        self._client = self._acquired = encoders.acquire(
            EncoderSettings(
                folder,
                settings.threads,
                settings.max_tokens,
                settings.cache_entries,
                settings.timeout_ms / 1000,
            )
        )
        self._preparing = asyncio.create_task(self._prepare(self._client))

    async def wait_prepared(self, timeout_s: float) -> bool:
        """Wait until the encoder can be asked. Returns False where it can't be by then."""
        if self._preparing is None:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._preparing)
        return self._second is not None

    async def _prepare(self, client: EncoderClient) -> None:
        """Check the encoder and learn the examples by it, as soon as it runs."""
        while True:
            await client.wait_ready(_RETRY_S)
            try:
                probe = (await client.embed_all([PROBE_TEXT]))[0]
                texts = example_texts(self._config.categories)
                vectors = await client.embed_all(texts)
            except EncoderUnavailableError:
                await asyncio.sleep(_RETRY_S if client.problem is not None else 0.05)
                continue
            break
        problem = self._mismatch(probe)
        head, joint = None, 1.0
        if self._config.categories:
            given = example_vectors(self._config.categories, vectors)
            head = await asyncio.to_thread(fit_head, given)
            if self._static_examples is not None:
                joint = await asyncio.to_thread(joint_temperature, self._static_examples, given)
        if problem is not None:
            log.error("the router goes on with its first stage: %s", problem)
            if head is None:
                self._problem, self._client = "mismatch", None
                return
        self._second = self._classifier(head, joint)

    def _mismatch(self, probe: NDArray[np.float32]) -> str | None:
        """Why the artifact's head can't use this encoder; it is then left out."""
        if self._base is None:
            return None
        fitted = self._base.encoder
        if fitted is None:
            problem = "the artifact was fitted without an encoder"
        elif fitted.probe.shape != probe.shape:
            problem = f"it gives {len(probe)} numbers, the artifact has {len(fitted.probe)}"
        elif float(fitted.probe @ probe) < MIN_PROBE_COSINE:
            problem = "it is another one than the artifact was fitted with"
        else:
            return None
        self._base.encoder = None
        return f"the encoder {self._encoder} does not fit {self._config.router.artifact}: {problem}"

    async def stop(self) -> None:
        """Give the encoder back."""
        if self._preparing is not None:
            self._preparing.cancel()
            with suppress(asyncio.CancelledError):
                await self._preparing
            self._preparing = None
        if self._encoders is not None:
            encoders, self._encoders = self._encoders, None
            self._client = self._second = None
            if self._acquired is not None:
                await encoders.release(self._acquired)


def _is_unsure(first: Assessment, when_below: float) -> bool:
    """Whether the encoder is asked: the first stage is not confident, or gave up."""
    scores = first.scores
    return scores.confidence < when_below or scores.stage == GENERAL
