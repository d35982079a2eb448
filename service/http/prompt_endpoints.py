"""The endpoints that carry a prompt, with the fields of their bodies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint, and the fields that matter for routing and limits.

    Attributes:
        prompt: The field that holds the prompt; empty where any will do.
        prompt_types: JSON types that the prompt may have.
        needs: The capability that an expert must have, if any.
        lengths: The fields that bound an answer's tokens. The first that is given counts;
            the last is the one to add. Empty: it makes no answer that could be bounded.
        usual_length: The engine's own bound in tokens where the body gives none.
        choices: The fields that ask for several answers to one prompt.
        several: Whether the prompt's field may hold a list of prompts.
        beside: The field of the text that each prompt is read with: the query of documents, or the
            first text of pairs. Empty: each prompt is read alone.
    """

    prompt: str = ""
    prompt_types: tuple[type, ...] = ()
    needs: str = ""
    lengths: tuple[str, ...] = ()
    usual_length: int | None = None
    choices: tuple[str, ...] = ()
    several: bool = False
    beside: str = ""

    @property
    def generates(self) -> bool:
        """Whether it makes tokens, so that an answer's length can be bounded."""
        return bool(self.lengths)

    @property
    def listens(self) -> bool:
        """Whether its prompt is a recording, whose length no context bounds."""
        return self.needs == TRANSCRIPTION

    @property
    def converses(self) -> bool:
        """Whether it answers the last turn of a conversation."""
        return self.needs == "chat" and self.generates


AUDIO = "/v1/audio/transcriptions"
"""Its requests are forms. Inside the service they are JSON, with the recording in base64."""
TRANSCRIPTION = "transcription"
_TEXTS = (str, list)
TABLE: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        "messages", (list,), "chat", ("max_completion_tokens", "max_tokens"), choices=("n",)
    ),
    "/v1/messages": Endpoint("messages", (list,), "chat", ("max_tokens",)),
    "/v1/messages/count_tokens": Endpoint("messages", (list,), "chat"),
    "/v1/completions": Endpoint(
        "prompt",
        _TEXTS,
        "completions",
        ("max_tokens",),
        usual_length=16,
        choices=("n", "best_of"),
        several=True,
    ),
    "/v1/embeddings": Endpoint("input", _TEXTS, "embeddings", several=True),
    "/v1/rerank": Endpoint("documents", (list,), "rerank", several=True, beside="query"),
    "/v1/score": Endpoint("text_2", _TEXTS, "score", several=True, beside="text_1"),
    "/v1/classify": Endpoint("input", _TEXTS, "classify", several=True),
    AUDIO: Endpoint("file", (str,), TRANSCRIPTION),
    "/v1/responses": Endpoint("input", _TEXTS, "chat", ("max_output_tokens",)),
    "/v1/responses/input_tokens": Endpoint("input", _TEXTS, "chat"),
    "/tokenize": Endpoint(),
    "/detokenize": Endpoint(),
}
ENDPOINTS = tuple(TABLE)
# Endpoints of Ollama's API that carry a prompt. Each is a face of one of the others.
OLLAMA_ENDPOINTS = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
# Paths of endpoints that servers know by another name. There is no standard for classes.
UPSTREAM_PATHS = {"/v1/classify": "/classify"}
# They make nothing but counts and tokens, so they are not charged.
UNCHARGED = frozenset(
    {"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"}
)
