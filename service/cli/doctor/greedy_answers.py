"""Comparison of greedy answers: of one engine at different times, of two engines, of a reference.

Pure. Two computations of the same weights may differ in their last bits, and a token that is as
likely as another may then go either way. So answers are compared up to the first such token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The largest differences of a token's log probability, by dtype: between two runs of the same
# kernels, and from a reference in float32.
_TOLERANCES = {"float32": (1e-3, 0.02)}
_TOLERANCES_OTHER = (0.05, 0.3)
# From a reference that does not round activations to 8 bits, as the engine's kernels do.
_ROUNDED = 1.0


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """The greedy tokens after one prompt, and the log probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """What a reference says of the tokens of an answer.

    Attributes:
        logprobs: The log probability of each token.
        best: The log probability of the most likely token at each place.
        margins: How far the second most likely token is behind, at each place.
    """

    logprobs: tuple[float, ...]
    best: tuple[float, ...]
    margins: tuple[float, ...]


def tolerances(dtype: str, *, rounds_activations: bool = False) -> tuple[float, float]:
    """Return the tolerances between runs, and from a reference."""
    between, from_reference = _TOLERANCES.get(dtype, _TOLERANCES_OTHER)
    return between, _ROUNDED if rounds_activations else from_reference


def difference(
    expected: GreedyAnswer, answer: GreedyAnswer, margins: Sequence[float], tolerance: float
) -> str | None:
    """Return how an answer differs, or None.

    Args:
        expected: The other answer.
        answer: The answer.
        margins: By place of `expected`, how far the second most likely token is behind.
        tolerance: The largest difference of log probabilities. A smaller margin is a tie.
    """
    if len(expected.tokens) != len(answer.tokens):
        return f"{len(answer.tokens)} tokens instead of {len(expected.tokens)}"
    for i, (token, other) in enumerate(zip(expected.tokens, answer.tokens, strict=True)):
        if token != other:
            return None if margins[i] < tolerance else f"token {i} is {other} instead of {token}"
        apart = abs(expected.logprobs[i] - answer.logprobs[i])
        if not apart <= tolerance:
            return f"the log probability of token {i} is off by {apart:.4f}"
    return None


def disagreement(answer: GreedyAnswer, scores: ReferenceScores, tolerance: float) -> str | None:
    """Return how an answer contradicts a reference, or None."""
    for i, logprob in enumerate(answer.logprobs):
        apart = abs(logprob - scores.logprobs[i])
        if not apart <= tolerance:
            return f"the log probability of token {i} is off by {apart:.4f}"
        if not scores.best[i] - scores.logprobs[i] <= tolerance:
            return f"token {i} is not the most likely"
    return None


def judge_answers(
    said: Mapping[str, Sequence[Sequence[GreedyAnswer]]],
    scores: Mapping[str, Sequence[ReferenceScores]],
    fresh: Mapping[str, Sequence[GreedyAnswer]],
    dtype: str,
    *,
    rounds_activations: bool = False,
) -> str | None:
    """Judge what an engine said of each model, each time that it ran it.

    Args:
        said: By model, for each time, an answer to each prompt.
        scores: By model, the reference's scores of the answers of `fresh`, or of the first time
            where `fresh` is empty.
        fresh: By model, the answers of an engine that ran this model only. It may be empty.
        dtype: The dtype of the activations in the engine.
        rounds_activations: Whether its kernels round activations to 8 bits.

    Returns:
        The first fault, or None where every answer is as it should be.
    """
    between, from_reference = tolerances(dtype, rounds_activations=rounds_activations)
    for model, times in said.items():
        against = "a fresh engine" if fresh else "its first time"
        expected = fresh[model] if fresh else times[0]
        for prompt, score in enumerate(scores[model]):
            why = disagreement(expected[prompt], score, from_reference)
            if why is not None:
                return f"model {model}, prompt {prompt}: against transformers: {why}"
        for turn, answers in enumerate(times):
            for prompt, answer in enumerate(answers):
                margins = scores[model][prompt].margins
                why = difference(expected[prompt], answer, margins, between)
                if why is not None:
                    return (
                        f"model {model}, time {turn + 1}, prompt {prompt}: against {against}: {why}"
                    )
    return None


def are_alike(one: Sequence[GreedyAnswer], two: Sequence[GreedyAnswer]) -> bool:
    """Return whether two models answered the same tokens, so that swaps would show nothing."""
    return [answer.tokens for answer in one] == [answer.tokens for answer in two]
