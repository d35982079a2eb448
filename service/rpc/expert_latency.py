"""Latency estimates of experts: moving averages of measurements. Pure.

A slow measurement may have been caused by a busy machine. An expert that looks slow gets few
requests, or none if it seems to miss every deadline, so it would rarely be measured again. Slow
measurements therefore decay toward the prior, and the expert gets requests again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.http.token_usage import reply_usage
from service.rpc.snapshot import Speed

_EWMA = 0.2
# Least spread of prompt lengths (standard deviation over mean) for fitting a slope.
_LEAST_SPREAD = 0.1
# The share of a stream's time for which its reader may hold it up, if its speed is to count.
_MOST_HELD = 0.1
# A send that does not wait for the reader takes some 20 µs.
_WAITED_S = 0.001
# Speed of an expert that was never measured.
PRIOR = Speed(first_s=0.2, chunk_s=0.02)
# Half-life of the decay to the prior. The decay has steps, because each change of the speed
# changes the snapshot.
_HALF_LIFE_S = 600.0
_STEP_S = 60.0


class LatencyEstimator:
    """Estimates the time to the first byte and the time per token of the answer.

    The time to the first byte is a linear function of the prompt's length. The line is a
    least-squares fit with exponential forgetting. It is computed from the moving averages of
    length, time, length² and length · time.

    Before the first stream, only total times of whole answers are known. They are fitted as a
    linear function of both lengths.
    """

    def __init__(self) -> None:
        self._whole = _TotalTimes()
        self._streams = False
        self._length = self._time = self._square = self._product = 0.0
        self._chunk_s = 0.0
        self._measured_at_s = 0.0

    def streamed(self, prompt_tokens: int, first_s: float, chunk_s: float, now_s: float) -> None:
        """Record a stream.

        Args:
            prompt_tokens: Length of the prompt.
            first_s: Seconds to the first byte.
            chunk_s: Seconds between two chunks; 0 if there were too few chunks to measure.
            now_s: The current time in s.
        """
        self._measured_at_s = now_s
        weight = _EWMA if self._streams else 1.0
        self._streams = True
        self._length += weight * (prompt_tokens - self._length)
        self._time += weight * (first_s - self._time)
        self._square += weight * (prompt_tokens * prompt_tokens - self._square)
        self._product += weight * (prompt_tokens * first_s - self._product)
        if chunk_s:
            self._chunk(chunk_s)

    def whole(self, prompt_tokens: int, total_s: float, tokens: int, now_s: float) -> None:
        """Record a reply in one piece.

        Only its total time is known. The estimated time to the first byte is subtracted from it,
        and the rest counts as the time of the tokens.

        Args:
            prompt_tokens: Length of the prompt.
            total_s: Seconds to the end of the reply.
            tokens: Length of the answer.
            now_s: The current time in s.
        """
        if tokens < 1:
            return
        self._measured_at_s = now_s
        if not self._streams:
            self._whole.add(prompt_tokens, tokens, total_s)
            return
        first_s, per_token_s = self._line()
        left_s = total_s - first_s - per_token_s * prompt_tokens
        self._chunk(max(left_s, 0.0) / tokens)

    def _chunk(self, chunk_s: float) -> None:
        self._chunk_s += (_EWMA if self._chunk_s else 1.0) * (chunk_s - self._chunk_s)

    def _line(self) -> tuple[float, float]:
        """The fitted line: seconds for an empty prompt, and seconds per prompt token."""
        variance = self._square - self._length * self._length
        per_token_s = 0.0
        if variance > (_LEAST_SPREAD * self._length) ** 2:
            slope = (self._product - self._length * self._time) / variance
            # The slope is at least 0, and no steeper than a line through the origin.
            per_token_s = min(max(slope, 0.0), self._time / max(self._length, 1.0))
        return self._time - per_token_s * self._length, per_token_s

    def speed(self, now_s: float) -> Speed:
        """The estimate now; `Speed()` before any measurement."""
        first_s, per_token_s = self._line()
        chunk_s = self._chunk_s
        if not chunk_s and self._whole.known:
            whole_first_s, whole_per_token_s, chunk_s = self._whole.fit()
            if not self._streams:
                first_s, per_token_s = whole_first_s, whole_per_token_s
        steps = max(0.0, now_s - self._measured_at_s) // _STEP_S
        kept = 0.5 ** (steps * _STEP_S / _HALF_LIFE_S)
        return Speed(
            round(_decay_to_prior(first_s, PRIOR.first_s, kept), 4),
            round(_decay_to_prior(chunk_s, PRIOR.chunk_s, kept), 5),
            round(_decay_to_prior(per_token_s, PRIOR.per_token_s, kept), 7),
        )


class _TotalTimes:
    """Fits total times of answers: a time for each prompt token, and one for each answer token.

    It is a least-squares fit with exponential forgetting, from the moving averages of the lengths,
    the time, and their products. Coefficients are not negative. What neither length explains is the
    time to the first byte of an empty prompt. Where the answers have about the same length, their
    share of the time can't be told from that, and is counted as theirs.
    """

    def __init__(self) -> None:
        self.known = False
        # Of prompt length p, answer length a and time t: p, a, t, p², a², p·a, p·t, a·t.
        self._means = [0.0] * 8

    def add(self, prompt: int, answer: int, time_s: float) -> None:
        """Add an answer: the tokens of its prompt, its own tokens, and its time in s."""
        values = (
            *(prompt, answer, time_s),
            *(prompt * prompt, answer * answer, prompt * answer),
            *(prompt * time_s, answer * time_s),
        )
        weight = _EWMA if self.known else 1.0
        self.known = True
        self._means = [
            mean + weight * (value - mean) for mean, value in zip(self._means, values, strict=True)
        ]

    def fit(self) -> tuple[float, float, float]:
        """Seconds to the first byte of an empty prompt, per prompt token, and per answer token."""
        p, a, t, pp, aa, pa, pt, at = self._means
        var_p, var_a, cov = pp - p * p, aa - a * a, pa - p * a
        with_p, with_a = pt - p * t, at - a * t
        varied_p = var_p > (_LEAST_SPREAD * p) ** 2
        varied_a = var_a > (_LEAST_SPREAD * a) ** 2
        # By one length alone.
        by_p = max(0.0, with_p / var_p) if varied_p else 0.0
        by_a = max(0.0, with_a / var_a) if varied_a else 0.0
        per_prompt, per_answer = by_p, by_a
        if varied_p and varied_a:
            # The correlation of the lengths must leave something to tell them apart by.
            apart = var_p * var_a - cov * cov
            per_prompt, per_answer = 0.0, by_a
            if apart > _LEAST_SPREAD * var_p * var_a:
                per_prompt = (with_p * var_a - with_a * cov) / apart
                per_answer = (with_a * var_p - with_p * cov) / apart
                if per_prompt < 0:
                    per_prompt, per_answer = 0.0, by_a
                elif per_answer < 0:
                    per_prompt, per_answer = by_p, 0.0
        per_prompt = min(per_prompt, t / max(p, 1.0))
        left_s = max(0.0, t - per_prompt * p)
        per_answer = min(per_answer, left_s / a)
        if not varied_a or not per_answer:
            return 0.0, per_prompt, left_s / a
        return left_s - per_answer * a, per_prompt, per_answer


def measured_speeds(estimators: Mapping[str, LatencyEstimator], now_s: float) -> dict[str, Speed]:
    """Return the speed of each expert that was measured.

    Args:
        estimators: The estimator of each expert.
        now_s: The current time in s.
    """
    speeds = {name: estimator.speed(now_s) for name, estimator in estimators.items()}
    return {name: speed for name, speed in speeds.items() if speed != Speed()}


def _decay_to_prior(measured: float, prior: float, kept: float) -> float:
    return prior + kept * (measured - prior) if measured > prior else measured


@dataclass(slots=True, eq=False)
class EngineStay:
    """A request in an engine. `alone`: no other request has been there meanwhile."""

    alone: bool


class EngineOccupancy:
    """Knows which requests have an engine to themselves."""

    def __init__(self) -> None:
        self._stays: set[EngineStay] = set()

    @contextmanager
    def stay(self) -> Iterator[EngineStay]:
        """Count a request while it is in the engine."""
        stay = EngineStay(alone=not self._stays)
        for other in self._stays:
            other.alone = False
        self._stays.add(stay)
        try:
            yield stay
        finally:
            self._stays.remove(stay)


@dataclass(slots=True)
class ExpertLatency:
    """The latency of an expert as it usually is, and as it is where nothing else runs.

    Attributes:
        usual: Learns from all answers.
        idle: Learns only from the answers to requests that had the engine to themselves.
    """

    usual: LatencyEstimator = field(default_factory=LatencyEstimator)
    idle: LatencyEstimator = field(default_factory=LatencyEstimator)

    def learn(
        self, timer: ResponseTimer, prompt_tokens: int, sequences: int = 1, *, alone: bool
    ) -> None:
        """Learn from an answer.

        Args:
            timer: Has timed it.
            prompt_tokens: Length of the prompt.
            sequences: Number of sequences that the engine computed together for it.
            alone: Whether the request had the engine to itself.
        """
        timer.report(self.usual, prompt_tokens, sequences)
        if alone:
            timer.report(self.idle, prompt_tokens, sequences)


class ResponseTimer:
    """Times one answer as its ASGI messages pass, for a `LatencyEstimator`.

    All times are in s of the same clock.

    Attributes:
        first_s: When the head of the response passed; 0 before.
        chunks: Number of body messages that passed.
        held_s: Time in which the reader held the answer up.
    """

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.first_s = 0.0
        self.chunks = 0
        self.held_s = 0.0
        self._last_s = 0.0
        self._good = False
        self._streams = False
        self._body = b""

    def on_bytes(self, message: object, now_s: float) -> None:
        """Record an ASGI message."""
        assert isinstance(message, dict)
        if message["type"] == "http.response.start":
            self.first_s = now_s
            self._good = message["status"] == 200
            self._streams = any(v.startswith(b"text/event-stream") for _, v in message["headers"])
            return
        self._last_s = now_s
        self.chunks += 1
        self._body = message.get("body", b"")

    def on_sent(self, took_s: float) -> None:
        """Record how long the send of a message took."""
        if took_s > _WAITED_S:
            self.held_s += took_s

    def tokens(self) -> int:
        """Tokens so far: the chunks of a stream, or the usage of a whole answer."""
        return self.chunks if self._streams else _answer_tokens(self._body)

    def report(self, estimator: LatencyEstimator, prompt_tokens: int, sequences: int = 1) -> None:
        """Add the measurement to the estimator, if the answer was successful.

        The tokens of several sequences come at the same time, so that each waits for its own only.
        """
        if not self._good:
            return
        if self._streams:
            # The last message only ends the stream, so it is no chunk.
            between = self.chunks - 2
            took_s = self._last_s - self.first_s
            # One client that reads slowly must not make the expert slow for all others.
            counts = between > 0 and self.held_s <= _MOST_HELD * took_s
            chunk_s = took_s * sequences / between if counts else 0.0
            estimator.streamed(prompt_tokens, self.first_s - self.began_s, chunk_s, self._last_s)
            return
        tokens = _answer_tokens(self._body)
        tokens = -(-tokens // sequences)
        estimator.whole(prompt_tokens, self._last_s - self.began_s, tokens, self._last_s)


def _answer_tokens(body: bytes) -> int:
    """Number of answer tokens in the usage of a whole answer; 0 if it has no usage."""
    usage = reply_usage(body)
    return (usage.answer_tokens or 0) if usage is not None else 0
